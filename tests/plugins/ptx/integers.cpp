// Arithmetic of integers.
//
// Source: PTX ISA, "Integer Arithmetic Instructions".
#include "lanewise.h"

#include <type_traits>

namespace lfx::ptx
{
namespace
{

// Sums, differences and products wrap around.
template <typename T>
T add(T a, T b)
{
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

template <typename T>
T sub(T a, T b)
{
    return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

template <typename T>
T mulLow(T a, T b)
{
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

template <typename T, typename Wide>
Wide mulWide(T a, T b)
{
    return static_cast<Wide>(a) * static_cast<Wide>(b);
}

template <typename T, typename Wide>
T mulHigh(T a, T b)
{
    return static_cast<T>(mulWide<T, Wide>(a, b) >> 32);
}

template <typename T>
T madLow(T a, T b, T c)
{
    return add(mulLow(a, b), c);
}

template <typename T, typename Wide>
Wide madWide(T a, T b, Wide c)
{
    return add(mulWide<T, Wide>(a, b), c);
}

template <typename T>
T minimum(T a, T b)
{
    return a < b ? a : b;
}

template <typename T>
T maximum(T a, T b)
{
    return a > b ? a : b;
}

template <typename T>
T negate(T a)
{
    return sub(T{0}, a);
}

template <typename T>
T absolute(T a)
{
    return a < 0 ? negate(a) : a;
}

// Division by zero leaves the result undefined.
template <typename T, bool kREMAINDER>
void divideIntegers(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    auto const target = instruction.operands[0];
    auto const a = instruction.operands[1];
    auto const b = instruction.operands[2];
    Registers& registers = lanes.registers;
    uint32_t defined = registers.defined<T>(a) & registers.defined<T>(b);
    forEachLane(executing, [&](int lane) {
        T const dividend = registers.get<T>(a, lane);
        T const divisor = registers.get<T>(b, lane);
        bool const overflows = std::is_signed_v<T> && divisor == static_cast<T>(-1);
        if (divisor == 0)
        {
            defined &= ~(1U << lane);
        }
        else if (overflows)
        {
            registers.set<T>(target, lane, kREMAINDER ? T{0} : negate(dividend));
        }
        else
        {
            registers.set<T>(target, lane, kREMAINDER ? dividend % divisor : dividend / divisor);
        }
    });
    mergeDefined(registers.defined<T>(target), executing, defined);
}

template <typename T, bool kREMAINDER>
void decodeDivision(Decoder& decoder, Instruction& result)
{
    Lanewise<&add<T>>::decode(decoder, result);
    result.execute = divideIntegers<T, kREMAINDER>;
}

template <typename T>
void addInteger(Opcodes& opcodes, std::string const& type)
{
    opcodes["add." + type] = lanewise<add<T>>;
    opcodes["sub." + type] = lanewise<sub<T>>;
    opcodes["mul.lo." + type] = lanewise<mulLow<T>>;
    opcodes["mad.lo." + type] = lanewise<madLow<T>>;
    opcodes["min." + type] = lanewise<minimum<T>>;
    opcodes["max." + type] = lanewise<maximum<T>>;
    opcodes["div." + type] = decodeDivision<T, false>;
    opcodes["rem." + type] = decodeDivision<T, true>;
    if constexpr (std::is_signed_v<T>)
    {
        opcodes["neg." + type] = lanewise<negate<T>>;
        opcodes["abs." + type] = lanewise<absolute<T>>;
    }
}

void addWideProducts(Opcodes& opcodes)
{
    opcodes["mul.wide.s32"] = lanewise<mulWide<int32_t, int64_t>>;
    opcodes["mul.wide.u32"] = lanewise<mulWide<uint32_t, uint64_t>>;
    opcodes["mul.wide.s16"] = lanewise<mulWide<int16_t, int32_t>>;
    opcodes["mul.wide.u16"] = lanewise<mulWide<uint16_t, uint32_t>>;
    opcodes["mul.hi.s32"] = lanewise<mulHigh<int32_t, int64_t>>;
    opcodes["mul.hi.u32"] = lanewise<mulHigh<uint32_t, uint64_t>>;
    opcodes["mad.wide.s32"] = lanewise<madWide<int32_t, int64_t>>;
    opcodes["mad.wide.u32"] = lanewise<madWide<uint32_t, uint64_t>>;
}

} // namespace

void addIntegers(Opcodes& opcodes)
{
    addInteger<int16_t>(opcodes, "s16");
    addInteger<uint16_t>(opcodes, "u16");
    addInteger<int32_t>(opcodes, "s32");
    addInteger<uint32_t>(opcodes, "u32");
    addInteger<int64_t>(opcodes, "s64");
    addInteger<uint64_t>(opcodes, "u64");
    addWideProducts(opcodes);
}

} // namespace lfx::ptx
