// The CPU provider: the kernels of cpu/, on ONNX Runtime's threads.
#pragma once

#include "cpu/cpu_attention.h"
#include "onnxruntime/custom_op.h"

#include <cstdlib>
#include <string>

namespace lfx::ort
{

inline constexpr char const* kCPU_PROVIDER = "CPUExecutionProvider";
// Names the instruction set of the CPU kernels, instead of the widest one: baseline, avx2 or avx512.
inline constexpr char const* kINSTRUCTIONS_VARIABLE = "LFX_CPU_INSTRUCTIONS";

template <typename Op>
class CpuDevice
{
public:
    static constexpr char const* kPROVIDER = kCPU_PROVIDER;
    static constexpr Target kTARGET = Target::kCPU;

    Status* initialize(Function const* api, KernelInfo const*)
    {
        mSet = cpu::widestInstructionSet();
        char const* const name = std::getenv(kINSTRUCTIONS_VARIABLE);
        if (name != nullptr && *name != '\0' && !cpu::findInstructionSet(name, mSet))
        {
            return failure<Op>(api,
                std::string(kINSTRUCTIONS_VARIABLE) + " is '" + name
                    + "'; it must be baseline, avx2 or avx512, and this CPU must have it");
        }
        return nullptr;
    }

    Status* run(Function const* api, KernelContext* context, typename Op::Params const& params) const
    {
        Threads threads{api, context, nullptr};
        cpu::ThreadPool const pool{runOnThreads, &threads};
        char const* error = nullptr;
        if constexpr (Op::kIS_BANDED)
        {
            error = cpu::runBandedAttention(params, pool, mSet);
        }
        else
        {
            error = cpu::runGlobalAttention(params, pool, mSet);
        }
        return threads.status != nullptr ? threads.status : error != nullptr ? failure<Op>(api, error) : nullptr;
    }

private:
    struct Threads
    {
        Function const* api;
        KernelContext* context;
        Status* status; // of the first failure
    };

    static void runOnThreads(void* pool, size_t total, cpu::Task task, void* argument)
    {
        Threads& threads = *static_cast<Threads*>(pool);
        if (threads.status == nullptr)
        {
            threads.status = parallelFor(threads.api, threads.context, task, total, 0, argument);
        }
    }

    cpu::InstructionSet mSet = cpu::InstructionSet::kBASELINE;
};

} // namespace lfx::ort
