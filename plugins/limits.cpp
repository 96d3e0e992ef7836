// Sizes and attributes that the kernels support; launches, the plugin and the host reference all check here.
#include "attention.h"

#include <cmath>

namespace lfx
{
namespace
{

char const* unsupportedSizes(
    int32_t batch, int32_t seqlen, int32_t rows, int32_t numHeads, int32_t headSize, int32_t maxHeadSize, float scale)
{
    if (batch < 1 || batch > 65535)
    {
        return "batch must be 1 to 65535";
    }
    if (seqlen < 1 || seqlen > kMAX_SEQLEN)
    {
        return "the sequence length must be 1 to 262144";
    }
    if (rows < 1 || rows > kMAX_SEQLEN)
    {
        return "the number of global tokens must be 1 to 262144";
    }
    if (numHeads < 1 || numHeads > 1024)
    {
        return "num_heads must be 1 to 1024";
    }
    if (headSize < 1 || headSize % kHEAD_SIZE_MULTIPLE != 0)
    {
        return "the head size must be a multiple of 8";
    }
    if (headSize > maxHeadSize)
    {
        return maxHeadSize == kMAX_BANDED_HEAD_SIZE ? "the head size must be at most 128"
                                                    : "the head size must be at most 1024";
    }
    if (!std::isfinite(scale) || scale <= 0.0F)
    {
        return "scale must be a finite number above 0 (as an attribute, 0 stands for 1/sqrt(head size))";
    }
    return nullptr;
}

bool isType(Type type)
{
    return type == Type::kFLOAT || type == Type::kHALF || type == Type::kBF16;
}

} // namespace

char const* unsupportedReason(BandedParams const& params) noexcept
{
    if (char const* reason = unsupportedSizes(params.batch, params.seqlen, params.slots, params.numHeads,
            params.headSize, kMAX_BANDED_HEAD_SIZE, params.scale))
    {
        return reason;
    }
    if (params.window < 0)
    {
        return "window must be 0 or more";
    }
    if (params.dilation < 1 || static_cast<int64_t>(params.dilation) * params.numHeads > 65535)
    {
        return "dilation must be 1 or more, and dilation * num_heads at most 65535";
    }
    int64_t const reach = 64 + 2 * static_cast<int64_t>(params.window);
    if (reach > kMAX_REACH && params.seqlen / params.dilation > kMAX_REACH)
    {
        return "64 + 2 * window must be at most 131072 for sequences longer than 131072 * dilation";
    }
    if (params.causal != 0 && params.causal != 1)
    {
        return "causal must be 0 or 1";
    }
    return isType(params.type) ? nullptr : "the type must be float32, float16 or bfloat16";
}

char const* unsupportedReason(GlobalParams const& params) noexcept
{
    if (char const* reason = unsupportedSizes(params.batch, params.seqlen, params.queries, params.numHeads,
            params.headSize, kMAX_GLOBAL_HEAD_SIZE, params.scale))
    {
        return reason;
    }
    if (static_cast<int64_t>(params.batch) * params.numHeads > 65535)
    {
        return "batch * num_heads must be at most 65535";
    }
    return isType(params.type) ? nullptr : "the type must be float32, float16 or bfloat16";
}

} // namespace lfx
