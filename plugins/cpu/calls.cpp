// The CPU kernels as C functions, for callers that are not C++: lfx.torch and the tests.
#include "cpu/cpu_attention.h"
#include "cpu/threads.h"

using lfx::cpu::InstructionSet;

// The number of an instruction set: of the widest one if the name is empty, or -1 if this CPU or library does not have it.
LFX_EXPORT int32_t lfxCpuInstructionSet(char const* name) noexcept
{
    InstructionSet set = lfx::cpu::widestInstructionSet();
    return *name == '\0' || lfx::cpu::findInstructionSet(name, set) ? static_cast<int32_t>(set) : -1;
}

// These compute the op on up to `threads` threads, and return nullptr, or the reason why they do not.
LFX_EXPORT char const* lfxBandedAttentionCpu(lfx::BandedParams const* params, int32_t set, int32_t threads) noexcept
{
    lfx::cpu::Threads pool{threads};
    return lfx::cpu::runBandedAttention(*params, pool.pool(), static_cast<InstructionSet>(set));
}

LFX_EXPORT char const* lfxGlobalAttentionCpu(lfx::GlobalParams const* params, int32_t set, int32_t threads) noexcept
{
    lfx::cpu::Threads pool{threads};
    return lfx::cpu::runGlobalAttention(*params, pool.pool(), static_cast<InstructionSet>(set));
}
