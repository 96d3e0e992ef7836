// What the tests of the CPU kernels call beside cpu/calls.cpp.
#include "cpu/cpu_attention.h"
#include "cpu/kernels.h"

using lfx::cpu::InstructionSet;

LFX_EXPORT int32_t lfxIsSupported(int32_t set)
{
    return lfx::cpu::isSupported(static_cast<InstructionSet>(set)) ? 1 : 0;
}

// `count` is a multiple of 16.
LFX_EXPORT void lfxExp2Cpu(int32_t set, float const* from, float* to, size_t count)
{
#if defined(__x86_64__)
    lfx::cpu::Kernels const* const kernels[]
        = {&lfx::cpu::baseline::kKERNELS, &lfx::cpu::avx2::kKERNELS, &lfx::cpu::avx512::kKERNELS};
    kernels[set]->exp2(from, to, count);
#else
    lfx::cpu::baseline::kKERNELS.exp2(from, to, count);
#endif
}
