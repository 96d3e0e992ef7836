// A CUDA provider made of ONNX Runtime's CPU provider, for the custom ops of cuda_ops.cpp over the emulated kernels. The ops
// get ONNX Runtime's own functions, but for these: ops on CUDA are added as ops on the CPU, and those that refuse the CPU are
// left out; the kernel context has a stream; and scratch memory is counted. Launches are recorded.
#include "attention.h"
#include "onnxruntime/ort_api.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#undef RegisterCustomOps
using namespace lfx::ort;

extern "C" Status* lfxRegisterCustomOps(SessionOptions* options, ApiBase const* base) noexcept; // of cuda_ops.cpp

namespace
{

constexpr size_t kTABLE_SIZE = 279; // up to getKernelAllocator
constexpr uintptr_t kSTREAM = 0x5ea0;

std::array<Function, kTABLE_SIZE> gTable;
Function const* gReal;
std::mutex gMutex;
std::map<void*, size_t> gScratch; // that was not freed
int32_t gAllocations = 0;
int32_t gLaunches = 0;
int32_t gOtherStreams = 0; // launches on another stream
int32_t gError = 0;        // that the launches return

template <typename Entry, typename Replacement>
void replace(Entry const& entry, Replacement function)
{
    gTable[entry.position] = reinterpret_cast<Function>(function);
}

Status* addOp(CustomOpDomain* domain, CustomOp const* op)
{
    if (std::strcmp(op->getExecutionProviderType(op), "CUDAExecutionProvider") != 0)
    {
        return nullptr;
    }
    const_cast<CustomOp*>(op)->getExecutionProviderType
        = [](CustomOp const*) -> char const* { return "CPUExecutionProvider"; };
    return addCustomOp(gReal, domain, op);
}

Status* stream(KernelContext const*, void** result)
{
    *result = reinterpret_cast<void*>(kSTREAM);
    return nullptr;
}

// Fails if the memory is not that of the kernel's allocator.
Status* scratchBuffer(KernelContext const*, MemoryInfo const* memory, size_t bytes, void** result)
{
    constexpr Entry<Status*(MemoryInfo const*, char const**)> getName{71};
    char const* name = nullptr;
    if (Status* status = getName(gReal, memory, &name))
    {
        return status;
    }
    if (std::strcmp(name, "Cpu") != 0)
    {
        return createStatus(gReal, kFAIL, "scratch memory of another device");
    }
    std::lock_guard<std::mutex> const lock(gMutex);
    *result = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*result, 0xff, bytes); // NaN
    gScratch[*result] = bytes;
    ++gAllocations;
    return nullptr;
}

Status* freeScratch(Allocator*, void* pointer)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    if (gScratch.erase(pointer) == 0)
    {
        return createStatus(gReal, kFAIL, "memory that was not allocated is freed");
    }
    std::free(pointer);
    return nullptr;
}

Function const* getTable(uint32_t)
{
    return gTable.data();
}

template <typename Params>
int32_t record(int32_t (*launch)(Params const&, CUstream_st*) noexcept, Params const& params, CUstream_st* given)
{
    std::lock_guard<std::mutex> const lock(gMutex); // the emulated device is not thread-safe
    ++gLaunches;
    gOtherStreams += reinterpret_cast<uintptr_t>(given) != kSTREAM ? 1 : 0;
    return gError != 0 ? gError : launch(params, given);
}

} // namespace

// The linker redirects the ops' launches to these: see fake_cuda_library() of build.py.
extern "C"
{
    int32_t __real__ZN3lfx21launchBandedAttentionERKNS_12BandedParamsEP11CUstream_st(
        lfx::BandedParams const& params, CUstream_st* stream) noexcept;
    int32_t __real__ZN3lfx21launchGlobalAttentionERKNS_12GlobalParamsEP11CUstream_st(
        lfx::GlobalParams const& params, CUstream_st* stream) noexcept;

    int32_t __wrap__ZN3lfx21launchBandedAttentionERKNS_12BandedParamsEP11CUstream_st(
        lfx::BandedParams const& params, CUstream_st* stream) noexcept
    {
        return record(__real__ZN3lfx21launchBandedAttentionERKNS_12BandedParamsEP11CUstream_st, params, stream);
    }

    int32_t __wrap__ZN3lfx21launchGlobalAttentionERKNS_12GlobalParamsEP11CUstream_st(
        lfx::GlobalParams const& params, CUstream_st* stream) noexcept
    {
        return record(__real__ZN3lfx21launchGlobalAttentionERKNS_12GlobalParamsEP11CUstream_st, params, stream);
    }
}

LFX_EXPORT Status* RegisterCustomOps(SessionOptions* options, ApiBase const* base) noexcept
{
    static ApiBase const fake{getTable, base->getVersionString};
    gReal = base->getApi(kCUDA_API_VERSION);
    std::copy_n(gReal, kTABLE_SIZE, gTable.begin());
    replace(addCustomOp, addOp);
    replace(getGpuComputeStream, stream);
    replace(getScratchBuffer, scratchBuffer);
    replace(allocatorFree, freeScratch);
    return lfxRegisterCustomOps(options, &fake);
}

// allocations of scratch memory, those that were not freed, launches, launches on another stream
LFX_EXPORT void fakeCudaCounts(int32_t (&counts)[4]) noexcept
{
    std::lock_guard<std::mutex> const lock(gMutex);
    counts[0] = gAllocations;
    counts[1] = static_cast<int32_t>(gScratch.size());
    counts[2] = gLaunches;
    counts[3] = gOtherStreams;
}

// From now on launches return this error.
LFX_EXPORT void fakeCudaFail(int32_t error) noexcept
{
    gError = error;
}
