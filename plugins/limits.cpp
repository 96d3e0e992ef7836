// Sizes and attributes that the kernels support; the hosts, the launches and the host reference all check here.
#include "attention.h"

#include <cmath>
#include <initializer_list>

namespace lfx
{
namespace
{

constexpr int32_t kMAX_GRID = 65535; // blocks along the second and third axis of a grid

char const* unsupportedCounts(int32_t batch, int32_t seqlen, int32_t rows, Target target)
{
    bool const isCpu = target == Target::kCPU;
    if (batch < 1 || (!isCpu && batch > kMAX_GRID))
    {
        return isCpu ? "batch must be 1 or more" : "batch must be 1 to 65535";
    }
    int32_t const maxTokens = isCpu ? kMAX_CPU_SEQLEN : kMAX_SEQLEN;
    if (seqlen < 1 || seqlen > maxTokens)
    {
        return isCpu ? "the sequence length must be 1 to 1073741824" : "the sequence length must be 1 to 262144";
    }
    if (rows < 1 || rows > maxTokens)
    {
        return isCpu ? "the number of global tokens must be 1 to 1073741824"
                     : "the number of global tokens must be 1 to 262144";
    }
    return nullptr;
}

char const* unsupportedHeads(int32_t numHeads, int32_t headSize, int32_t maxHeadSize, float scale)
{
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

constexpr char const* kOTHER_LAYOUT
    = "the caller was compiled with another version of attention.h; compile both with the same one";

template <typename Params>
char const* unsupportedStrides(Params const& params)
{
    int64_t const width = static_cast<int64_t>(params.numHeads) * params.headSize;
    int64_t const maxStride = int64_t{1} << 31;
    for (int64_t stride : {params.queryStride, params.keyStride, params.valueStride, params.contextStride})
    {
        if (stride < width || stride > maxStride)
        {
            return "the stride of a tensor must be num_heads * head size or more, and at most 2^31";
        }
    }
    return nullptr;
}

bool isAligned(void const* pointer, size_t alignment)
{
    return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

template <typename Params>
char const* inaccessibleTensors(Params const& params, size_t alignment)
{
    void const* const tensors[] = {params.query, params.key, params.value, params.context};
    int64_t const strides[] = {params.queryStride, params.keyStride, params.valueStride, params.contextStride};
    size_t const elementBytes = params.type == Type::kFLOAT ? 4 : 2;
    for (int i = 0; i < 4; ++i)
    {
        if (tensors[i] == nullptr)
        {
            return "query, key, value or context is a null pointer";
        }
        if (!isAligned(tensors[i], alignment))
        {
            return "query, key, value or context is not aligned";
        }
        if (strides[i] * elementBytes % alignment != 0)
        {
            return "the stride of query, key, value or context is not aligned";
        }
    }
    if (params.keyMask == nullptr || !isAligned(params.keyMask, sizeof(int32_t)))
    {
        return "key_mask is a null pointer or not aligned";
    }
    return isAligned(params.logSumExp, sizeof(float)) ? nullptr : "the log-sum-exp is not aligned";
}

} // namespace

char const* unsupportedReason(BandedParams const& params, Target target) noexcept
{
    if (params.structBytes != sizeof(params))
    {
        return kOTHER_LAYOUT;
    }
    if (char const* reason = unsupportedCounts(params.batch, params.seqlen, params.slots, target))
    {
        return reason;
    }
    if (char const* reason = unsupportedHeads(params.numHeads, params.headSize, kMAX_BANDED_HEAD_SIZE, params.scale))
    {
        return reason;
    }
    if (params.window < 0)
    {
        return "window must be 0 or more";
    }
    if (params.dilation < 1 || static_cast<int64_t>(params.dilation) * params.numHeads > kMAX_GRID)
    {
        return "dilation must be 1 or more, and dilation * num_heads at most 65535";
    }
    int64_t const reach = 64 + 2 * static_cast<int64_t>(params.window);
    if (target == Target::kCUDA && reach > kMAX_REACH && params.seqlen / params.dilation > kMAX_REACH)
    {
        return "64 + 2 * window must be at most 131072 for sequences longer than 131072 * dilation";
    }
    if (params.causal != 0 && params.causal != 1)
    {
        return "causal must be 0 or 1";
    }
    if (char const* reason = unsupportedStrides(params))
    {
        return reason;
    }
    return isType(params.type) ? nullptr : "the type must be float32, float16 or bfloat16";
}

char const* unsupportedReason(GlobalParams const& params, Target target) noexcept
{
    if (params.structBytes != sizeof(params))
    {
        return kOTHER_LAYOUT;
    }
    if (char const* reason = unsupportedCounts(params.batch, params.seqlen, params.queries, target))
    {
        return reason;
    }
    if (char const* reason = unsupportedHeads(params.numHeads, params.headSize, kMAX_GLOBAL_HEAD_SIZE, params.scale))
    {
        return reason;
    }
    if (target == Target::kCUDA && static_cast<int64_t>(params.batch) * params.numHeads > kMAX_GRID)
    {
        return "batch * num_heads must be at most 65535";
    }
    if (char const* reason = unsupportedStrides(params))
    {
        return reason;
    }
    return isType(params.type) ? nullptr : "the type must be float32, float16 or bfloat16";
}

char const* inaccessibleReason(BandedParams const& params, size_t alignment) noexcept
{
    if (params.globalContext == nullptr || !isAligned(params.globalContext, alignment))
    {
        return "global_context is a null pointer or not aligned";
    }
    if (params.globalIndex == nullptr || !isAligned(params.globalIndex, sizeof(int32_t)))
    {
        return "global_index is a null pointer or not aligned";
    }
    return inaccessibleTensors(params, alignment);
}

char const* inaccessibleReason(GlobalParams const& params, size_t alignment) noexcept
{
    return inaccessibleTensors(params, alignment);
}

} // namespace lfx
