// The CUDA provider: the kernels of banded/ and global/, on the stream that ONNX Runtime gives.
#pragma once

#include "onnxruntime/custom_op.h"

#include <string>

namespace lfx::ort
{

inline constexpr char const* kCUDA_PROVIDER = "CUDAExecutionProvider";

// Nothing here waits for the device: the kernels are enqueued, and the scratch memory goes back to its arena, which gives it
// to later work of the same stream alone.
template <typename Op>
class CudaDevice
{
public:
    static constexpr char const* kPROVIDER = kCUDA_PROVIDER;
    static constexpr Target kTARGET = Target::kCUDA;

    CudaDevice() = default;
    CudaDevice(CudaDevice const&) = delete;
    CudaDevice& operator=(CudaDevice const&) = delete;

    ~CudaDevice()
    {
        if (mAllocator != nullptr)
        {
            releaseAllocator(mApi, mAllocator);
        }
    }

    Status* initialize(Function const* api, KernelInfo const* info)
    {
        // Before any capture of a CUDA graph. On a device that cannot load the kernels, the launch reports the error.
        static_cast<void>(Op::preload());
        mApi = api;
        if (Status* status = getKernelAllocator(api, info, kDEFAULT_MEMORY, &mAllocator))
        {
            return status;
        }
        return allocatorGetInfo(api, mAllocator, &mMemory);
    }

    Status* run(Function const* api, KernelContext* context, typename Op::Params& params) const
    {
        if (char const* reason = inaccessibleReason(params, kDEVICE_ALIGNMENT))
        {
            return failure<Op>(api, reason);
        }
        void* stream = nullptr;
        if (Status* status = getGpuComputeStream(api, context, &stream))
        {
            return status;
        }
        void* scratch = nullptr;
        size_t const scratchBytes = Op::workspaceBytes(params);
        if (scratchBytes > 0)
        {
            if (Status* status = getScratchBuffer(api, context, mMemory, scratchBytes, &scratch))
            {
                return status;
            }
        }
        Op::setWorkspace(params, scratch);
        int32_t const error = Op::launch(params, static_cast<CUstream_st*>(stream));
        Status* const freed = scratch != nullptr ? allocatorFree(api, mAllocator, scratch) : nullptr;
        if (error == 0)
        {
            return freed;
        }
        if (freed != nullptr)
        {
            releaseStatus(api, freed);
        }
        return failure<Op>(api, "the kernel was not launched: CUDA error " + std::to_string(error), kFAIL);
    }

private:
    Function const* mApi = nullptr;
    Allocator* mAllocator = nullptr;     // of the provider's memory
    MemoryInfo const* mMemory = nullptr; // of the allocator, which owns it
};

// The CPU provider in the library that has CUDA kernels alone. ONNX Runtime gives a node to it if the session has no CUDA
// provider, and the session is refused.
template <typename Op>
class NoCpuDevice
{
public:
    static constexpr char const* kPROVIDER = "CPUExecutionProvider";
    static constexpr Target kTARGET = Target::kCPU;

    Status* initialize(Function const* api, KernelInfo const*)
    {
        char** names = nullptr;
        int count = 0;
        bool hasCuda = false;
        if (Status* status = getAvailableProviders(api, &names, &count))
        {
            return status;
        }
        for (int i = 0; i < count; ++i)
        {
            hasCuda = hasCuda || std::string(names[i]) == kCUDA_PROVIDER;
        }
        if (Status* status = releaseAvailableProviders(api, names, count))
        {
            return status;
        }
        std::string const reason = hasCuda ? "the session has no " : "this ONNX Runtime has no ";
        std::string const cure = hasCuda ? "add it to the session's providers" : "install onnxruntime-gpu";
        return failure<Op>(api,
            reason + kCUDA_PROVIDER + "; " + cure
                + ", or register liblfx_onnxruntime.so, which has kernels for the CPU",
            kNOT_IMPLEMENTED);
    }

    Status* run(Function const* api, KernelContext*, typename Op::Params const&) const
    {
        return failure<Op>(api, "there is no kernel for the CPU");
    }
};

} // namespace lfx::ort
