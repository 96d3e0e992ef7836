// float16 and bfloat16, converted without the compiler's help.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lfx::ptx
{

inline uint32_t bitsOf(float x)
{
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline float floatOf(uint32_t bits)
{
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

// A shift to the right that rounds to nearest, ties to even.
inline uint32_t shiftRounded(uint32_t value, int shift)
{
    uint32_t const half = 1U << (shift - 1);
    uint32_t const rest = value & ((1U << shift) - 1);
    uint32_t const result = value >> shift;
    return result + (rest > half || (rest == half && (result & 1U) != 0) ? 1 : 0);
}

// To nearest, ties to even; too large becomes infinity, any NaN becomes 0x7fff.
inline uint16_t toHalf(float x)
{
    uint32_t const bits = bitsOf(x);
    uint32_t const sign = bits >> 16 & 0x8000U;
    uint32_t const magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U)
    {
        return 0x7fff;
    }
    if (magnitude >= 0x47800000U) // 65536
    {
        return static_cast<uint16_t>(sign | 0x7c00U);
    }
    if (magnitude >= 0x38800000U) // 2^-14, the smallest normal one; a carry out of the mantissa is right
    {
        return static_cast<uint16_t>(sign | shiftRounded(magnitude - 0x38000000U, 13));
    }
    int const exponent = static_cast<int>(magnitude >> 23);
    if (exponent < 102) // below 2^-25, half of the smallest subnormal one
    {
        return static_cast<uint16_t>(sign);
    }
    uint32_t const mantissa = (magnitude & 0x7fffffU) | 0x800000U;
    return static_cast<uint16_t>(sign | shiftRounded(mantissa, 126 - exponent));
}

inline float fromHalf(uint16_t half)
{
    uint32_t const sign = static_cast<uint32_t>(half & 0x8000U) << 16;
    uint32_t const exponent = half >> 10 & 0x1fU;
    uint32_t const mantissa = half & 0x3ffU;
    if (exponent == 0)
    {
        float const magnitude = std::ldexp(static_cast<float>(mantissa), -24);
        return sign != 0 ? -magnitude : magnitude;
    }
    uint32_t const wide = exponent == 31 ? 255 : exponent + 112;
    return floatOf(sign | wide << 23 | mantissa << 13);
}

inline uint16_t toBfloat16(float x)
{
    uint32_t const bits = bitsOf(x);
    return (bits & 0x7fffffffU) > 0x7f800000U ? 0x7fff : static_cast<uint16_t>(shiftRounded(bits, 16));
}

inline float fromBfloat16(uint16_t x)
{
    return floatOf(static_cast<uint32_t>(x) << 16);
}

} // namespace lfx::ptx
