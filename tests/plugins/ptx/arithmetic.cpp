// Arithmetic, logic and comparisons of integers, floats and predicates.
//
// Source: PTX ISA, "Integer Arithmetic", "Floating Point", "Comparison and Selection", "Logic and Shift Instructions".
#include "lanewise.h"

#include <cmath>
#include <limits>

namespace lfx::ptx
{
namespace
{

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

// Integers wrap around.
template <typename T>
T add(T a, T b)
{
    if constexpr (std::is_integral_v<T>)
    {
        return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
    }
    else
    {
        return a + b;
    }
}

template <typename T>
T sub(T a, T b)
{
    if constexpr (std::is_integral_v<T>)
    {
        return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
    }
    else
    {
        return a - b;
    }
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

float negateFloat(float a)
{
    return -a;
}

float absoluteFloat(float a)
{
    return std::fabs(a);
}

// A NaN is returned only if both are; +0 is above -0.
float minimumFloat(float a, float b)
{
    if (a == 0.0F && b == 0.0F)
    {
        return std::signbit(a) ? a : b;
    }
    return std::fmin(a, b);
}

float maximumFloat(float a, float b)
{
    if (a == 0.0F && b == 0.0F)
    {
        return std::signbit(a) ? b : a;
    }
    return std::fmax(a, b);
}

float multiply(float a, float b)
{
    return a * b;
}

float divide(float a, float b)
{
    return a / b;
}

float fusedMultiplyAdd(float a, float b, float c)
{
    return std::fma(a, b, c);
}

float reciprocal(float a)
{
    return 1.0F / a;
}

float squareRoot(float a)
{
    return std::sqrt(a);
}

// .ftz: subnormal sources and results become zeros of the same sign.
float flushed(float x)
{
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0F, x) : x;
}

template <float (*kFUNCTION)(float)>
float flush(float a)
{
    return flushed(kFUNCTION(flushed(a)));
}

template <float (*kFUNCTION)(float, float)>
float flush2(float a, float b)
{
    return flushed(kFUNCTION(flushed(a), flushed(b)));
}

template <float (*kFUNCTION)(float, float, float)>
float flush3(float a, float b, float c)
{
    return flushed(kFUNCTION(flushed(a), flushed(b), flushed(c)));
}

// Rounded once from float64, which is well within the documented error.
float exp2Approximate(float a)
{
    return static_cast<float>(std::exp2(static_cast<double>(a)));
}

float log2Approximate(float a)
{
    return static_cast<float>(std::log2(static_cast<double>(a)));
}

template <typename T>
T bitAnd(T a, T b)
{
    return a & b;
}

template <typename T>
T bitOr(T a, T b)
{
    return a | b;
}

template <typename T>
T bitXor(T a, T b)
{
    return a ^ b;
}

template <typename T>
T bitNot(T a)
{
    return static_cast<T>(~a);
}

bool notPredicate(bool a)
{
    return !a;
}

// Amounts beyond the width shift everything out.
template <typename T>
T shiftLeft(T a, uint32_t amount)
{
    return amount >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << amount);
}

template <typename T>
T shiftRight(T a, uint32_t amount)
{
    uint32_t const last = 8 * sizeof(T) - 1;
    if (std::is_unsigned_v<T> && amount > last)
    {
        return T{0};
    }
    return static_cast<T>(a >> (amount > last ? last : amount));
}

uint32_t funnel(uint32_t low, uint32_t high, uint32_t amount, bool left)
{
    uint64_t const both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<uint32_t>(left ? both << amount >> 32 : both >> amount);
}

template <bool kLEFT, bool kWRAP>
uint32_t funnelShift(uint32_t low, uint32_t high, uint32_t amount)
{
    return funnel(low, high, kWRAP ? amount & 31U : minimum(amount, 32U), kLEFT);
}

template <typename T>
T bitFieldInsert(T a, T b, uint32_t position, uint32_t length)
{
    uint32_t const width = 8 * sizeof(T);
    uint32_t const begin = position & 0xffU;
    uint32_t const count = length & 0xffU;
    if (begin >= width || count == 0)
    {
        return b;
    }
    T const ones = count >= width ? ~T{0} : static_cast<T>((T{1} << count) - 1);
    T const mask = static_cast<T>(ones << begin);
    return (b & ~mask) | (static_cast<T>(a << begin) & mask);
}

template <typename T>
uint32_t populationCount(T a)
{
    return static_cast<uint32_t>(__builtin_popcountll(a));
}

uint32_t countLeadingZeros(uint32_t a)
{
    return a == 0 ? 32 : static_cast<uint32_t>(__builtin_clz(a));
}

uint32_t reverseBits(uint32_t a)
{
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i)
    {
        result |= (a >> i & 1U) << (31 - i);
    }
    return result;
}

uint32_t bitFieldExtract(uint32_t a, uint32_t position, uint32_t length)
{
    uint32_t const count = length & 0xffU;
    uint32_t const shifted = shiftRight(a, position & 0xffU);
    return count >= 32 ? shifted : shifted & ((1U << count) - 1);
}

uint32_t permuteBytes(uint32_t a, uint32_t b, uint32_t selector)
{
    uint64_t const bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
    {
        uint32_t const choice = selector >> (4 * i) & 0xfU;
        uint32_t const byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7U))) & 0xffU;
        bool const replicatesSign = choice >= 8;
        result |= (replicatesSign ? (byte & 0x80U) != 0 ? 0xffU : 0U : byte) << (8 * i);
    }
    return result;
}

uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table)
{
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i)
    {
        if ((table >> i & 1U) != 0)
        {
            result |= ((i & 4) != 0 ? a : ~a) & ((i & 2) != 0 ? b : ~b) & ((i & 1) != 0 ? c : ~c);
        }
    }
    return result;
}

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

// Division by zero leaves the result undefined.
template <typename T, bool kREMAINDER>
void divideIntegers(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    auto const [target, a, b] = std::tuple(instruction.operands[0], instruction.operands[1], instruction.operands[2]);
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
    Lanewise<&bitAnd<T>>::decode(decoder, result);
    result.execute = divideIntegers<T, kREMAINDER>;
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
    opcodes["shr." + type] = lanewise<shiftRight<T>>;
    if constexpr (std::is_signed_v<T>)
    {
        opcodes["neg." + type] = lanewise<negate<T>>;
        opcodes["abs." + type] = lanewise<absolute<T>>;
    }
}

template <typename T>
void addBits(Opcodes& opcodes, std::string const& type)
{
    opcodes["and." + type] = lanewise<bitAnd<T>>;
    opcodes["or." + type] = lanewise<bitOr<T>>;
    opcodes["xor." + type] = lanewise<bitXor<T>>;
    if constexpr (!std::is_same_v<T, bool>)
    {
        opcodes["not." + type] = lanewise<bitNot<T>>;
        opcodes["shl." + type] = lanewise<shiftLeft<T>>;
        opcodes["shr." + type] = lanewise<shiftRight<T>>;
    }
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

void addBitFields(Opcodes& opcodes)
{
    opcodes["not.pred"] = lanewise<notPredicate>;
    opcodes["shf.l.wrap.b32"] = lanewise<funnelShift<true, true>>;
    opcodes["shf.l.clamp.b32"] = lanewise<funnelShift<true, false>>;
    opcodes["shf.r.wrap.b32"] = lanewise<funnelShift<false, true>>;
    opcodes["shf.r.clamp.b32"] = lanewise<funnelShift<false, false>>;
    opcodes["bfi.b32"] = lanewise<bitFieldInsert<uint32_t>>;
    opcodes["bfi.b64"] = lanewise<bitFieldInsert<uint64_t>>;
    opcodes["bfe.u32"] = lanewise<bitFieldExtract>;
    opcodes["popc.b32"] = lanewise<populationCount<uint32_t>>;
    opcodes["popc.b64"] = lanewise<populationCount<uint64_t>>;
    opcodes["clz.b32"] = lanewise<countLeadingZeros>;
    opcodes["brev.b32"] = lanewise<reverseBits>;
    opcodes["prmt.b32"] = lanewise<permuteBytes>;
    opcodes["lop3.b32"] = lanewise<logic3>;
}

void addFloat(Opcodes& opcodes)
{
    for (char const* const rounding : {"", ".rn"})
    {
        opcodes[std::string("add") + rounding + ".f32"] = lanewise<add<float>>;
        opcodes[std::string("sub") + rounding + ".f32"] = lanewise<sub<float>>;
        opcodes[std::string("mul") + rounding + ".f32"] = lanewise<multiply>;
        opcodes[std::string("add") + rounding + ".ftz.f32"] = lanewise<flush2<add<float>>>;
        opcodes[std::string("sub") + rounding + ".ftz.f32"] = lanewise<flush2<sub<float>>>;
        opcodes[std::string("mul") + rounding + ".ftz.f32"] = lanewise<flush2<multiply>>;
    }
    opcodes["fma.rn.f32"] = lanewise<fusedMultiplyAdd>;
    opcodes["fma.rn.ftz.f32"] = lanewise<flush3<fusedMultiplyAdd>>;
    opcodes["div.rn.f32"] = lanewise<divide>;
    opcodes["rcp.rn.f32"] = lanewise<reciprocal>;
    opcodes["rcp.approx.ftz.f32"] = lanewise<flush<reciprocal>>;
    opcodes["sqrt.rn.f32"] = lanewise<squareRoot>;
    opcodes["neg.f32"] = lanewise<negateFloat>;
    opcodes["abs.f32"] = lanewise<absoluteFloat>;
    opcodes["min.f32"] = lanewise<minimumFloat>;
    opcodes["max.f32"] = lanewise<maximumFloat>;
    opcodes["ex2.approx.f32"] = lanewise<exp2Approximate>;
    opcodes["ex2.approx.ftz.f32"] = lanewise<flush<exp2Approximate>>;
    opcodes["lg2.approx.f32"] = lanewise<log2Approximate>;
    opcodes["lg2.approx.ftz.f32"] = lanewise<flush<log2Approximate>>;
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

void addArithmetic(Opcodes& opcodes)
{
    addInteger<int16_t>(opcodes, "s16");
    addInteger<uint16_t>(opcodes, "u16");
    addInteger<int32_t>(opcodes, "s32");
    addInteger<uint32_t>(opcodes, "u32");
    addInteger<int64_t>(opcodes, "s64");
    addInteger<uint64_t>(opcodes, "u64");
    addWideProducts(opcodes);
    addBits<bool>(opcodes, "pred");
    addBits<uint16_t>(opcodes, "b16");
    addBits<uint32_t>(opcodes, "b32");
    addBits<uint64_t>(opcodes, "b64");
    addBitFields(opcodes);
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
    addFloat(opcodes);
}

} // namespace lfx::ptx
