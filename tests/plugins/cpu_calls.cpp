// The CPU kernels as C functions, for the tests.
#include "cpu/cpu_attention.h"
#include "cpu/kernels.h"
#include "cpu_threads.h"

using lfx::cpu::InstructionSet;

LFX_EXPORT int32_t lfxIsSupported(int32_t set)
{
    return lfx::cpu::isSupported(static_cast<InstructionSet>(set)) ? 1 : 0;
}

LFX_EXPORT char const* lfxBandedAttentionCpu(lfx::BandedParams const* params, int32_t set, int32_t threads)
{
    Threads pool{threads};
    return lfx::cpu::runBandedAttention(*params, pool.pool(), static_cast<InstructionSet>(set));
}

LFX_EXPORT char const* lfxGlobalAttentionCpu(lfx::GlobalParams const* params, int32_t set, int32_t threads)
{
    Threads pool{threads};
    return lfx::cpu::runGlobalAttention(*params, pool.pool(), static_cast<InstructionSet>(set));
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
