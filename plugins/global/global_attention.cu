// GlobalAttention: a few queries over all real keys of their batch element.
//
// There are too few queries to fill a GPU, so the keys are split over blocks of threads (flash decoding). Each block leaves
// the partial result of its part of the keys in the workspace; a second kernel combines them, since the last block alone
// would read them for longer than a launch takes (scripts/bench/global_join.py). A head may be as wide as the hidden size:
// with folded projections the global rows have one such head.
//
// Source: Beltagy et al. 2020, arXiv:2004.05150, section 3; Dao et al. 2023, "Flash-Decoding".
#include "attention.h"
#include "global/combine.cuh"
#include "global/fp32.cuh"
#include "global/tensor_cores.cuh"

#include <initializer_list>

namespace lfx
{
namespace
{

using namespace global;

template <typename T, int kMAX_HEAD_SIZE>
int32_t launchTensorCores(GlobalParams const& p, dim3 grid, CUstream_st* stream)
{
    return launch(globalAttentionTensorCores<T, kMAX_HEAD_SIZE>, grid, BlockTraits::kTHREADS,
        SharedMemory<T, kMAX_HEAD_SIZE>::bytes(p.headSize), p, stream);
}

template <typename T>
int32_t launchTensorCores(GlobalParams const& p, dim3 grid, CUstream_st* stream)
{
    return p.headSize <= kSMALL_HEAD_SIZE ? launchTensorCores<T, kSMALL_HEAD_SIZE>(p, grid, stream)
                                          : launchTensorCores<T, kMAX_GLOBAL_HEAD_SIZE>(p, grid, stream);
}

int32_t launchParts(GlobalParams const& p, CUstream_st* stream)
{
    dim3 const grid(Split(p).parts, ceilDiv(p.queries, BlockTraits::kQUERIES), p.batch * p.numHeads);
    switch (p.type)
    {
    case Type::kFLOAT:
        return launch(globalAttentionFp32, grid, Fp32Traits::kTHREADS, Fp32Traits::sharedBytes(p.headSize), p, stream);
    case Type::kHALF: return launchTensorCores<Half>(p, grid, stream);
    default: return launchTensorCores<Bf16>(p, grid, stream);
    }
}

int32_t launchCombine(GlobalParams const& p, CUstream_st* stream)
{
    using Traits = CombineTraits;
    dim3 const grid(p.queries, ceilDiv(p.headSize, Traits::kCOLUMNS), p.batch * p.numHeads);
    switch (p.type)
    {
    case Type::kFLOAT: return launch(combineParts<float>, grid, Traits::kTHREADS, Traits::kSHARED_BYTES, p, stream);
    case Type::kHALF: return launch(combineParts<Half>, grid, Traits::kTHREADS, Traits::kSHARED_BYTES, p, stream);
    default: return launch(combineParts<Bf16>, grid, Traits::kTHREADS, Traits::kSHARED_BYTES, p, stream);
    }
}

} // namespace

size_t globalWorkspaceBytes(int32_t batch, int32_t queries, int32_t numHeads, int32_t headSize) noexcept
{
    // The keys are split only if all parts together are at most kTARGET_BLOCKS blocks.
    size_t const unsplitRows = static_cast<size_t>(batch) * numHeads * queries;
    size_t const maxSplitRows = static_cast<size_t>(kTARGET_BLOCKS) * BlockTraits::kQUERIES;
    return sizeof(float) * (unsplitRows > maxSplitRows ? unsplitRows : maxSplitRows) * (headSize + 2);
}

int32_t preloadGlobalAttention() noexcept
{
    for (void (*kernel)(GlobalParams) :
        {globalAttentionFp32, globalAttentionTensorCores<Half, kSMALL_HEAD_SIZE>,
            globalAttentionTensorCores<Bf16, kSMALL_HEAD_SIZE>, globalAttentionTensorCores<Half, kMAX_GLOBAL_HEAD_SIZE>,
            globalAttentionTensorCores<Bf16, kMAX_GLOBAL_HEAD_SIZE>, combineParts<float>, combineParts<Half>,
            combineParts<Bf16>})
    {
        if (int32_t const error = preloadKernel(kernel))
        {
            return error;
        }
    }
    return 0;
}

int32_t launchGlobalAttention(GlobalParams const& p, CUstream_st* stream) noexcept
{
    if (unsupportedReason(p, Target::kCUDA) != nullptr || inaccessibleReason(p, kDEVICE_ALIGNMENT) != nullptr
        || p.workspace == nullptr || reinterpret_cast<uintptr_t>(p.workspace) % kDEVICE_ALIGNMENT != 0)
    {
        return cudaErrorInvalidValue;
    }
    int32_t const error = launchParts(p, stream);
    return error != 0 ? error : launchCombine(p, stream);
}

} // namespace lfx

// The same for callers that are not C++.
LFX_EXPORT int32_t lfxGlobalAttention(lfx::GlobalParams const* params, CUstream_st* stream) noexcept
{
    return lfx::launchGlobalAttention(*params, stream);
}

LFX_EXPORT size_t lfxGlobalWorkspaceBytes(int32_t batch, int32_t queries, int32_t numHeads, int32_t headSize) noexcept
{
    return lfx::globalWorkspaceBytes(batch, queries, numHeads, headSize);
}
