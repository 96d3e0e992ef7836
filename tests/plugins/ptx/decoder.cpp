#include "address.h"

namespace lfx::ptx
{

Opcodes const& opcodes()
{
    static Opcodes const table = [] {
        Opcodes result;
        for (auto const add : {addIntegers, addLogic, addFloats, addSelections, addConversions, addMoves, addTransfers,
                 addCopies, addControl, addExchanges, addTensorCores})
        {
            add(result);
        }
        return result;
    }();
    return table;
}

void requireDefined(uint32_t defined, uint32_t executing, char const* what)
{
    if ((executing & ~defined) != 0)
    {
        throw Fault(std::string("an undefined register is used as ") + what, __builtin_ctz(executing & ~defined));
    }
}

Decoder::Decoder(Code& code)
    : mCode(code)
{
    for (auto const& [name, size] : code.kernel.registers)
    {
        size_t& count = size == Size::k64 ? code.longs : size == Size::kPREDICATE ? code.predicates : code.words;
        mIndex[name] = static_cast<uint32_t>(count++);
    }
    for (char const* const name : {"%tid", "%ntid", "%ctaid", "%nctaid"})
    {
        for (char const* const axis : {".x", ".y", ".z"})
        {
            mCode.specialRegisters[std::string(name) + axis] = static_cast<uint32_t>(mCode.words++);
        }
    }
    mCode.specialRegisters["%laneid"] = static_cast<uint32_t>(mCode.words++);
}

void Decoder::decode(Statement const& statement, Instruction& result)
{
    mStatement = &statement;
    result.statement = &statement;
    auto const entry = opcodes().find(statement.opcode);
    if (entry == opcodes().end())
    {
        fail("the interpreter does not know the opcode " + statement.opcode);
    }
    if (!statement.guard.empty())
    {
        Operand guard;
        guard.name = statement.guard;
        result.guard = static_cast<int32_t>(destination(guard, Size::kPREDICATE));
        result.guardNegated = statement.guardNegated;
    }
    entry->second(*this, result);
}

void Decoder::fail(std::string const& reason) const
{
    throw Error(
        mCode.kernel.name + ", PTX line " + std::to_string(mStatement->line) + ": " + reason + ": " + mStatement->text);
}

void Decoder::failOperand(Operand const& operand) const
{
    fail("operand " + (operand.name.empty() ? "without a name" : operand.name) + " is not one that the opcode takes");
}

Operand const& Decoder::operand(size_t i) const
{
    if (i >= mStatement->operands.size())
    {
        fail("too few operands");
    }
    return mStatement->operands[i];
}

size_t Decoder::operandCount() const
{
    return mStatement->operands.size();
}

void Decoder::expectOperands(size_t count) const
{
    if (mStatement->operands.size() != count)
    {
        fail("expected " + std::to_string(count) + " operands");
    }
}

Size Decoder::sizeOfRegister(Operand const& operand) const
{
    auto const declared = mCode.kernel.registers.find(operand.name);
    if (operand.kind != Operand::Kind::kNAME || operand.negated || declared == mCode.kernel.registers.end())
    {
        failOperand(operand);
    }
    return declared->second;
}

uint32_t Decoder::destination(Operand const& operand, Size size) const
{
    if (sizeOfRegister(operand) != size)
    {
        failOperand(operand);
    }
    return mIndex.at(operand.name);
}

uint64_t Decoder::immediate(Operand const& operand) const
{
    if (operand.kind != Operand::Kind::kINTEGER && operand.kind != Operand::Kind::kFLOAT)
    {
        failOperand(operand);
    }
    return operand.value;
}

uint32_t Decoder::source(Operand const& operand, Size size)
{
    if (operand.kind == Operand::Kind::kINTEGER || (operand.kind == Operand::Kind::kFLOAT && size == Size::k32))
    {
        return constant(size, operand.value);
    }
    if (operand.kind != Operand::Kind::kNAME)
    {
        failOperand(operand);
    }
    auto const special = mCode.specialRegisters.find(operand.name);
    if (special != mCode.specialRegisters.end() && size == Size::k32)
    {
        return special->second;
    }
    if (Variable const* const variable = sharedVariable(operand.name);
        variable != nullptr && (size == Size::k32 || size == Size::k64))
    {
        return constant(size, sharedAddress(*variable));
    }
    if (Variable const* const variable = parameter(operand.name); variable != nullptr && size == Size::k64)
    {
        return constant(size, kPARAMETER_WINDOW + variable->offset);
    }
    return destination(operand, size);
}

uint32_t Decoder::constant(Size size, uint64_t value)
{
    value = size == Size::k64 ? value : size == Size::k32 ? value & 0xffffffffU : value & 0xffffU;
    auto const [entry, isNew] = mConstants.try_emplace({size, value}, 0);
    if (!isNew)
    {
        return entry->second;
    }
    if (size == Size::k64)
    {
        entry->second = static_cast<uint32_t>(mCode.longs++);
        mCode.longConstants.emplace_back(entry->second, value);
    }
    else if (size == Size::kPREDICATE)
    {
        entry->second = static_cast<uint32_t>(mCode.predicates++);
        mCode.predicateConstants.emplace_back(entry->second, value != 0);
    }
    else
    {
        entry->second = static_cast<uint32_t>(mCode.words++);
        mCode.wordConstants.emplace_back(entry->second, static_cast<uint32_t>(value));
    }
    return entry->second;
}

uint32_t Decoder::address(Operand const& operand, Instruction& result, Size& size)
{
    if (operand.kind != Operand::Kind::kADDRESS)
    {
        failOperand(operand);
    }
    result.offset = static_cast<int64_t>(operand.value);
    if (Variable const* const variable = sharedVariable(operand.name))
    {
        size = Size::k32;
        return constant(size, sharedAddress(*variable));
    }
    if (Variable const* const variable = parameter(operand.name))
    {
        size = Size::k64;
        return constant(size, kPARAMETER_WINDOW + variable->offset);
    }
    Operand base;
    base.name = operand.name;
    size = sizeOfRegister(base);
    if (size != Size::k32 && size != Size::k64)
    {
        failOperand(operand);
    }
    return destination(base, size);
}

std::vector<Operand> Decoder::elements(Operand const& operand, size_t count) const
{
    if (count == 1 && operand.kind != Operand::Kind::kVECTOR)
    {
        return {operand};
    }
    if (operand.kind != Operand::Kind::kVECTOR || operand.elements.size() != count)
    {
        fail("expected a vector of " + std::to_string(count));
    }
    return operand.elements;
}

Variable const* Decoder::sharedVariable(std::string const& name) const
{
    auto const entry = mCode.kernel.shared.find(name);
    return entry == mCode.kernel.shared.end() ? nullptr : &entry->second;
}

Variable const* Decoder::parameter(std::string const& name) const
{
    auto const entry = mCode.kernel.parameters.find(name);
    return entry == mCode.kernel.parameters.end() ? nullptr : &entry->second;
}

uint32_t Decoder::sharedAddress(Variable const& variable) const
{
    return SharedMemory::begin(mCode.kernel.sharedAlignment) + static_cast<uint32_t>(variable.offset);
}

} // namespace lfx::ptx
