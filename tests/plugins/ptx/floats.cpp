// Arithmetic of float32.
//
// Source: PTX ISA, "Floating Point Instructions".
#include "lanewise.h"

#include <cmath>
#include <limits>

namespace lfx::ptx
{
namespace
{

float add(float a, float b)
{
    return a + b;
}

float sub(float a, float b)
{
    return a - b;
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

} // namespace

void addFloats(Opcodes& opcodes)
{
    for (char const* const rounding : {"", ".rn"})
    {
        opcodes[std::string("add") + rounding + ".f32"] = lanewise<add>;
        opcodes[std::string("sub") + rounding + ".f32"] = lanewise<sub>;
        opcodes[std::string("mul") + rounding + ".f32"] = lanewise<multiply>;
        opcodes[std::string("add") + rounding + ".ftz.f32"] = lanewise<flush2<add>>;
        opcodes[std::string("sub") + rounding + ".ftz.f32"] = lanewise<flush2<sub>>;
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
}

} // namespace lfx::ptx
