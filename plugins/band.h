// Which keys a tile of queries visits, and which of them each query sees: the arithmetic that the kernels and the host
// reference share. Indices count within one subsequence: the tokens p with p % dilation == lane, in order.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LFX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LFX_HOST_DEVICE inline
#endif

namespace lfx
{

struct Range
{
    int32_t begin;
    int32_t end; // exclusive; begin == end for none
};

LFX_HOST_DEVICE int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

LFX_HOST_DEVICE int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

LFX_HOST_DEVICE int32_t ceilDiv(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

// Tokens of the subsequence `lane`.
LFX_HOST_DEVICE int32_t laneLength(int32_t seqlen, int32_t dilation, int32_t lane)
{
    return lane < seqlen ? (seqlen - lane + dilation - 1) / dilation : 0;
}

// Where the index-th token of the subsequence `lane` stands in the sequence.
LFX_HOST_DEVICE int32_t positionOf(int32_t index, int32_t dilation, int32_t lane)
{
    return index * dilation + lane;
}

// Keys that the queries [firstQuery, firstQuery + queries) reach, within a subsequence of `length` tokens.
LFX_HOST_DEVICE Range keysOfTile(int32_t firstQuery, int32_t queries, int32_t window, bool causal, int32_t length)
{
    int32_t const lastQuery = smaller(firstQuery + queries, length) - 1;
    return {larger(firstQuery - window, 0), smaller(lastQuery + (causal ? 0 : window) + 1, length)};
}

LFX_HOST_DEVICE bool inBand(int32_t query, int32_t key, int32_t window, bool causal)
{
    return key >= query - window && key <= query + (causal ? 0 : window);
}

// A slot of global_index that names a token; -1 and what lies outside the sequence are unused.
LFX_HOST_DEVICE bool isUsed(int32_t index, int32_t seqlen)
{
    return index >= 0 && index < seqlen;
}

} // namespace lfx
