// GlobalAttention in float16 and bfloat16, on tensor cores.
#pragma once

#include "global/block.cuh"

namespace lfx::global
{

template <int kMAX_HEAD_SIZE>
struct TensorCoreTraits : BlockTraits
{
    static constexpr int kKEYS = tileKeys(kMAX_HEAD_SIZE); // of a tile
    static constexpr int kGROUP_KEYS = 8;                  // a warp computes the scores of 8 keys
    static constexpr int kGROUPS = kKEYS / kGROUP_KEYS;
    static constexpr int kHEAD_PARTS = kWARPS / kGROUPS; // warps of the same keys, each with its part of the head
    static constexpr int kWARP_COLUMNS = 16;             // of the context that a warp computes at once
    static constexpr int kWARP_STEPS = kMAX_HEAD_SIZE / kWARP_COLUMNS / kWARPS;
    static constexpr int kCHUNK = 8;                                               // elements of a 16-byte copy
    static constexpr int kCOPY_THREADS = min(kMAX_HEAD_SIZE / kCHUNK, kWARP_SIZE); // that copy a row
};

// A block's queries, a tile of keys or values, and their scores. With a head of 1024 it takes 99 KiB,
// all that a block has on compute capability 8.6, 8.9 and 12.0.
template <typename T, int kMAX_HEAD_SIZE>
struct SharedMemory
{
    using Traits = TensorCoreTraits<kMAX_HEAD_SIZE>;
    using Scores = ScoreTile<T, Traits::kKEYS>;

    __device__ __forceinline__ explicit SharedMemory(int32_t headSize)
        : width(widthOf(headSize))
        , stride(strideOf(headSize))
        , queries(static_cast<T*>(sharedMemory()))
        , tile(queries + Traits::kQUERIES * stride)
        , scores{tile + Traits::kKEYS * stride}
    {
    }

    static size_t bytes(int32_t headSize)
    {
        return sizeof(T) * (Traits::kQUERIES + Traits::kKEYS) * strideOf(headSize) + Scores::kBYTES;
    }

    // The head size, rounded up to two steps of mma().
    LFX_HOST_DEVICE static int32_t widthOf(int32_t headSize)
    {
        return ceilDiv(headSize, 32) * 32;
    }

    // Rows are padded by 16 bytes to avoid bank conflicts.
    LFX_HOST_DEVICE static int32_t strideOf(int32_t headSize)
    {
        return widthOf(headSize) + 8;
    }

    int32_t width;
    int32_t stride;
    T* queries;
    T* tile; // keys, then values
    Scores scores;
};

// Starts the copy of rows of the head. Rows from `validRows` on, masked rows and columns past the end of the head are
// zero-filled.
template <int kMAX_HEAD_SIZE, typename T>
__device__ __forceinline__ void copyRows(T* target, SharedMemory<T, kMAX_HEAD_SIZE> const& shared, T const* source,
    int64_t sourceStride, int32_t rows, int32_t validRows, int32_t headSize, int32_t const* mask)
{
    using Traits = TensorCoreTraits<kMAX_HEAD_SIZE>;
    constexpr int kROWS = Traits::kTHREADS / Traits::kCOPY_THREADS; // at once
    constexpr int kCOLUMNS = Traits::kCOPY_THREADS * Traits::kCHUNK;
    for (int32_t row = threadIdx.x / Traits::kCOPY_THREADS; row < rows; row += kROWS)
    {
        bool const valid = row < validRows && (mask == nullptr || mask[row] != 0);
        int32_t const firstColumn = threadIdx.x % Traits::kCOPY_THREADS * Traits::kCHUNK;
        for (int32_t column = firstColumn; column < shared.width; column += kCOLUMNS)
        {
            copyAsync(target + row * shared.stride + column, source + row * sourceStride + column,
                valid && column < headSize);
        }
    }
}

// Each warp computes 8 keys over a part of the head; the warps of the same keys add their partial scores in shared
// memory. Ends with a barrier: the scores are complete, and the keys may be overwritten.
template <typename T, int kMAX_HEAD_SIZE>
__device__ __forceinline__ void computeScores(SharedMemory<T, kMAX_HEAD_SIZE> const& shared)
{
    using Traits = TensorCoreTraits<kMAX_HEAD_SIZE>;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    int32_t const warp = threadIdx.x / kWARP_SIZE;
    int32_t const firstKey = warp % Traits::kGROUPS * Traits::kGROUP_KEYS;
    int32_t const part = warp / Traits::kGROUPS;
    int32_t const steps = shared.width / 32;
    float scores[4] = {};
    for (int32_t step = steps * part / Traits::kHEAD_PARTS; step < steps * (part + 1) / Traits::kHEAD_PARTS; ++step)
    {
        uint32_t b[4];
        loadMatrices(b, shared.tile + (firstKey + lane % 8) * shared.stride + step * 32 + lane / 8 * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            uint32_t a[4];
            loadMatrices(a, shared.queries + lane % 16 * shared.stride + step * 32 + i * 16 + lane / 16 * 8);
            mma<T>(scores, a, b[2 * i], b[2 * i + 1]);
        }
    }
#pragma unroll
    for (int turn = Traits::kHEAD_PARTS - 1; turn >= 0; --turn)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            float& score = shared.scores.score(lane / 4 + i / 2 * 8, firstKey + lane % 4 * 2 + i % 2);
            if (part == turn)
            {
                score = turn == Traits::kHEAD_PARTS - 1 ? scores[i] : score + scores[i];
            }
        }
        __syncthreads();
    }
}

// The context that a warp accumulates: 16 queries by 16 columns in each step; step s of warp w has columns
// (w + s · kWARPS) · 16 and on.
template <int kMAX_HEAD_SIZE>
struct WarpColumns
{
    using Traits = TensorCoreTraits<kMAX_HEAD_SIZE>;

    __device__ __forceinline__ static int32_t first(int step)
    {
        return (threadIdx.x / kWARP_SIZE + step * Traits::kWARPS) * Traits::kWARP_COLUMNS;
    }

    float acc[Traits::kWARP_STEPS][2][4] = {};
};

// Rescales the context and adds the tile's values, weighted.
template <typename T, int kMAX_HEAD_SIZE>
__device__ __forceinline__ void accumulate(
    WarpColumns<kMAX_HEAD_SIZE>& columns, SharedMemory<T, kMAX_HEAD_SIZE> const& shared)
{
    using Traits = TensorCoreTraits<kMAX_HEAD_SIZE>;
    constexpr int kKEY_STEPS = Traits::kKEYS / 16;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    float const factor[2] = {shared.scores.factor(lane / 4), shared.scores.factor(lane / 4 + 8)};
    uint32_t a[kKEY_STEPS][4];
#pragma unroll
    for (int keyStep = 0; keyStep < kKEY_STEPS; ++keyStep)
    {
        loadMatrices(a[keyStep], &shared.scores.weight(lane % 16, keyStep * 16 + lane / 16 * 8));
    }
#pragma unroll
    for (int step = 0; step < Traits::kWARP_STEPS; ++step)
    {
        float (&acc)[2][4] = columns.acc[step];
        int32_t const column = columns.first(step);
        if (column >= shared.width)
        {
            break;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            acc[i / 4][i % 4] *= factor[i % 4 / 2];
        }
#pragma unroll
        for (int keyStep = 0; keyStep < kKEY_STEPS; ++keyStep)
        {
            int32_t const key = keyStep * 16 + lane % 8 + lane / 8 % 2 * 8;
            uint32_t b[4];
            loadMatricesTransposed(b, shared.tile + key * shared.stride + column + lane / 16 * 8);
            mma<T>(acc[0], a[keyStep], b[0], b[1]);
            mma<T>(acc[1], a[keyStep], b[2], b[3]);
        }
    }
}

template <typename T, int kMAX_HEAD_SIZE>
__device__ __forceinline__ void writePartialRows(
    GlobalParams const& p, Block<T> const& block, WarpColumns<kMAX_HEAD_SIZE> const& columns)
{
    int32_t const lane = threadIdx.x % kWARP_SIZE;
#pragma unroll
    for (int step = 0; step < TensorCoreTraits<kMAX_HEAD_SIZE>::kWARP_STEPS; ++step)
    {
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            int32_t const row = lane / 4 + i % 4 / 2 * 8;
            int32_t const column = columns.first(step) + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (row < block.numQueries && column < p.headSize)
            {
                partialRow(p, blockIdx.x, blockIdx.z, block.firstQuery + row)[column] = columns.acc[step][i / 4][i % 4];
            }
        }
    }
}

// kMAX_HEAD_SIZE: kSMALL_HEAD_SIZE or kMAX_GLOBAL_HEAD_SIZE.
template <typename T, int kMAX_HEAD_SIZE>
__global__ void __launch_bounds__(BlockTraits::kTHREADS) globalAttentionTensorCores(GlobalParams p)
{
    using Traits = TensorCoreTraits<kMAX_HEAD_SIZE>;
    SharedMemory<T, kMAX_HEAD_SIZE> const shared(p.headSize);
    Block<T> const block(p);
    float const scaleLog2 = p.scale * kLOG2E;
    copyRows(
        shared.queries, shared, block.queries, p.queryStride, Traits::kQUERIES, block.numQueries, p.headSize, nullptr);
    WarpColumns<kMAX_HEAD_SIZE> columns;
    OnlineSoftmax softmax[Traits::kWARP_ROWS];
    for (int32_t firstKey = block.firstKey; firstKey < block.endKey; firstKey += Traits::kKEYS)
    {
        int32_t const numKeys = min(block.endKey - firstKey, Traits::kKEYS);
        int32_t const* const mask = block.mask + firstKey;
        auto const copyTile = [&](T const* tensor, int64_t stride) {
            copyRows(shared.tile, shared, tensor + firstKey * stride, stride, Traits::kKEYS, numKeys, p.headSize, mask);
            commitCopies();
        };
        __syncthreads(); // every thread is done with the values of the previous tile
        copyTile(block.keys, p.keyStride);
        waitForCopies<0>();
        __syncthreads();
        computeScores(shared);
        if (p.key != p.value || p.keyStride != p.valueStride)
        {
            copyTile(block.values, p.valueStride);
        }
        updateSoftmax(softmax, shared.scores, scaleLog2, [&](int32_t key) { return key < numKeys && mask[key] != 0; });
        waitForCopies<0>();
        __syncthreads(); // weights and values are complete
        accumulate(columns, shared);
    }
    writePartialRows(p, block, columns);
    writeStatistics(p, block, softmax);
}

} // namespace lfx::global
