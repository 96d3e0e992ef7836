// BandedAttention: every query attends its window and the global tokens of its batch element, with one softmax over the
// union. Rows of global tokens are copied from global_context; rows of padding are zeros.
//
// Source: Beltagy et al. 2020, arXiv:2004.05150, section 3; Dao 2023, arXiv:2307.08691, section 3.
#include "attention.h"
#include "banded/fp32.cuh"
#include "banded/tensor_cores.cuh"
#include "banded/warpgroup.cuh"

#include <algorithm>
#include <initializer_list>

namespace lfx
{
namespace
{

constexpr int kBLOCKS_TO_OCCUPY = 2; // of 128 queries for each multiprocessor, from which on they are used

// Whether distances between rows of a tile of 128 queries are 32-bit numbers.
bool stepsFit(BandedParams const& p)
{
    int64_t const stride = std::max({p.queryStride, p.keyStride, p.valueStride});
    return stride * p.dilation <= INT32_MAX / 128;
}

template <int kQUERIES>
dim3 gridOf(BandedParams const& p)
{
    return {static_cast<uint32_t>(ceilDiv(ceilDiv(p.seqlen, p.dilation), kQUERIES)),
        static_cast<uint32_t>(p.numHeads * p.dilation), static_cast<uint32_t>(p.batch)};
}

// Traits: of the kernel.
template <typename Traits>
int32_t launchBlocks(void (*kernel)(BandedParams), BandedParams const& p, CUstream_st* stream)
{
    size_t const sharedBytes = Traits::kSHARED_BYTES + banded::Block<Traits::kQUERIES>::tableBytes(p);
    return launch(kernel, gridOf<Traits::kQUERIES>(p), Traits::kTHREADS, sharedBytes, p, stream);
}

template <typename T, int kD, int kROW_TILES>
int32_t launchTensorCores(BandedParams const& p, CUstream_st* stream)
{
    using namespace banded;
    return launchBlocks<TensorCoreTraits<kD, kROW_TILES>>(bandedAttentionTensorCores<T, kD, kROW_TILES>, p, stream);
}

bool runsWarpgroups()
{
    return lfx::hasWarpgroups(banded::bandedAttentionWarpgroup<Half>, banded::WarpgroupTraits::kTHREADS);
}

// The kernel for a warpgroup is used where it can run. Of the others, that with warps of 32 queries does less work for a query,
// and is used if its blocks occupy the GPU and its tables fit.
template <typename T, int kD>
int32_t launchTensorCores(BandedParams const& p, CUstream_st* stream)
{
    if constexpr (kD == banded::WarpgroupTraits::kD)
    {
        if (runsWarpgroups())
        {
            return launchBlocks<banded::WarpgroupTraits>(banded::bandedAttentionWarpgroup<T>, p, stream);
        }
    }
    using Wide = banded::TensorCoreTraits<kD, 2>;
    dim3 const grid = gridOf<Wide::kQUERIES>(p);
    int64_t const blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
    bool const occupy = blocks >= kBLOCKS_TO_OCCUPY * static_cast<int64_t>(multiprocessors());
    return occupy && Wide::kSHARED_BYTES + banded::Block<Wide::kQUERIES>::tableBytes(p) <= kMAX_SHARED_BYTES
        ? launchTensorCores<T, kD, 2>(p, stream)
        : launchTensorCores<T, kD, 1>(p, stream);
}

// kD: the head size, rounded up.
template <int kD>
int32_t launchForHeadSize(BandedParams const& p, CUstream_st* stream)
{
    using namespace banded;
    switch (p.type)
    {
    case Type::kFLOAT: return launchBlocks<Fp32Traits<kD>>(bandedAttentionFp32<kD>, p, stream);
    case Type::kHALF: return launchTensorCores<Half, kD>(p, stream);
    default: return launchTensorCores<Bf16, kD>(p, stream);
    }
}

int32_t preloadAll(std::initializer_list<void (*)(BandedParams)> kernels)
{
    for (void (*kernel)(BandedParams) : kernels)
    {
        if (int32_t const error = preloadKernel(kernel))
        {
            return error;
        }
    }
    return 0;
}

int32_t preloadWarpgroup()
{
    runsWarpgroups(); // asks for the attributes of a kernel, once
    return preloadAll({banded::bandedAttentionWarpgroup<Half>, banded::bandedAttentionWarpgroup<Bf16>});
}

template <int kD>
int32_t preloadForHeadSize()
{
    using namespace banded;
    return preloadAll(
        {bandedAttentionFp32<kD>, bandedAttentionTensorCores<Half, kD, 1>, bandedAttentionTensorCores<Half, kD, 2>,
            bandedAttentionTensorCores<Bf16, kD, 1>, bandedAttentionTensorCores<Bf16, kD, 2>});
}

} // namespace

int32_t preloadBandedAttention() noexcept
{
    for (int32_t (*preload)() :
        {preloadWarpgroup, preloadForHeadSize<32>, preloadForHeadSize<64>, preloadForHeadSize<128>})
    {
        if (int32_t const error = preload())
        {
            return error;
        }
    }
    return 0;
}

int32_t launchBandedAttention(BandedParams const& p, CUstream_st* stream) noexcept
{
    if (unsupportedReason(p, Target::kCUDA) != nullptr || inaccessibleReason(p, kDEVICE_ALIGNMENT) != nullptr
        || !stepsFit(p))
    {
        return cudaErrorInvalidValue;
    }
    if (p.headSize <= 32)
    {
        return launchForHeadSize<32>(p, stream);
    }
    return p.headSize <= 64 ? launchForHeadSize<64>(p, stream) : launchForHeadSize<128>(p, stream);
}

} // namespace lfx

// The same for callers that are not C++.
LFX_EXPORT int32_t lfxBandedAttention(lfx::BandedParams const* params, CUstream_st* stream) noexcept
{
    return lfx::launchBandedAttention(*params, stream);
}
