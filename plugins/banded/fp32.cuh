// BandedAttention in float32, without tensor cores.
#pragma once

#include "banded/block.cuh"
#include "softmax.cuh"

namespace lfx::banded
{

// A thread computes 4 queries; the 8 threads of the same queries share the keys of a tile, and then the columns.
template <int kD>
struct Fp32Traits : BlockTraits
{
    static constexpr int kQUERIES = 64;
    static constexpr int kKEYS = 32; // of a tile
    static constexpr int kTHREAD_QUERIES = 4;
    static constexpr int kROW_THREADS = kTHREADS / (kQUERIES / kTHREAD_QUERIES);
    static constexpr int kTHREAD_KEYS = kKEYS / kROW_THREADS;
    static constexpr int kVECTOR = 4;                                   // floats of a 16-byte access
    static constexpr int kTHREAD_VECTORS = kD / kVECTOR / kROW_THREADS; // of a row of the context
    // Rows in shared memory are padded to avoid bank conflicts. The rows of a warp's four groups of 8 threads are four
    // strides apart, which puts their weights into four different groups of 8 banks.
    static constexpr int kSTRIDE = kD + kVECTOR;
    static constexpr int kWEIGHT_STRIDE = kKEYS + 2;
    static_assert(kTHREAD_QUERIES * kWEIGHT_STRIDE % 32 == 8, "weights without bank conflicts");
    // Blocks that a multiprocessor should hold; 0: nvcc chooses. With head size 32 it would spill to hold six.
    static constexpr int kMIN_BLOCKS = kD == 32 ? 5 : 0;
    using Scores = float[kTHREAD_QUERIES][kTHREAD_KEYS];
    // Queries, keys, values and weights.
    static constexpr size_t kSHARED_BYTES
        = sizeof(float) * ((kQUERIES + 2 * kKEYS) * kSTRIDE + kQUERIES * kWEIGHT_STRIDE);
};

// A thread's part of the result. Its queries are firstRow to firstRow + 3, its keys every eighth from `column` on, its
// columns of the context every eighth vector.
template <int kD>
struct Fp32Rows
{
    using Traits = Fp32Traits<kD>;

    __device__ __forceinline__ Fp32Rows()
        : firstRow(threadIdx.x / Traits::kROW_THREADS * Traits::kTHREAD_QUERIES)
        , column(threadIdx.x % Traits::kROW_THREADS)
    {
    }

    int32_t firstRow;
    int32_t column;
    float acc[Traits::kTHREAD_QUERIES][Traits::kTHREAD_VECTORS * Traits::kVECTOR] = {};
    OnlineSoftmax softmax[Traits::kTHREAD_QUERIES];
};

// Starts the copy of a tile; positionOf(row) is -1 for rows to fill with zeros.
template <int kD, int kROWS, typename PositionOf>
__device__ __forceinline__ void copyTile(Block<Fp32Traits<kD>::kQUERIES> const& block, float* tile, void const* tensor,
    int64_t stride, PositionOf positionOf)
{
    using Traits = Fp32Traits<kD>;
    constexpr int kROW_VECTORS = kD / Traits::kVECTOR;
    float const* const source = static_cast<float const*>(tensor);
    for (int32_t i = threadIdx.x; i < kROWS * kROW_VECTORS; i += Traits::kTHREADS)
    {
        int32_t const row = i / kROW_VECTORS;
        int32_t const column = i % kROW_VECTORS * Traits::kVECTOR;
        int32_t const position = positionOf(row);
        bool const valid = position >= 0 && column < block.params.headSize;
        float const* const from = valid ? source + block.template offset<int32_t>(position, stride) + column : source;
        copyAsync(tile + row * Traits::kSTRIDE + column, from, valid);
    }
}

template <int kD>
__device__ __forceinline__ void computeScores(
    typename Fp32Traits<kD>::Scores& scores, Fp32Rows<kD> const& rows, float const* queries, float const* keys)
{
    using Traits = Fp32Traits<kD>;
    for (int32_t d = 0; d < kD; d += Traits::kVECTOR)
    {
        float4 k[Traits::kTHREAD_KEYS];
#pragma unroll
        for (int j = 0; j < Traits::kTHREAD_KEYS; ++j)
        {
            int32_t const key = rows.column + j * Traits::kROW_THREADS;
            k[j] = *reinterpret_cast<float4 const*>(keys + key * Traits::kSTRIDE + d);
        }
#pragma unroll
        for (int i = 0; i < Traits::kTHREAD_QUERIES; ++i)
        {
            float4 const q = *reinterpret_cast<float4 const*>(queries + (rows.firstRow + i) * Traits::kSTRIDE + d);
#pragma unroll
            for (int j = 0; j < Traits::kTHREAD_KEYS; ++j)
            {
                scores[i][j] += q.x * k[j].x + q.y * k[j].y + q.z * k[j].z + q.w * k[j].w;
            }
        }
    }
}

// isVisible(query, key) counts queries in the block and keys in the tile.
template <int kD, typename IsVisible>
__device__ __forceinline__ void maskScores(
    typename Fp32Traits<kD>::Scores& scores, Fp32Rows<kD> const& rows, IsVisible isVisible)
{
    using Traits = Fp32Traits<kD>;
#pragma unroll
    for (int i = 0; i < Traits::kTHREAD_QUERIES; ++i)
    {
#pragma unroll
        for (int j = 0; j < Traits::kTHREAD_KEYS; ++j)
        {
            bool const visible = isVisible(rows.firstRow + i, rows.column + j * Traits::kROW_THREADS);
            scores[i][j] = visible ? scores[i][j] : kNEG_INF;
        }
    }
}

// Rescales the rows to the tile's maximum and writes its weights to shared memory.
template <int kD>
__device__ __forceinline__ void updateSoftmax(
    Fp32Rows<kD>& rows, typename Fp32Traits<kD>::Scores const& scores, float* weights, float scaleLog2)
{
    using Traits = Fp32Traits<kD>;
#pragma unroll
    for (int i = 0; i < Traits::kTHREAD_QUERIES; ++i)
    {
        float tileMax = kNEG_INF;
#pragma unroll
        for (int j = 0; j < Traits::kTHREAD_KEYS; ++j)
        {
            tileMax = fmaxf(tileMax, scores[i][j]);
        }
        float const factor = rows.softmax[i].rescale(warpMax<Traits::kROW_THREADS>(tileMax), scaleLog2);
#pragma unroll
        for (float& element : rows.acc[i])
        {
            element *= factor;
        }
#pragma unroll
        for (int j = 0; j < Traits::kTHREAD_KEYS; ++j)
        {
            float const weight = rows.softmax[i].weight(scores[i][j], scaleLog2);
            rows.softmax[i].rowSum += weight;
            int32_t const key = rows.column + j * Traits::kROW_THREADS;
            weights[(rows.firstRow + i) * Traits::kWEIGHT_STRIDE + key] = weight;
        }
    }
}

template <int kD>
__device__ __forceinline__ void accumulate(Fp32Rows<kD>& rows, float const* weights, float const* values)
{
    using Traits = Fp32Traits<kD>;
    for (int32_t key = 0; key < Traits::kKEYS; ++key)
    {
#pragma unroll
        for (int c = 0; c < Traits::kTHREAD_VECTORS; ++c)
        {
            int32_t const column = (rows.column + c * Traits::kROW_THREADS) * Traits::kVECTOR;
            float4 const v = *reinterpret_cast<float4 const*>(values + key * Traits::kSTRIDE + column);
#pragma unroll
            for (int i = 0; i < Traits::kTHREAD_QUERIES; ++i)
            {
                float const weight = weights[(rows.firstRow + i) * Traits::kWEIGHT_STRIDE + key];
                rows.acc[i][4 * c] += weight * v.x;
                rows.acc[i][4 * c + 1] += weight * v.y;
                rows.acc[i][4 * c + 2] += weight * v.z;
                rows.acc[i][4 * c + 3] += weight * v.w;
            }
        }
    }
}

template <int kD>
__device__ __forceinline__ void writeContext(Block<Fp32Traits<kD>::kQUERIES> const& block, Fp32Rows<kD> const& rows)
{
    using Traits = Fp32Traits<kD>;
#pragma unroll
    for (int i = 0; i < Traits::kTHREAD_QUERIES; ++i)
    {
        float const inverse = rows.softmax[i].template inverseSum<Traits::kROW_THREADS>();
        int32_t const row = rows.firstRow + i;
        int32_t const content = block.rowContent[row];
        if (content == kNO_ROW)
        {
            continue;
        }
        float* const target = static_cast<float*>(block.params.context)
            + block.template offset<int32_t>(block.position(block.firstQuery + row), block.params.contextStride);
#pragma unroll
        for (int c = 0; c < Traits::kTHREAD_VECTORS; ++c)
        {
            int32_t const vector = rows.column + c * Traits::kROW_THREADS;
            if (vector * Traits::kVECTOR >= block.params.headSize)
            {
                continue;
            }
            float const* const acc = &rows.acc[i][c * Traits::kVECTOR];
            uint4 const result = make_uint4(__float_as_uint(acc[0] * inverse), __float_as_uint(acc[1] * inverse),
                __float_as_uint(acc[2] * inverse), __float_as_uint(acc[3] * inverse));
            *reinterpret_cast<uint4*>(target + vector * Traits::kVECTOR)
                = content == kLOCAL_ROW ? result : block.template givenChunk<float>(content, vector);
        }
    }
}

template <int kD>
__device__ __forceinline__ void writeLogSumExp(Block<Fp32Traits<kD>::kQUERIES> const& block, Fp32Rows<kD> const& rows)
{
    using Traits = Fp32Traits<kD>;
#pragma unroll
    for (int i = 0; i < Traits::kTHREAD_QUERIES; ++i)
    {
        float const logSumExp = rows.softmax[i].template logSumExp<Traits::kROW_THREADS>();
        if (rows.column == 0)
        {
            block.writeLogSumExp(rows.firstRow + i, logSumExp);
        }
    }
}

template <int kD>
__global__ void __launch_bounds__(Fp32Traits<kD>::kTHREADS, Fp32Traits<kD>::kMIN_BLOCKS)
    bandedAttentionFp32(BandedParams p)
{
    using Traits = Fp32Traits<kD>;
    float* const queries = static_cast<float*>(sharedMemory());
    float* const keys = queries + Traits::kQUERIES * Traits::kSTRIDE;
    float* const values = keys + Traits::kKEYS * Traits::kSTRIDE;
    float* const weights = values + Traits::kKEYS * Traits::kSTRIDE;
    Block<Traits::kQUERIES> const block(p, weights + Traits::kQUERIES * Traits::kWEIGHT_STRIDE);
    if (block.firstQuery >= block.length)
    {
        return;
    }
    bool const hasLocalRow = block.fillTables();
    TileSequence<Traits::kKEYS> const tiles(block, hasLocalRow);
    Fp32Rows<kD> rows;
    float const scaleLog2 = p.scale * kLOG2E;
    if (tiles.count > 0)
    {
        copyTile<kD, Traits::kQUERIES>(block, queries, p.query, p.queryStride, [&](int32_t row) {
            int32_t const query = block.firstQuery + row;
            return query < block.length ? block.position(query) : -1;
        });
    }
    for (int32_t tile = 0; tile < tiles.count; ++tile)
    {
        bool const isGlobal = tiles.isGlobal(tile);
        int32_t const first = isGlobal ? tiles.firstSlot(tile) : tiles.firstKey(tile);
        auto const keyPosition
            = [&](int32_t key) { return isGlobal ? block.slotPosition(first + key) : block.keyPosition(first + key); };
        __syncthreads(); // every thread is done with the previous tile and its weights
        copyTile<kD, Traits::kKEYS>(block, keys, p.key, p.keyStride, keyPosition);
        copyTile<kD, Traits::kKEYS>(block, values, p.value, p.valueStride, keyPosition);
        commitCopies();
        waitForCopies<0>();
        __syncthreads();
        typename Traits::Scores scores = {};
        computeScores(scores, rows, queries, keys);
        maskScores(scores, rows, [&](int32_t query, int32_t key) {
            return isGlobal ? block.slotPosition(first + key) >= 0
                            : block.isLocal(first + key)
                    && inBand(block.firstQuery + query, first + key, block.window(), block.isCausal());
        });
        updateSoftmax(rows, scores, weights, scaleLog2);
        __syncwarp(); // the 8 threads of a query are in one warp
        accumulate(rows, weights, values);
    }
    writeContext(block, rows);
    if (p.logSumExp != nullptr)
    {
        writeLogSumExp(block, rows);
    }
}

} // namespace lfx::banded
