// Shared by the kernels of GlobalAttention: how keys are split, the block's part of the problem, the softmax of its
// rows, and the partial results in the workspace.
#pragma once

#include "attention.h"
#include "band.h"
#include "device.cuh"
#include "softmax.cuh"

namespace lfx::global
{

struct BlockTraits
{
    static constexpr int kQUERIES = 16;
    static constexpr int kTHREADS = 256;
    static constexpr int kWARPS = kTHREADS / kWARP_SIZE;
    static constexpr int kWARP_ROWS = kQUERIES / kWARPS; // rows whose softmax a warp computes
};

constexpr int kSMALL_HEAD_SIZE = 128; // heads up to this size have tiles of 64 keys, larger ones of 32
constexpr int kTARGET_BLOCKS = 264;   // keys are split into enough parts for two blocks on each of 132 multiprocessors

LFX_HOST_DEVICE constexpr int32_t tileKeys(int32_t headSize)
{
    return headSize <= kSMALL_HEAD_SIZE ? 64 : 32;
}

// The keys of a batch element in parts of whole tiles, one part for each block.
struct Split
{
    LFX_HOST_DEVICE explicit Split(GlobalParams const& p)
    {
        int32_t const tiles = ceilDiv(p.seqlen, tileKeys(p.headSize));
        int32_t const queryBlocks = min(ceilDiv(p.queries, BlockTraits::kQUERIES), kTARGET_BLOCKS);
        int64_t const unsplitBlocks = static_cast<int64_t>(queryBlocks) * p.batch * p.numHeads;
        int32_t const maxParts
            = unsplitBlocks >= kTARGET_BLOCKS ? 1 : min(tiles, kTARGET_BLOCKS / static_cast<int32_t>(unsplitBlocks));
        int32_t const partTiles = ceilDiv(tiles, maxParts);
        parts = ceilDiv(tiles, partTiles);
        partKeys = partTiles * tileKeys(p.headSize);
    }

    int32_t parts;
    int32_t partKeys; // number of keys in each part but the last
};

// A block of threads computes 16 queries of one head over one part of the keys. Pointers are to its head's columns.
template <typename T>
struct Block
{
    __device__ __forceinline__ explicit Block(GlobalParams const& p)
        : firstQuery(blockIdx.y * BlockTraits::kQUERIES)
        , numQueries(min(p.queries - firstQuery, BlockTraits::kQUERIES))
    {
        int32_t const batch = blockIdx.z / p.numHeads;
        size_t const column = static_cast<size_t>(blockIdx.z % p.numHeads) * p.headSize;
        size_t const firstToken = static_cast<size_t>(batch) * p.seqlen;
        queries = static_cast<T const*>(p.query) + (static_cast<size_t>(batch) * p.queries + firstQuery) * p.queryStride
            + column;
        keys = static_cast<T const*>(p.key) + firstToken * p.keyStride + column;
        values = static_cast<T const*>(p.value) + firstToken * p.valueStride + column;
        mask = p.keyMask + firstToken;
        Split const split(p);
        firstKey = blockIdx.x * split.partKeys;
        endKey = min(firstKey + split.partKeys, p.seqlen);
    }

    int32_t firstQuery;
    int32_t numQueries;
    T const* queries; // row firstQuery
    T const* keys;    // row 0 of the batch element, like values and mask
    T const* values;
    int32_t const* mask;
    int32_t firstKey; // of the part
    int32_t endKey;
};

// Scores of the block's queries and a tile of keys, in shared memory. Weights of type T take their place.
template <typename T, int kKEYS>
struct ScoreTile
{
    static constexpr int kSTRIDE = kKEYS + 4; // in floats; the padding avoids bank conflicts and holds the row's factor
    static constexpr int kWEIGHT_STRIDE = kSTRIDE * static_cast<int>(sizeof(float) / sizeof(T));
    static constexpr size_t kBYTES = sizeof(float) * BlockTraits::kQUERIES * kSTRIDE;

    __device__ __forceinline__ float& score(int32_t row, int32_t key) const
    {
        return static_cast<float*>(memory)[row * kSTRIDE + key];
    }

    __device__ __forceinline__ T& weight(int32_t row, int32_t key) const
    {
        return static_cast<T*>(memory)[row * kWEIGHT_STRIDE + key];
    }

    // The factor by which the accumulated row is multiplied before this tile is added.
    __device__ __forceinline__ float& factor(int32_t row) const
    {
        return static_cast<float*>(memory)[row * kSTRIDE + kKEYS];
    }

    void* memory;
};

// Replaces the scores by weights and sets the factors. A warp computes the rows warp and warp + kWARPS, whose state is in
// `softmax`; isVisible(key) counts keys in the tile.
template <typename T, int kKEYS, typename IsVisible>
__device__ __forceinline__ void updateSoftmax(OnlineSoftmax (&softmax)[BlockTraits::kWARP_ROWS],
    ScoreTile<T, kKEYS> const& tile, float scaleLog2, IsVisible isVisible)
{
    constexpr int kLANE_KEYS = kKEYS / kWARP_SIZE;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
#pragma unroll
    for (int i = 0; i < BlockTraits::kWARP_ROWS; ++i)
    {
        int32_t const row = threadIdx.x / kWARP_SIZE + i * BlockTraits::kWARPS;
        float scores[kLANE_KEYS];
        float tileMax = kNEG_INF;
#pragma unroll
        for (int j = 0; j < kLANE_KEYS; ++j)
        {
            int32_t const key = lane + j * kWARP_SIZE;
            scores[j] = isVisible(key) ? tile.score(row, key) : kNEG_INF;
            tileMax = fmaxf(tileMax, scores[j]);
        }
        float const factor = softmax[i].rescale(warpMax<kWARP_SIZE>(tileMax), scaleLog2);
        __syncwarp(); // every lane has read its scores before weights overwrite them
#pragma unroll
        for (int j = 0; j < kLANE_KEYS; ++j)
        {
            float const weight = softmax[i].weight(scores[j], scaleLog2);
            softmax[i].rowSum += weight;
            tile.weight(row, lane + j * kWARP_SIZE) = fromFloat<T>(weight);
        }
        if (lane == 0)
        {
            tile.factor(row) = factor;
        }
    }
}

// The partial result of a query over a part of the keys, in the workspace: headSize accumulated values, rowMax, rowSum.
// `batchHead` is batch · numHeads + head.
__device__ __forceinline__ float* partialRow(GlobalParams const& p, int32_t part, int32_t batchHead, int32_t query)
{
    size_t const row = (static_cast<size_t>(part) * p.batch * p.numHeads + batchHead) * p.queries + query;
    return p.workspace + row * (p.headSize + 2);
}

// Writes rowMax and rowSum of the rows of updateSoftmax().
template <typename T>
__device__ __forceinline__ void writeStatistics(
    GlobalParams const& p, Block<T> const& block, OnlineSoftmax const (&softmax)[BlockTraits::kWARP_ROWS])
{
#pragma unroll
    for (int i = 0; i < BlockTraits::kWARP_ROWS; ++i)
    {
        int32_t const row = threadIdx.x / kWARP_SIZE + i * BlockTraits::kWARPS;
        float const rowSum = warpSum<kWARP_SIZE>(softmax[i].rowSum);
        if (threadIdx.x % kWARP_SIZE == 0 && row < block.numQueries)
        {
            float* const statistics = partialRow(p, blockIdx.x, blockIdx.z, block.firstQuery + row) + p.headSize;
            statistics[0] = softmax[i].rowMax;
            statistics[1] = rowSum;
        }
    }
}

} // namespace lfx::global
