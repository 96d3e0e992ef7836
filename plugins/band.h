// Which keys a tile of queries visits and which of them each query sees, shared by the kernels and the host reference.
//
// Dilation d splits a sequence into d interleaved subsequences: subsequence s has the tokens p with p % d == s. Queries
// and keys are counted within one subsequence; a position is counted within the sequence.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LFX_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and no copy of a function may serve another set.
#define LFX_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace lfx
{

struct Range
{
    int32_t begin;
    int32_t end; // exclusive
};

LFX_HOST_DEVICE constexpr int32_t min(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

LFX_HOST_DEVICE constexpr int32_t max(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

LFX_HOST_DEVICE constexpr int32_t ceilDiv(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

// Number of tokens of a subsequence.
LFX_HOST_DEVICE int32_t subsequenceLength(int32_t seqlen, int32_t dilation, int32_t subsequence)
{
    return subsequence < seqlen ? (seqlen - subsequence + dilation - 1) / dilation : 0;
}

// Position in the sequence of a subsequence's token `index`.
LFX_HOST_DEVICE int32_t positionOf(int32_t index, int32_t dilation, int32_t subsequence)
{
    return index * dilation + subsequence;
}

// Keys in the band of the queries [firstQuery, firstQuery + queries), within a subsequence of `length` tokens.
LFX_HOST_DEVICE Range keysOfTile(int32_t firstQuery, int32_t queries, int32_t window, bool causal, int32_t length)
{
    int32_t const lastQuery = min(firstQuery + queries, length) - 1;
    return {max(firstQuery - window, 0), min(lastQuery + (causal ? 0 : window) + 1, length)};
}

LFX_HOST_DEVICE bool inBand(int32_t query, int32_t key, int32_t window, bool causal)
{
    return key >= query - window && key <= query + (causal ? 0 : window);
}

// Whether an entry of global_index is a position; unused slots hold -1 or any other value outside the sequence.
LFX_HOST_DEVICE bool isUsedSlot(int32_t position, int32_t seqlen)
{
    return position >= 0 && position < seqlen;
}

} // namespace lfx
