// Decoded instructions, the registers of a warp that they work on, and the decoder that opcodes share.
#pragma once

#include "memory.h"
#include "program.h"

#include <array>
#include <cstring>
#include <functional>
#include <type_traits>
#include <unordered_map>

namespace lfx::ptx
{

constexpr int kLANES = 32;
constexpr uint32_t kALL_LANES = 0xffffffffU;

template <typename T>
constexpr Size sizeOf()
{
    return std::is_same_v<T, bool> ? Size::kPREDICATE
        : sizeof(T) == 2           ? Size::k16
        : sizeof(T) == 4           ? Size::k32
                                   : Size::k64;
}

// The registers of 32 lanes. A lane's register is undefined until it is written; results computed from undefined
// registers are undefined too.
struct Registers
{
    std::vector<std::array<uint32_t, kLANES>> words; // of 16 and 32 bits
    std::vector<std::array<uint64_t, kLANES>> longs;
    std::vector<uint32_t> predicates; // a bit for each lane
    std::vector<uint32_t> wordsDefined;
    std::vector<uint32_t> longsDefined;
    std::vector<uint32_t> predicatesDefined;

    template <typename T>
    T get(uint32_t index, int lane) const
    {
        if constexpr (std::is_same_v<T, bool>)
        {
            return (predicates[index] >> lane & 1U) != 0;
        }
        else
        {
            T value;
            void const* const from
                = sizeof(T) == 8 ? static_cast<void const*>(&longs[index][lane]) : &words[index][lane];
            std::memcpy(&value, from, sizeof(T));
            return value;
        }
    }

    template <typename T>
    void set(uint32_t index, int lane, T value)
    {
        if constexpr (std::is_same_v<T, bool>)
        {
            predicates[index] = (predicates[index] & ~(1U << lane)) | static_cast<uint32_t>(value) << lane;
        }
        else if constexpr (sizeof(T) == 8)
        {
            std::memcpy(&longs[index][lane], &value, 8);
        }
        else
        {
            words[index][lane] = 0;
            std::memcpy(&words[index][lane], &value, sizeof(T));
        }
    }

    // Sets some of the lanes.
    void store(uint32_t index, std::array<bool, kLANES> const& values, uint32_t lanes);
    void store(uint32_t index, std::array<uint16_t, kLANES> const& values, uint32_t lanes);
    void store(uint32_t index, std::array<uint32_t, kLANES> const& values, uint32_t lanes);
    void store(uint32_t index, std::array<uint64_t, kLANES> const& values, uint32_t lanes);

    // The lanes in which a register is defined.
    uint32_t& defined(Size size, uint32_t index)
    {
        return size == Size::k64       ? longsDefined[index]
            : size == Size::kPREDICATE ? predicatesDefined[index]
                                       : wordsDefined[index];
    }

    template <typename T>
    uint32_t& defined(uint32_t index)
    {
        return defined(sizeOf<T>(), index);
    }
};

class Block;

// The threads of a warp, as an instruction sees them.
struct Lanes
{
    Block& block;
    uint32_t index; // of the warp in its block
    uint32_t epoch = 1;
    Registers registers;
    std::array<Copies, kLANES> copies;
};

// What happens after an instruction.
enum class Flow : uint8_t
{
    kNEXT,
    kBRANCH,
    kEXIT,
    kCONVERGE, // the lanes that `members` names execute it together
    kWARP_BARRIER,
    kBLOCK_BARRIER,
};

enum class Space : uint8_t
{
    kGENERIC,
    kGLOBAL,
    kSHARED,
    kPARAMETER,
};

// What a load or store moves: `count` elements, each to or from a register, whose size may be larger.
struct Transfer
{
    Space space;
    uint32_t elementBytes;
    bool isSigned;
    Size size;
    uint32_t count;
};

struct Instruction;
using Execute = void (*)(Instruction const&, Lanes&, uint32_t executing);

struct Instruction
{
    Execute execute = nullptr;
    Flow flow = Flow::kNEXT;
    bool guardNegated = false;
    int32_t guard = -1;   // predicate register
    int32_t members = -1; // word register with a mask of lanes
    uint32_t target = 0;  // of a branch
    uint32_t count = 0;   // elements of a vector
    int64_t offset = 0;   // of an address
    Transfer transfer{};
    std::array<uint32_t, 16> operands{};
    Statement const* statement = nullptr;
};

// A kernel, ready to run.
struct Code
{
    Kernel kernel;
    std::vector<Instruction> instructions;
    size_t words = 0; // number of registers
    size_t longs = 0;
    size_t predicates = 0;
    // Registers that hold the same in every block.
    std::vector<std::pair<uint32_t, uint32_t>> wordConstants; // register, value
    std::vector<std::pair<uint32_t, uint64_t>> longConstants;
    std::vector<std::pair<uint32_t, bool>> predicateConstants;
    std::map<std::string, uint32_t> specialRegisters; // %tid.x and so on -> word register
};

// Resolves the operands of one instruction. An operand with a wrong size is an error.
class Decoder
{
public:
    explicit Decoder(Code& code);

    void decode(Statement const& statement, Instruction& result);

    Operand const& operand(size_t i) const;
    size_t operandCount() const;
    void expectOperands(size_t count) const;
    [[noreturn]] void fail(std::string const& reason) const;
    [[noreturn]] void failOperand(Operand const& operand) const;
    Size sizeOfRegister(Operand const& operand) const;

    uint32_t destination(Operand const& operand, Size size) const; // a register that is written
    uint32_t source(Operand const& operand, Size size);            // a register, or one that holds the constant
    uint32_t constant(Size size, uint64_t value);
    uint64_t immediate(Operand const& operand) const;
    // The register of an address, 32 or 64 bits wide; stores its offset.
    uint32_t address(Operand const& operand, Instruction& result, Size& size);
    // Elements of {a, b}, or the operand itself.
    std::vector<Operand> elements(Operand const& operand, size_t count) const;
    Variable const* sharedVariable(std::string const& name) const;
    Variable const* parameter(std::string const& name) const;
    uint32_t sharedAddress(Variable const& variable) const;
    Code const& code() const
    {
        return mCode;
    }

private:
    Code& mCode;
    Statement const* mStatement = nullptr;
    std::map<std::string, uint32_t> mIndex; // of a register in the file of its size
    std::map<std::pair<Size, uint64_t>, uint32_t> mConstants;
};

using Decode = std::function<void(Decoder&, Instruction&)>;
using Opcodes = std::unordered_map<std::string, Decode>;

// The opcodes, with all their modifiers. An opcode that is not here is refused.
Opcodes const& opcodes();
void addIntegers(Opcodes& opcodes);
void addLogic(Opcodes& opcodes);
void addFloats(Opcodes& opcodes);
void addSelections(Opcodes& opcodes);
void addConversions(Opcodes& opcodes);
void addMoves(Opcodes& opcodes);
void addTransfers(Opcodes& opcodes);
void addCopies(Opcodes& opcodes);
void addControl(Opcodes& opcodes);
void addExchanges(Opcodes& opcodes);
void addTensorCores(Opcodes& opcodes);

// Calls f(lane) for each lane of a mask.
template <typename Function>
void forEachLane(uint32_t lanes, Function function)
{
    for (; lanes != 0; lanes &= lanes - 1)
    {
        function(__builtin_ctz(lanes));
    }
}

// Sets which lanes of a result are defined.
inline void mergeDefined(uint32_t& target, uint32_t executing, uint32_t defined)
{
    target = (target & ~executing) | (defined & executing);
}

// The lanes must be defined.
void requireDefined(uint32_t defined, uint32_t executing, char const* what);

} // namespace lfx::ptx
