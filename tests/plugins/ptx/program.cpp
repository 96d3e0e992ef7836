#include "program.h"
#include "scanner.h"

#include <algorithm>

namespace lfx::ptx
{
namespace
{

size_t typeBytes(Scanner& scanner, std::string const& type)
{
    static std::map<std::string, size_t> const kBYTES
        = {{".b8", 1}, {".u8", 1}, {".b16", 2}, {".b32", 4}, {".u32", 4}, {".f32", 4}, {".b64", 8}, {".u64", 8}};
    auto const entry = kBYTES.find(type);
    if (entry == kBYTES.end())
    {
        scanner.fail("type " + type + " of a variable is not supported");
    }
    return entry->second;
}

struct Declaration
{
    std::string name;
    size_t alignment;
    size_t bytes; // 0 for an array without a size
};

// [.align N] .type name[elements]
Declaration declaration(Scanner& scanner)
{
    size_t alignment = 0;
    std::string type = scanner.word();
    if (type == ".align")
    {
        alignment = scanner.size();
        type = scanner.word();
    }
    size_t bytes = typeBytes(scanner, type);
    alignment = std::max(alignment, bytes);
    std::string const name = scanner.word();
    if (scanner.accept('['))
    {
        bytes = scanner.peek() == ']' ? 0 : bytes * scanner.size();
        scanner.expect(']');
    }
    return {name, alignment, bytes};
}

size_t roundUp(size_t size, size_t alignment)
{
    return (size + alignment - 1) / alignment * alignment;
}

class Parser
{
public:
    explicit Parser(std::string const& text)
        : mScanner(text)
    {
    }

    std::vector<Kernel> module()
    {
        std::vector<Kernel> kernels;
        while (!mScanner.atEnd())
        {
            std::string const directive = mScanner.word();
            if (directive == ".version" || directive == ".target" || directive == ".address_size")
            {
                mScanner.word();
            }
            else if (directive == ".extern" || directive == ".shared")
            {
                moduleShared(directive == ".extern");
            }
            else if (directive == ".visible" || directive == ".weak")
            {
                continue; // .entry follows
            }
            else if (directive == ".entry")
            {
                kernels.push_back(kernel());
            }
            else
            {
                mScanner.fail("directive " + directive + " of a module is not supported");
            }
        }
        return kernels;
    }

private:
    using Names = std::map<std::string, std::string>; // declared in a block of braces -> unique

    void moduleShared(bool isExternal)
    {
        if (isExternal && mScanner.word() != ".shared")
        {
            mScanner.fail("only shared memory may be .extern");
        }
        mShared.push_back(declaration(mScanner));
        mScanner.expect(';');
    }

    Kernel kernel()
    {
        mKernel = Kernel();
        mKernel.name = mScanner.word();
        if (mScanner.accept('('))
        {
            parameters();
        }
        for (std::string directive = mScanner.word(); !directive.empty(); directive = mScanner.word())
        {
            limit(directive);
        }
        mDynamicShared.clear();
        for (Declaration const& variable : mShared)
        {
            addShared(variable);
        }
        mScanner.expect('{');
        mScopes = {{}};
        body();
        for (std::string const& name : mDynamicShared)
        {
            mKernel.shared[name] = {0, roundUp(mKernel.staticSharedBytes, mKernel.sharedAlignment)};
        }
        return std::move(mKernel);
    }

    void parameters()
    {
        size_t end = 0;
        while (!mScanner.accept(')'))
        {
            if (mScanner.word() != ".param")
            {
                mScanner.fail("expected .param");
            }
            Declaration const parameter = declaration(mScanner);
            size_t const offset = roundUp(end, parameter.alignment);
            end = offset + parameter.bytes;
            mKernel.parameters[parameter.name] = {parameter.bytes, offset};
            mKernel.parameterOffsets.push_back(offset);
            mKernel.parameterBytes.push_back(parameter.bytes);
            mScanner.accept(',');
        }
    }

    // Limits of a launch. Those on the number of blocks of a multiprocessor matter to the compiler only.
    void limit(std::string const& directive)
    {
        uint32_t product = 1;
        do
        {
            product *= static_cast<uint32_t>(mScanner.size());
        } while (mScanner.accept(','));
        if (directive == ".maxntid")
        {
            mKernel.maxThreads = product;
        }
        else if (directive != ".minnctapersm" && directive != ".maxnreg")
        {
            mScanner.fail("directive " + directive + " of a kernel is not supported");
        }
    }

    void addShared(Declaration const& variable)
    {
        mKernel.sharedAlignment = std::max(mKernel.sharedAlignment, variable.alignment);
        if (variable.bytes == 0)
        {
            mDynamicShared.push_back(variable.name);
            return;
        }
        size_t const offset = roundUp(mKernel.staticSharedBytes, variable.alignment);
        mKernel.shared[variable.name] = {variable.bytes, offset};
        mKernel.staticSharedBytes = offset + variable.bytes;
    }

    void body()
    {
        while (!mScopes.empty())
        {
            if (mScanner.accept('{'))
            {
                mScopes.emplace_back();
            }
            else if (mScanner.accept('}'))
            {
                mScopes.pop_back();
            }
            else if (mScanner.peek() == '.')
            {
                bodyDirective();
            }
            else
            {
                statement();
            }
        }
    }

    void bodyDirective()
    {
        std::string const directive = mScanner.word();
        if (directive == ".reg")
        {
            registers();
        }
        else if (directive == ".shared")
        {
            addShared(declaration(mScanner));
        }
        else if (directive == ".pragma") // "nounroll", "used_bytes_mask 15"
        {
            mScanner.expect('"');
            mScanner.word("_ ");
            mScanner.expect('"');
        }
        else
        {
            mScanner.fail("directive " + directive + " is not supported");
        }
        mScanner.expect(';');
    }

    void registers()
    {
        static std::map<std::string, Size> const kSIZES = {{".pred", Size::kPREDICATE}, {".b16", Size::k16},
            {".u16", Size::k16}, {".s16", Size::k16}, {".f16", Size::k16}, {".bf16", Size::k16}, {".b32", Size::k32},
            {".u32", Size::k32}, {".s32", Size::k32}, {".f32", Size::k32}, {".f16x2", Size::k32},
            {".bf16x2", Size::k32}, {".b64", Size::k64}, {".u64", Size::k64}, {".s64", Size::k64}};
        std::string const type = mScanner.word();
        auto const size = kSIZES.find(type);
        if (size == kSIZES.end())
        {
            mScanner.fail("registers of type " + type + " are not supported");
        }
        do
        {
            std::string const name = mScanner.word();
            if (mScanner.accept('<'))
            {
                size_t const count = mScanner.size();
                mScanner.expect('>');
                for (size_t i = 0; i < count; ++i)
                {
                    declare(name + std::to_string(i), size->second);
                }
            }
            else
            {
                declare(name, size->second);
            }
        } while (mScanner.accept(','));
    }

    // Registers of inner braces, which inline assembly has, get unique names.
    void declare(std::string const& name, Size size)
    {
        std::string unique = name;
        if (mScopes.size() > 1)
        {
            unique += "@" + std::to_string(mScanner.position());
            mScopes.back()[name] = unique;
        }
        mKernel.registers[unique] = size;
    }

    void resolve(std::string& name) const
    {
        for (auto scope = mScopes.rbegin(); scope != mScopes.rend(); ++scope)
        {
            auto const entry = scope->find(name);
            if (entry != scope->end())
            {
                name = entry->second;
                return;
            }
        }
    }

    void resolve(Operand& operand) const
    {
        resolve(operand.name);
        for (Operand& element : operand.elements)
        {
            resolve(element);
        }
    }

    void statement()
    {
        Statement result;
        mScanner.skip();
        size_t const begin = mScanner.position();
        result.line = mScanner.line();
        if (mScanner.accept('@'))
        {
            result.guardNegated = mScanner.accept('!');
            result.guard = mScanner.word();
            resolve(result.guard);
        }
        result.opcode = mScanner.word();
        if (result.guard.empty() && mScanner.acceptColon())
        {
            mKernel.labels[result.opcode] = mKernel.statements.size();
            return;
        }
        if (mScanner.peek() == ':')
        {
            result.opcode += mScanner.word("_.:"); // modifiers such as .L2::128B
        }
        if (result.opcode.empty() || result.opcode[0] == '.')
        {
            mScanner.fail("expected an instruction");
        }
        while (!mScanner.accept(';'))
        {
            result.operands.push_back(mScanner.operand());
            resolve(result.operands.back());
            if (mScanner.peek() != ';')
            {
                mScanner.expect(',');
            }
        }
        result.text = mScanner.textFrom(begin);
        std::replace(result.text.begin(), result.text.end(), '\t', ' ');
        mKernel.statements.push_back(std::move(result));
    }

    Scanner mScanner;
    Kernel mKernel;
    std::vector<Declaration> mShared; // of the module
    std::vector<std::string> mDynamicShared;
    std::vector<Names> mScopes;
};

} // namespace

std::vector<Kernel> parse(std::string const& text)
{
    return Parser(text).module();
}

} // namespace lfx::ptx
