// BandedAttention in float16 and bfloat16, on tensor cores. As in FlashAttention, scores never leave the registers.
#pragma once

#include "banded/block.cuh"
#include "banded/tensor_core_tiles.cuh"
#include "banded/visibility.cuh"
#include "softmax.cuh"

namespace lfx::banded
{

// A lane holds two rows, lane / 4 and lane / 4 + 8; the four lanes of a row share its columns in the layout of mma().
template <typename T, int kD>
struct WarpRows
{
    using Traits = TensorCoreTraits<kD>;

    __device__ __forceinline__ explicit WarpRows(T const* queries)
        : queries(queries)
    {
    }

    // Columns 16 · step to 16 · step + 15 of the queries.
    __device__ __forceinline__ void loadQueries(uint32_t (&fragment)[4], int step) const
    {
        int32_t const lane = threadIdx.x % kWARP_SIZE;
        int32_t const row = threadIdx.x / kWARP_SIZE * Traits::kWARP_QUERIES + lane % 16;
        loadMatrices(fragment, queries + swizzled<kD>(row, step * 2 + lane / 16));
    }

    __device__ __forceinline__ void keepQueries()
    {
        if constexpr (Traits::kKEEPS_QUERIES)
        {
#pragma unroll
            for (int step = 0; step < kD / 16; ++step)
            {
                loadQueries(fragments[step], step);
            }
        }
    }

    T const* queries; // tile in shared memory
    uint32_t fragments[Traits::kKEEPS_QUERIES ? kD / 16 : 1][4];
    float acc[kD / 8][4] = {};
    OnlineSoftmax softmax[2];
};

// Scores of the warp's queries and 8 keys are one `float[4]`, as mma() returns them; kN of those are computed together.
template <int kN, typename T, int kD>
__device__ __forceinline__ void computeScores(float (&scores)[kN][4], WarpRows<T, kD> const& rows, T const* keys)
{
    int32_t const lane = threadIdx.x % kWARP_SIZE;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step)
    {
        uint32_t a[4];
        if constexpr (TensorCoreTraits<kD>::kKEEPS_QUERIES)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                a[i] = rows.fragments[step][i];
            }
        }
        else
        {
            rows.loadQueries(a, step);
        }
#pragma unroll
        for (int n = 0; n < kN; n += 2)
        {
            uint32_t b[4];
            loadMatrices(b, keys + swizzled<kD>(n * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
            mma<T>(scores[n], a, b[0], b[1]);
            mma<T>(scores[n + 1], a, b[2], b[3]);
        }
    }
}

template <int kN>
__device__ __forceinline__ void maskScores(float (&scores)[kN][4], Visibility const& visibility)
{
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    uint32_t const keys = static_cast<uint32_t>(visibility.keys) >> lane % 4 * 2;
    int32_t const distance = visibility.distance + lane % 4 * 2 - lane / 4;
#pragma unroll
    for (int n = 0; n < kN; ++n)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            int const column = n * 8 + i % 2;
            bool const visible
                = (keys >> column & 1U) != 0 && static_cast<uint32_t>(distance + column - i / 2 * 8) <= visibility.last;
            scores[n][i] = visible ? scores[n][i] : kNEG_INF;
        }
    }
}

// Rescales rowSum and acc to the maximum of the new scores.
template <int kN, typename T, int kD>
__device__ __forceinline__ void updateSoftmax(WarpRows<T, kD>& rows, float const (&scores)[kN][4], float scaleLog2)
{
    float tileMax[2] = {kNEG_INF, kNEG_INF};
#pragma unroll
    for (int n = 0; n < kN; ++n)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            tileMax[i / 2] = fmaxf(tileMax[i / 2], scores[n][i]);
        }
    }
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        factor[i] = rows.softmax[i].rescale(warpMax<4>(tileMax[i]), scaleLog2);
    }
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            rows.acc[n][i] *= factor[i / 2];
        }
    }
}

// Adds the values, weighted by the softmax of the scores.
template <int kN, typename T, int kD>
__device__ __forceinline__ void accumulate(
    WarpRows<T, kD>& rows, float const (&scores)[kN][4], T const* values, float scaleLog2)
{
    int32_t const lane = threadIdx.x % kWARP_SIZE;
#pragma unroll
    for (int first = 0; first < kN; first += 2) // 16 keys
    {
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            float weights[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                weights[i] = rows.softmax[i / 2].weight(scores[first + half][i], scaleLog2);
                rows.softmax[i / 2].rowSum += weights[i];
            }
            a[2 * half] = pack<T>(weights[0], weights[1]);
            a[2 * half + 1] = pack<T>(weights[2], weights[3]);
        }
#pragma unroll
        for (int n = 0; n < kD / 8; n += 2)
        {
            uint32_t b[4];
            loadMatricesTransposed(b, values + swizzled<kD>(first * 8 + lane % 8 + lane / 8 % 2 * 8, n + lane / 16));
            mma<T>(rows.acc[n], a, b[0], b[1]);
            mma<T>(rows.acc[n + 1], a, b[2], b[3]);
        }
    }
}

// Attention over kGROUPS groups of 16 keys; with kMASKED only the visible ones.
template <int kGROUPS, bool kMASKED, typename T, int kD>
__device__ __forceinline__ void attendGroups(
    WarpRows<T, kD>& rows, T const* keys, T const* values, float scaleLog2, Visibility const& visibility)
{
    float scores[2 * kGROUPS][4] = {};
    computeScores(scores, rows, keys);
    if constexpr (kMASKED)
    {
        maskScores(scores, visibility);
    }
    updateSoftmax(rows, scores, scaleLog2);
    accumulate(rows, scores, values, scaleLog2);
}

// Computes the tile as a whole if all queries see all of its keys, otherwise only the groups with a visible key.
template <typename T, int kD>
__device__ __forceinline__ void attendTile(
    WarpRows<T, kD>& rows, T const* keys, T const* values, float scaleLog2, Visibility const& visibility)
{
    using Traits = TensorCoreTraits<kD>;
    if (visibility.all)
    {
        attendGroups<Traits::kGROUPS, false>(rows, keys, values, scaleLog2, visibility);
        return;
    }
#pragma unroll 1
    for (int32_t group = visibility.groups.begin; group < visibility.groups.end; ++group)
    {
        Visibility const rest = visibility.from(group);
        if ((rest.keys & 0xffffU) != 0)
        {
            int32_t const offset = group * Traits::kGROUP_KEYS * kD;
            attendGroups<1, true>(rows, keys + offset, values + offset, scaleLog2, rest);
        }
    }
}

// Normalizes the rows and writes them to the context, through the warp's own rows of the query tile, so that each write
// is of 16 bytes.
template <typename T, int kD>
__device__ __forceinline__ void writeContext(Block const& block, WarpRows<T, kD> const& rows, T* tile)
{
    using Traits = TensorCoreTraits<kD>;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    int32_t const firstRow = threadIdx.x / kWARP_SIZE * Traits::kWARP_QUERIES;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        inverse[i] = rows.softmax[i].template inverseSum<4>();
    }
    __syncwarp(); // every lane has read its queries
#pragma unroll
    for (int n = 0; n < Traits::kCHUNKS; ++n)
    {
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            T* const chunk = tile + swizzled<kD>(firstRow + lane / 4 + i * 8, n);
            reinterpret_cast<uint32_t*>(chunk)[lane % 4]
                = pack<T>(rows.acc[n][2 * i] * inverse[i], rows.acc[n][2 * i + 1] * inverse[i]);
        }
    }
    __syncwarp();
    for (int32_t i = lane; i < Traits::kWARP_QUERIES * Traits::kCHUNKS; i += kWARP_SIZE)
    {
        int32_t const row = firstRow + i / Traits::kCHUNKS;
        int32_t const chunk = i % Traits::kCHUNKS;
        int32_t const query = block.firstQuery + row;
        if (query < block.length && chunk * Traits::kCHUNK < block.params.headSize)
        {
            int32_t const content = block.rowContent[row];
            uint4 const result = content == kLOCAL_ROW
                ? *reinterpret_cast<uint4 const*>(tile + swizzled<kD>(row, chunk))
                : block.givenChunk<T>(content, chunk);
            T* const target
                = static_cast<T*>(block.params.context) + block.offset(block.position(query)) + chunk * Traits::kCHUNK;
            *reinterpret_cast<uint4*>(target) = result;
        }
    }
}

template <typename T, int kD>
__global__ void __launch_bounds__(TensorCoreTraits<kD>::kTHREADS, TensorCoreTraits<kD>::kMIN_BLOCKS)
    bandedAttentionTensorCores(BandedParams p)
{
    using Traits = TensorCoreTraits<kD>;
    T* const queries = static_cast<T*>(sharedMemory());
    T* const keys = queries + Traits::kTILE_SIZE; // two tiles: one is computed while the next is copied
    T* const values = keys + 2 * Traits::kTILE_SIZE;
    Block const block(p, values + 2 * Traits::kTILE_SIZE);
    if (block.firstQuery >= block.length)
    {
        return;
    }
    bool const hasLocalRow = block.fillTables();
    TileSequence<Traits::kKEYS> const tiles(block, hasLocalRow);
    ThreadCopy<kD> const copy(p);
    auto const globalGroups = [&](int32_t tile) {
        return min(ceilDiv(tiles.numSlots - tiles.firstSlot(tile), Traits::kGROUP_KEYS), Traits::kGROUPS);
    };
    auto const copyTile = [&](int32_t tile) {
        int32_t const buffer = tile % 2 * Traits::kTILE_SIZE;
        if (tiles.isGlobal(tile))
        {
            copyGlobalTokens(block, copy, keys + buffer, values + buffer, tiles.firstSlot(tile), globalGroups(tile));
        }
        else
        {
            copyBand(block, copy, keys + buffer, values + buffer, tiles.firstKey(tile));
        }
        commitCopies();
    };
    WarpRows<T, kD> rows(queries);
    float const scaleLog2 = p.scale * kLOG2E;
    if (tiles.count > 0)
    {
        copyQueries(block, copy, queries);
        copyTile(0); // in one group with the queries
    }
    for (int32_t tile = 0; tile < tiles.count; ++tile)
    {
        waitForCopies<0>();
        __syncthreads(); // the tile has arrived, and every thread is done with the previous one
        if (tile + 1 < tiles.count)
        {
            copyTile(tile + 1);
        }
        if (tile == 0)
        {
            rows.keepQueries();
        }
        Visibility const visibility = tiles.isGlobal(tile)
            ? visibleGlobalTokens(block, tiles.firstSlot(tile), globalGroups(tile))
            : visibleBand<Traits>(block, tiles.firstKey(tile));
        int32_t const buffer = tile % 2 * Traits::kTILE_SIZE;
        attendTile<T, kD>(rows, keys + buffer, values + buffer, scaleLog2, visibility);
    }
    writeContext(block, rows, queries);
}

} // namespace lfx::banded
