// Comparisons and selections.
//
// Source: PTX ISA, "Comparison and Selection Instructions".
#include "lanewise.h"

#include <cmath>

namespace lfx::ptx
{
namespace
{

template <typename T>
bool equal(T a, T b)
{
    return a == b;
}

template <typename T>
bool less(T a, T b)
{
    return a < b;
}

template <typename T>
bool lessOrEqual(T a, T b)
{
    return a <= b;
}

template <typename T>
bool greater(T a, T b)
{
    return a > b;
}

template <typename T>
bool greaterOrEqual(T a, T b)
{
    return a >= b;
}

// Not equal, and with floats neither is NaN.
template <typename T>
bool different(T a, T b)
{
    return a < b || a > b;
}

// The unordered comparisons are true with NaN.
template <bool (*kOPPOSITE)(float, float)>
bool unordered(float a, float b)
{
    return !kOPPOSITE(a, b);
}

bool equalOrNan(float a, float b)
{
    return !different(a, b);
}

bool isNumber(float a, float b)
{
    return !std::isnan(a) && !std::isnan(b);
}

bool isNan(float a, float b)
{
    return !isNumber(a, b);
}

// Whether a lane is defined depends on the chosen source only.
template <typename T>
void select(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    auto const& operands = instruction.operands;
    Registers& registers = lanes.registers;
    uint32_t const choice = registers.predicates[operands[3]];
    uint32_t const defined = registers.predicatesDefined[operands[3]]
        & ((registers.defined<T>(operands[1]) & choice) | (registers.defined<T>(operands[2]) & ~choice));
    forEachLane(executing, [&](int lane) {
        uint32_t const source = (choice >> lane & 1U) != 0 ? operands[1] : operands[2];
        registers.set<T>(operands[0], lane, registers.get<T>(source, lane));
    });
    mergeDefined(registers.defined<T>(operands[0]), executing, defined);
}

template <typename T>
T chooseFirst(T a, T, bool)
{
    return a;
}

template <typename T>
void decodeSelect(Decoder& decoder, Instruction& result)
{
    Lanewise<&chooseFirst<T>>::decode(decoder, result);
    result.execute = select<T>;
}

template <typename T>
void addComparisons(Opcodes& opcodes, std::string const& type)
{
    opcodes["setp.eq." + type] = lanewise<equal<T>>;
    opcodes["setp.ne." + type] = lanewise<different<T>>;
    opcodes["setp.lt." + type] = lanewise<less<T>>;
    opcodes["setp.le." + type] = lanewise<lessOrEqual<T>>;
    opcodes["setp.gt." + type] = lanewise<greater<T>>;
    opcodes["setp.ge." + type] = lanewise<greaterOrEqual<T>>;
}

template <typename T>
void addEquality(Opcodes& opcodes, std::string const& type)
{
    opcodes["setp.eq." + type] = lanewise<equal<T>>;
    opcodes["setp.ne." + type] = lanewise<different<T>>;
}

void addFloatComparisons(Opcodes& opcodes)
{
    addComparisons<float>(opcodes, "f32");
    opcodes["setp.equ.f32"] = lanewise<equalOrNan>;
    opcodes["setp.neu.f32"] = lanewise<unordered<equal<float>>>;
    opcodes["setp.ltu.f32"] = lanewise<unordered<greaterOrEqual<float>>>;
    opcodes["setp.leu.f32"] = lanewise<unordered<greater<float>>>;
    opcodes["setp.gtu.f32"] = lanewise<unordered<lessOrEqual<float>>>;
    opcodes["setp.geu.f32"] = lanewise<unordered<less<float>>>;
    opcodes["setp.num.f32"] = lanewise<isNumber>;
    opcodes["setp.nan.f32"] = lanewise<isNan>;
}

} // namespace

void addSelections(Opcodes& opcodes)
{
    addComparisons<int16_t>(opcodes, "s16");
    addComparisons<uint16_t>(opcodes, "u16");
    addComparisons<int32_t>(opcodes, "s32");
    addComparisons<uint32_t>(opcodes, "u32");
    addComparisons<int64_t>(opcodes, "s64");
    addComparisons<uint64_t>(opcodes, "u64");
    addEquality<uint16_t>(opcodes, "b16");
    addEquality<uint32_t>(opcodes, "b32");
    addEquality<uint64_t>(opcodes, "b64");
    for (char const* const type : {"b16", "u16", "s16"})
    {
        opcodes[std::string("selp.") + type] = decodeSelect<uint16_t>;
    }
    for (char const* const type : {"b32", "u32", "s32", "f32"})
    {
        opcodes[std::string("selp.") + type] = decodeSelect<uint32_t>;
    }
    for (char const* const type : {"b64", "u64", "s64"})
    {
        opcodes[std::string("selp.") + type] = decodeSelect<uint64_t>;
    }
    addFloatComparisons(opcodes);
}

} // namespace lfx::ptx
