// cvt.
//
// Source: PTX ISA, "Data Movement and Conversion Instructions: cvt".
#include "float16.h"
#include "lanewise.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lfx::ptx
{
namespace
{

// The source's register may be wider than its type; its low bits count.
template <typename To, typename From, typename Register>
To convertInteger(Register x)
{
    return static_cast<To>(static_cast<From>(x));
}

template <typename To, typename From>
void decodeInteger(Decoder& decoder, Instruction& result)
{
    Size const size = std::max(decoder.sizeOfRegister(decoder.operand(1)), sizeOf<From>());
    auto const decode = size == Size::k64 ? Lanewise<&convertInteger<To, From, uint64_t>>::decode
        : size == Size::k32               ? Lanewise<&convertInteger<To, From, uint32_t>>::decode
                                          : Lanewise<&convertInteger<To, From, uint16_t>>::decode;
    decode(decoder, result);
}

// Rounds to nearest; the host's rounding mode is not changed.
template <typename From>
float toFloat(From x)
{
    return static_cast<float>(x);
}

// Out of range becomes the nearest integer, NaN becomes 0.
template <typename To, float (*kROUND)(float)>
To toInteger(float x)
{
    double const rounded = kROUND(x);
    if (std::isnan(rounded))
    {
        return 0;
    }
    double const low = std::numeric_limits<To>::min();
    double const high = std::numeric_limits<To>::max();
    return static_cast<To>(rounded < low ? low : rounded > high ? high : rounded);
}

float towardZero(float x)
{
    return std::trunc(x);
}

float toNearest(float x)
{
    return std::nearbyint(x);
}

float downward(float x)
{
    return std::floor(x);
}

// The first source goes to the upper half.
template <uint16_t (*kROUND)(float)>
uint32_t packPair(float high, float low)
{
    return static_cast<uint32_t>(kROUND(high)) << 16 | kROUND(low);
}

template <typename From>
void addIntegers(Opcodes& opcodes, std::string const& from)
{
    opcodes["cvt.u16." + from] = decodeInteger<uint16_t, From>;
    opcodes["cvt.s16." + from] = decodeInteger<int16_t, From>;
    opcodes["cvt.u32." + from] = decodeInteger<uint32_t, From>;
    opcodes["cvt.s32." + from] = decodeInteger<int32_t, From>;
    opcodes["cvt.u64." + from] = decodeInteger<uint64_t, From>;
    opcodes["cvt.s64." + from] = decodeInteger<int64_t, From>;
    opcodes["cvt.rn.f32." + from] = lanewise<toFloat<From>>;
}

} // namespace

void addConversions(Opcodes& opcodes)
{
    addIntegers<uint16_t>(opcodes, "u16");
    addIntegers<int16_t>(opcodes, "s16");
    addIntegers<uint32_t>(opcodes, "u32");
    addIntegers<int32_t>(opcodes, "s32");
    addIntegers<uint64_t>(opcodes, "u64");
    addIntegers<int64_t>(opcodes, "s64");
    opcodes["cvt.rzi.s32.f32"] = lanewise<toInteger<int32_t, towardZero>>;
    opcodes["cvt.rzi.u32.f32"] = lanewise<toInteger<uint32_t, towardZero>>;
    opcodes["cvt.rni.s32.f32"] = lanewise<toInteger<int32_t, toNearest>>;
    opcodes["cvt.rmi.s32.f32"] = lanewise<toInteger<int32_t, downward>>;
    opcodes["cvt.rn.f16.f32"] = lanewise<toHalf>;
    opcodes["cvt.rn.bf16.f32"] = lanewise<toBfloat16>;
    opcodes["cvt.rn.f16x2.f32"] = lanewise<packPair<toHalf>>;
    opcodes["cvt.rn.bf16x2.f32"] = lanewise<packPair<toBfloat16>>;
    opcodes["cvt.f32.f16"] = lanewise<fromHalf>;
    opcodes["cvt.f32.bf16"] = lanewise<fromBfloat16>;
}

} // namespace lfx::ptx
