// BandedAttention in float16 and bfloat16, on tensor cores. As in FlashAttention, scores never leave the registers.
#pragma once

#include "banded/block.cuh"
#include "banded/tensor_core_tiles.cuh"
#include "banded/visibility.cuh"
#include "softmax.cuh"

namespace lfx::banded
{

// A lane holds rows lane / 4 and lane / 4 + 8 of each tile of 16 rows; the four lanes of a row share its columns in the
// layout of mma().
template <typename T, typename Traits>
struct WarpRows
{
    static constexpr int kD = Traits::kD;
    static constexpr int kROW_TILES = Traits::kROW_TILES;

    __device__ __forceinline__ explicit WarpRows(T const* queries)
        : queries(queries)
    {
    }

    // Columns 16 · step to 16 · step + 15 of the queries of a tile.
    __device__ __forceinline__ void loadQueries(uint32_t (&fragment)[4], int tile, int step) const
    {
        int32_t const lane = threadIdx.x % kWARP_SIZE;
        int32_t const row = threadIdx.x / kWARP_SIZE * Traits::kWARP_QUERIES + tile * 16 + lane % 16;
        loadMatrices(fragment, queries + swizzled<kD>(row, step * 2 + lane / 16));
    }

    __device__ __forceinline__ void keepQueries()
    {
#pragma unroll
        for (int step = 0; step < Traits::kKEPT_STEPS; ++step)
        {
#pragma unroll
            for (int tile = 0; tile < kROW_TILES; ++tile)
            {
                loadQueries(fragments[step][tile], tile, step);
            }
        }
    }

    T const* queries; // tile in shared memory
    uint32_t fragments[max(Traits::kKEPT_STEPS, 1)][kROW_TILES][4];
    float acc[kROW_TILES][kD / 8][4] = {};
    LazySoftmax softmax[kROW_TILES][2];
};

// Scores of 16 queries and 8 keys are one `float[4]`, as mma() returns them.
template <typename T, typename Traits, int kROW_TILES, int kN>
__device__ __forceinline__ void computeScores(
    float (&scores)[kROW_TILES][kN][4], WarpRows<T, Traits> const& rows, T const* keys)
{
    constexpr int kD = Traits::kD;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    int32_t const first = swizzled<kD>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kD / 16; ++step)
    {
        T const* const stepKeys = keys + movedRight(first, step * 2);
        uint32_t a[kROW_TILES][4];
#pragma unroll
        for (int tile = 0; tile < kROW_TILES; ++tile)
        {
            if (step < Traits::kKEPT_STEPS)
            {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    a[tile][i] = rows.fragments[step][tile][i];
                }
            }
            else
            {
                rows.loadQueries(a[tile], tile, step);
            }
        }
#pragma unroll
        for (int n = 0; n < kN; n += 2)
        {
            uint32_t b[4];
            loadMatrices(b, stepKeys + n * 8 * kD);
#pragma unroll
            for (int tile = 0; tile < kROW_TILES; ++tile)
            {
                mma<T>(scores[tile][n], a[tile], b[0], b[1]);
                mma<T>(scores[tile][n + 1], a[tile], b[2], b[3]);
            }
        }
    }
}

template <int kROW_TILES, int kN>
__device__ __forceinline__ void maskScores(
    float (&scores)[kROW_TILES][kN][4], Visibility<16 * kROW_TILES> const& visibility)
{
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    uint32_t const keys = visibility.keys >> lane % 4 * 2;
    int32_t const distance = visibility.distance + lane % 4 * 2 - lane / 4;
#pragma unroll
    for (int tile = 0; tile < kROW_TILES; ++tile)
    {
#pragma unroll
        for (int n = 0; n < kN; ++n)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                int const column = n * 8 + i % 2;
                int const row = tile * 16 + i / 2 * 8;
                bool const visible = (keys >> column & 1U) != 0
                    && static_cast<uint32_t>(distance + column - row) <= static_cast<uint32_t>(visibility.last);
                scores[tile][n][i] = visible ? scores[tile][n][i] : kNEG_INF;
            }
        }
    }
}

// Rescales rowSum and acc of the rows whose scores outgrow their reference, if any row of the warp has such scores.
template <typename T, typename Traits, int kROW_TILES, int kN>
__device__ __forceinline__ void updateSoftmax(
    WarpRows<T, Traits>& rows, float const (&scores)[kROW_TILES][kN][4], float scaleLog2)
{
    float max[kROW_TILES][2];
    bool isExceeded = false;
#pragma unroll
    for (int tile = 0; tile < kROW_TILES; ++tile)
    {
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            max[tile][i] = kNEG_INF;
#pragma unroll
            for (int n = 0; n < kN; ++n)
            {
                max[tile][i] = fmaxf(max[tile][i], fmaxf(scores[tile][n][2 * i], scores[tile][n][2 * i + 1]));
            }
            isExceeded |= rows.softmax[tile][i].isExceeded(max[tile][i], scaleLog2);
        }
    }
    if (__ballot_sync(kFULL_WARP, isExceeded) == 0)
    {
        return;
    }
#pragma unroll
    for (int tile = 0; tile < kROW_TILES; ++tile)
    {
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            float const factor = rows.softmax[tile][i].rescale(warpMax<4>(max[tile][i]), scaleLog2);
#pragma unroll
            for (int n = 0; n < Traits::kD / 8; ++n)
            {
                rows.acc[tile][n][2 * i] *= factor;
                rows.acc[tile][n][2 * i + 1] *= factor;
            }
        }
    }
}

// The weights of 16 keys, in the layout of mma(); they are added to the sums of their rows.
template <typename T>
__device__ __forceinline__ void computeWeights(
    uint32_t (&fragment)[4], LazySoftmax (&softmax)[2], float const (*scores)[4], float scaleLog2)
{
#pragma unroll
    for (int half = 0; half < 2; ++half)
    {
        float weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            weights[i] = softmax[i / 2].weight(scores[half][i], scaleLog2);
            softmax[i / 2].rowSum += weights[i];
        }
        fragment[2 * half] = pack<T>(weights[0], weights[1]);
        fragment[2 * half + 1] = pack<T>(weights[2], weights[3]);
    }
}

// Adds the values, weighted by the softmax of the scores.
template <typename T, typename Traits, int kROW_TILES, int kN>
__device__ __forceinline__ void accumulate(
    WarpRows<T, Traits>& rows, float const (&scores)[kROW_TILES][kN][4], T const* values, float scaleLog2)
{
    constexpr int kD = Traits::kD;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    int32_t const lower = swizzled<kD>(lane % 8 + lane / 8 % 2 * 8, lane / 16);
#pragma unroll
    for (int first = 0; first < kN; first += 2) // 16 keys
    {
        uint32_t a[kROW_TILES][4];
#pragma unroll
        for (int tile = 0; tile < kROW_TILES; ++tile)
        {
            computeWeights<T>(a[tile], rows.softmax[tile], scores[tile] + first, scaleLog2);
        }
#pragma unroll
        for (int n = 0; n < kD / 8; n += 2)
        {
            uint32_t b[4];
            loadMatricesTransposed(b, values + movedRight(lower, n) + first * 8 * kD);
#pragma unroll
            for (int tile = 0; tile < kROW_TILES; ++tile)
            {
                mma<T>(rows.acc[tile][n], a[tile], b[0], b[1]);
                mma<T>(rows.acc[tile][n + 1], a[tile], b[2], b[3]);
            }
        }
    }
}

// Attention over the first kKEYS keys of a group; those that the warp sees are among them.
template <int kKEYS, typename T, typename Traits>
__device__ __forceinline__ void attendGroup(WarpRows<T, Traits>& rows, T const* keys, T const* values, float scaleLog2,
    Visibility<Traits::kWARP_QUERIES> const& visibility)
{
    float scores[Traits::kROW_TILES][kKEYS / 8][4] = {};
    computeScores(scores, rows, keys);
    if (kKEYS < visibility.kKEYS || !visibility.isAll())
    {
        maskScores(scores, visibility);
    }
    updateSoftmax(rows, scores, scaleLog2);
    accumulate(rows, scores, values, scaleLog2);
}

// Attention over a tile; visibilityOf(group) says which keys of each group the warp sees.
template <typename T, typename Traits, typename VisibilityOf>
__device__ __forceinline__ void attendTile(
    WarpRows<T, Traits>& rows, T const* keys, T const* values, float scaleLog2, VisibilityOf visibilityOf)
{
#pragma unroll 1
    for (int32_t group = 0; group < Traits::kGROUPS; ++group)
    {
        Visibility<Traits::kWARP_QUERIES> const visibility = visibilityOf(group * Traits::kGROUP_KEYS);
        if (visibility.isNone())
        {
            continue;
        }
        int32_t const offset = group * Traits::kGROUP_KEYS * Traits::kD;
        attendGroup<Traits::kGROUP_KEYS>(rows, keys + offset, values + offset, scaleLog2, visibility);
    }
}

template <typename T, typename Traits>
__device__ __forceinline__ void writeLogSumExp(Block<Traits::kQUERIES> const& block, WarpRows<T, Traits> const& rows)
{
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    int32_t const firstRow = threadIdx.x / kWARP_SIZE * Traits::kWARP_QUERIES;
#pragma unroll
    for (int tile = 0; tile < Traits::kROW_TILES; ++tile)
    {
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            float const logSumExp = rows.softmax[tile][i].template logSumExp<4>();
            if (lane % 4 == 0)
            {
                block.writeLogSumExp(firstRow + tile * 16 + i * 8 + lane / 4, logSumExp);
            }
        }
    }
}

// Normalizes the rows and writes them to the context, through the warp's own rows of the query tile, so that each write
// is of 16 bytes.
template <typename T, typename Traits>
__device__ __forceinline__ void writeContext(
    Block<Traits::kQUERIES> const& block, WarpRows<T, Traits> const& rows, T* queries)
{
    constexpr int kD = Traits::kD;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    int32_t const firstRow = threadIdx.x / kWARP_SIZE * Traits::kWARP_QUERIES;
    __syncwarp(); // every lane has read its queries
#pragma unroll
    for (int tile = 0; tile < Traits::kROW_TILES; ++tile)
    {
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            float const inverse = rows.softmax[tile][i].template inverseSum<4>();
            int32_t const row = firstRow + tile * 16 + i * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < Traits::kCHUNKS; ++n)
            {
                reinterpret_cast<uint32_t*>(queries + swizzled<kD>(row, n))[lane % 4]
                    = pack<T>(rows.acc[tile][n][2 * i] * inverse, rows.acc[tile][n][2 * i + 1] * inverse);
            }
        }
    }
    if (block.params.logSumExp != nullptr)
    {
        writeLogSumExp(block, rows);
    }
    __syncwarp();
    for (int32_t i = lane; i < Traits::kWARP_QUERIES * Traits::kCHUNKS; i += kWARP_SIZE)
    {
        int32_t const row = firstRow + i / Traits::kCHUNKS;
        int32_t const chunk = i % Traits::kCHUNKS;
        int32_t const content = block.rowContent[row];
        if (content != kNO_ROW && chunk * Traits::kCHUNK < block.params.headSize)
        {
            uint4 const result = content == kLOCAL_ROW
                ? *reinterpret_cast<uint4 const*>(queries + swizzled<kD>(row, chunk))
                : block.template givenChunk<T>(content, chunk);
            T* const target = static_cast<T*>(block.params.context)
                + block.offset(block.position(block.firstQuery + row), block.params.contextStride)
                + chunk * Traits::kCHUNK;
            *reinterpret_cast<uint4*>(target) = result;
        }
    }
}

template <typename T, int kD, int kROW_TILES>
__global__ void __launch_bounds__(TensorCoreTraits<kD, kROW_TILES>::kTHREADS,
    TensorCoreTraits<kD, kROW_TILES>::kMIN_BLOCKS) bandedAttentionTensorCores(BandedParams p)
{
    using Traits = TensorCoreTraits<kD, kROW_TILES>;
    T* const queries = static_cast<T*>(sharedMemory());
    T* const keys = queries + Traits::kQUERIES_SIZE; // two tiles: one is computed while the next is copied
    T* const values = keys + 2 * Traits::kTILE_SIZE;
    Block<Traits::kQUERIES> const block(p, values + 2 * Traits::kTILE_SIZE);
    if (block.firstQuery >= block.length)
    {
        return;
    }
    bool const hasLocalRow = block.fillTables();
    TileSequence<Traits::kKEYS> const tiles(block, hasLocalRow);
    auto const copyTile = [&](int32_t tile) {
        ThreadCopy<kD> const copy(p); // for each tile: it would take five registers from the products
        int32_t const buffer = tile % 2 * Traits::kTILE_SIZE;
        if (tiles.isGlobal(tile))
        {
            copyGlobalTokens(block, copy, keys + buffer, values + buffer, tiles.firstSlot(tile), tiles.slotsFrom(tile));
        }
        else
        {
            copyBand(block, copy, keys + buffer, values + buffer, tiles.firstKey(tile));
        }
        commitCopies();
    };
    WarpRows<T, Traits> rows(queries);
    float const scaleLog2 = p.scale * kLOG2E;
    if (tiles.count > 0)
    {
        copyQueries(block, ThreadCopy<kD>(p), queries);
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
        int32_t const buffer = tile % 2 * Traits::kTILE_SIZE;
        if (Traits::kGROUPS_FEW_KEYS && tiles.isGlobal(tile) && tiles.slotsFrom(tile) <= Traits::kFEW_KEYS)
        {
            attendGroup<Traits::kFEW_KEYS>(
                rows, keys + buffer, values + buffer, scaleLog2, visibleSlots<Traits>(block, tiles.firstSlot(tile)));
        }
        else
        {
            attendTile(rows, keys + buffer, values + buffer, scaleLog2, [&](int32_t key) {
                return tiles.isGlobal(tile) ? visibleSlots<Traits>(block, tiles.firstSlot(tile) + key)
                                            : visibleKeys<Traits>(block, tiles.firstKey(tile) + key);
            });
        }
    }
    writeContext(block, rows, queries);
}

} // namespace lfx::banded
