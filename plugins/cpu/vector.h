// Vectors of float32, as wide as the instruction set's. The file that includes it defines
//
//   LFX_CPU_SET      the namespace of the instruction set
//   LFX_CPU_LANES    number of floats in a vector
//   LFX_CPU_VECTORS  vectors of queries that a block of products holds in registers: 1, 2 or 4
//
// Only functions of that namespace may be called from here on, and always-inlined ones: the linker keeps one copy of an
// inline function, and it may be that of another instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#define LFX_INLINE inline __attribute__((always_inline))

#ifdef __clang__
#define LFX_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LFX_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lfx::cpu::LFX_CPU_SET
{

constexpr int32_t kLANES = LFX_CPU_LANES;
constexpr int32_t kVECTORS = LFX_CPU_VECTORS;

using Vector = float __attribute__((vector_size(kLANES * sizeof(float))));
using Integers = int32_t __attribute__((vector_size(kLANES * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kLANES * sizeof(float))));

constexpr float kLOG2E = 1.4426950408889634F;
constexpr float kLN2 = 0.69314718055994531F;
constexpr float kNEG_INF = -__builtin_inff(); // the score of a masked key

LFX_INLINE Vector load(float const* from)
{
    Vector x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
}

LFX_INLINE void store(float* to, Vector x)
{
    __builtin_memcpy(to, &x, sizeof(x));
}

LFX_INLINE Vector broadcast(float x)
{
    return x - Vector{}; // x + 0 would change -0
}

// The larger one; b where either is NaN.
LFX_INLINE Vector max(Vector a, Vector b)
{
    return a > b ? a : b;
}

// 0, 1, 2, ...
LFX_INLINE Integers laneIndices()
{
    Integers lanes;
    for (int32_t i = 0; i < kLANES; ++i)
    {
        lanes[i] = i;
    }
    return lanes;
}

// The same bits as another type.
template <typename To, typename From>
LFX_INLINE To bitCast(From const& from)
{
    To to;
    static_assert(sizeof(to) == sizeof(from), "the types have one size");
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

// 2^x for x of at most 127, with a relative error of at most 2^-22. Results below 2^-126 are 0; NaN stays NaN.
//
// x = n + f with a whole number n and |f| <= 1/2. The polynomial approximates 2^f with a relative error of 1.6e-8 (minimax,
// with its coefficients rounded to float32); the rest of the error is rounding.
LFX_INLINE Vector exp2(Vector x)
{
    constexpr float kMIN_EXPONENT = -126.0F;
    constexpr float kROUND = 12582912.0F; // 1.5 * 2^23: a sum with it is rounded to a whole number, in its lowest bits
    Vector const lowest = broadcast(kMIN_EXPONENT);
    Vector const clamped = x < lowest ? lowest : x;
    Vector const shifted = clamped + kROUND;
    Vector const f = clamped - (shifted - kROUND);
    Vector p = broadcast(0x1.41fbbcp-13F);
    p = p * f + 0x1.5f3e54p-10F;
    p = p * f + 0x1.3b2d4cp-7F;
    p = p * f + 0x1.c6aee8p-5F;
    p = p * f + 0x1.ebfbdcp-3F;
    p = p * f + 0x1.62e430p-1F;
    p = p * f + 1.0F;
    constexpr uint32_t kEXPONENT_OF_ONE = 0x3f800000;
    Bits const exponent = (bitCast<Bits>(shifted) << 23) + kEXPONENT_OF_ONE;
    Vector const result = p * bitCast<Vector>(exponent);
    return x < lowest ? Vector{} : result;
}

} // namespace lfx::cpu::LFX_CPU_SET
