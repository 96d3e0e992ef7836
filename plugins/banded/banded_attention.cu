// BandedAttention: every query attends its window and the global tokens of its batch element, with one softmax over the
// union. Rows of global tokens are copied from global_context; rows of padding are zeros.
//
// Source: Beltagy et al. 2020, arXiv:2004.05150, section 3; Dao 2023, arXiv:2307.08691, section 3.
#include "attention.h"
#include "banded/fp32.cuh"
#include "banded/tensor_cores.cuh"

namespace lfx
{
namespace
{

// kD: the head size, rounded up.
template <int kD>
int32_t launchForHeadSize(BandedParams const& p, CUstream_st* stream)
{
    using namespace banded;
    using TensorCores = TensorCoreTraits<kD>;
    using Fp32 = Fp32Traits<kD>;
    dim3 const grid(ceilDiv(ceilDiv(p.seqlen, p.dilation), BlockTraits::kQUERIES), p.numHeads * p.dilation, p.batch);
    int32_t const threads = BlockTraits::kTHREADS;
    size_t const tables = Block::tableBytes(p);
    switch (p.type)
    {
    case Type::kFLOAT: return launch(bandedAttentionFp32<kD>, grid, threads, Fp32::kSHARED_BYTES + tables, p, stream);
    case Type::kHALF:
        return launch(
            bandedAttentionTensorCores<Half, kD>, grid, threads, TensorCores::kSHARED_BYTES + tables, p, stream);
    default:
        return launch(
            bandedAttentionTensorCores<Bf16, kD>, grid, threads, TensorCores::kSHARED_BYTES + tables, p, stream);
    }
}

} // namespace

int32_t launchBandedAttention(BandedParams const& p, CUstream_st* stream) noexcept
{
    if (unsupportedReason(p) != nullptr || inaccessibleReason(p, kDEVICE_ALIGNMENT) != nullptr || !isContiguous(p)
        || p.logSumExp != nullptr)
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
