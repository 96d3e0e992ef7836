// BandedAttention in float16 and bfloat16 on GPUs of compute capability 9.0, for heads of 40 to 64. The products of a
// warpgroup read keys and values from shared memory, and take fewer instructions than those of a warp.
//
// Source: PTX ISA, "wgmma"; Shah et al. 2024, arXiv:2407.08608.
#pragma once

#include "banded/tensor_cores.cuh"

namespace lfx::banded
{

struct WarpgroupTraits : TensorCoreTraits<64, 1>
{
    static constexpr int kMIN_BLOCKS = 4;
};

#ifdef LFX_WARPGROUPS

// Masks the scores for which isVisible(n, i) is false.
template <int kN, typename IsVisible>
__device__ __forceinline__ void keepVisible(float (&scores)[kN][4], IsVisible isVisible)
{
#pragma unroll
    for (int n = 0; n < kN; ++n)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            scores[n][i] = isVisible(n, i) ? scores[n][i] : kNEG_INF;
        }
    }
}

// Column of scores[n][i], from the lane's first, less the row that it is of, from the lane's upper one.
__device__ __forceinline__ constexpr int columnLessRow(int n, int i)
{
    return n * 8 + i % 2 - i / 2 * 8;
}

// Masks the scores of the keys whose bit is 0.
template <int kN>
__device__ __forceinline__ void keepKeys(float (&scores)[kN][4], uint32_t const (&keys)[2])
{
    int32_t const column = threadIdx.x % 4 * 2;
    uint32_t const own[2] = {keys[0] >> column, keys[1] >> column};
    keepVisible(scores, [&](int n, int i) { return (own[n / 4] >> (n % 4 * 8 + i % 2) & 1U) != 0; });
}

// Attention over the first kKEYS keys of a tile; mask(scores) masks those that a row does not see.
template <int kKEYS, typename T, typename Mask>
__device__ __forceinline__ void attendKeys(
    WarpRows<T, WarpgroupTraits>& rows, T const* keys, T const* values, float scaleLog2, Mask mask)
{
    float scores[1][kKEYS / 8][4];
    pinRegisters(scores[0]);
    beginProducts();
    startProduct<T, false>(scores[0], rows.fragments[0][0], SharedRows(keys));
#pragma unroll
    for (int step = 1; step < WarpgroupTraits::kD / 16; ++step)
    {
        startProduct<T, true>(scores[0], rows.fragments[step][0], SharedRows(keys).right(step * 16));
    }
    finishProducts<T>(scores[0]);
    mask(scores[0]);
    updateSoftmax(rows, scores, scaleLog2);
    uint32_t weights[kKEYS / 16][4];
    pinRegisters(rows.acc[0]);
#pragma unroll
    for (int step = 0; step < kKEYS / 16; ++step) // the first sums are computed beside the weights of the next ones
    {
        computeWeights<T>(weights[step], rows.softmax[0], scores[0] + 2 * step, scaleLog2);
        beginProducts();
        startSum<T>(rows.acc[0], weights[step], SharedRows(values).down(step * 16));
    }
    finishProducts<T>(rows.acc[0]);
}

// Starts the copies of the tiles of the band, one after the other: those of the next tile begin where the last ones ended.
template <typename T>
struct BandCopy
{
    using Traits = WarpgroupTraits;
    using Copy = ThreadCopy<Traits::kD>;

    __device__ __forceinline__ BandCopy(Block<Traits::kQUERIES> const& block, Copy const& copy)
        : source(block, block.position(block.band.begin + copy.row), copy.column)
        , keyStep(copy.step(block.params, block.params.keyStride))
        , valueStep(copy.step(block.params, block.params.valueStride))
    {
    }

    // localKeys: one bit for each key of the tile.
    __device__ __forceinline__ void next(Copy const& copy, T* keys, T* values, uint32_t const* localKeys)
    {
        uint32_t const words[2] = {localKeys[0], localKeys[1]};
        constexpr int kSTEPS = Traits::kKEYS / Copy::kROWS;
#pragma unroll
        for (int step = 0; step < kSTEPS; ++step)
        {
            int const row = step * Copy::kROWS;
            bool const valid = (words[row / kWORD_BITS] & copy.rowBit << row % kWORD_BITS) != 0;
            copyAsync(keys + copy.target + row * Traits::kD, source.key + static_cast<int64_t>(keyStep) * step, valid);
            copyAsync(
                values + copy.target + row * Traits::kD, source.value + static_cast<int64_t>(valueStep) * step, valid);
        }
        source.key += static_cast<int64_t>(keyStep) * kSTEPS;
        source.value += static_cast<int64_t>(valueStep) * kSTEPS;
    }

    KeyValueSource<T> source;
    int32_t keyStep;
    int32_t valueStep;
};
#endif

// Where the machine code has no products of a warpgroup, the kernel is empty and takes one thread; see hasWarpgroups().
#ifdef LFX_WARPGROUPS
#define LFX_WARPGROUP_BOUNDS __launch_bounds__(WarpgroupTraits::kTHREADS, WarpgroupTraits::kMIN_BLOCKS)
#else
#define LFX_WARPGROUP_BOUNDS __launch_bounds__(1)
#endif

template <typename T>
__global__ void LFX_WARPGROUP_BOUNDS bandedAttentionWarpgroup(BandedParams p)
{
#ifdef LFX_WARPGROUPS
    using Traits = WarpgroupTraits;
    T* const queries = static_cast<T*>(sharedMemory());
    T* const keys = queries + Traits::kQUERIES_SIZE; // two tiles: one is computed while the next is copied
    T* const values = keys + 2 * Traits::kTILE_SIZE;
    Block<Traits::kQUERIES> const block(p, values + 2 * Traits::kTILE_SIZE);
    if (block.firstQuery >= block.length)
    {
        return;
    }
    ThreadCopy<Traits::kD> const copy(p);
    bool const hasLocalRow = block.fillTables();
    TileSequence<Traits::kKEYS> const tiles(block, hasLocalRow);
    auto const localKeys
        = [&](int32_t tile) { return block.localKeys + (tile - tiles.numGlobal) * (Traits::kKEYS / kWORD_BITS); };
    BandCopy<T> band(block, copy);
    auto const copyTile = [&](int32_t tile) {
        int32_t const buffer = tile % 2 * Traits::kTILE_SIZE;
        if (tiles.isGlobal(tile))
        {
            // Whole tiles, since products read all of their rows.
            int32_t const slots = tiles.slotsFrom(tile) <= Traits::kFEW_KEYS ? Traits::kFEW_KEYS : Traits::kKEYS;
            copyGlobalTokens(block, copy, keys + buffer, values + buffer, tiles.firstSlot(tile), slots);
        }
        else
        {
            band.next(copy, keys + buffer, values + buffer, localKeys(tile));
        }
        commitCopies();
    };
    WarpRows<T, Traits> rows(queries);
    float const scaleLog2 = p.scale * kLOG2E;
    int32_t const warpRow = threadIdx.x / kWARP_SIZE * Traits::kWARP_QUERIES;
    int32_t const laneRow = threadIdx.x % kWARP_SIZE / 4 - threadIdx.x % 4 * 2; // less the lane's first column
    int32_t const lastOffset = block.window() + (block.isCausal() ? 0 : block.window());
    if (tiles.count > 0)
    {
        copyQueries(block, copy, queries);
        copyTile(0); // in one group with the queries
    }
    for (int32_t tile = 0; tile < tiles.count; ++tile)
    {
        waitForCopies<0>();
        publishCopies();
        __syncthreads(); // the tile has arrived, and every thread is done with the previous one
        if (tile + 1 < tiles.count)
        {
            copyTile(tile + 1);
        }
        if (tile == 0)
        {
            rows.keepQueries();
        }
        T const* const tileKeys = keys + tile % 2 * Traits::kTILE_SIZE;
        T const* const tileValues = values + tile % 2 * Traits::kTILE_SIZE;
        if (tiles.isGlobal(tile))
        {
            int32_t const slot = tiles.firstSlot(tile);
            uint32_t const used[2]
                = {visibleSlots<Traits>(block, slot).keys, visibleSlots<Traits>(block, slot + kWORD_BITS).keys};
            auto const mask = [&](auto& scores) { keepKeys(scores, used); };
            if (tiles.slotsFrom(tile) <= Traits::kFEW_KEYS)
            {
                attendKeys<Traits::kFEW_KEYS>(rows, tileKeys, tileValues, scaleLog2, mask);
            }
            else
            {
                attendKeys<Traits::kKEYS>(rows, tileKeys, tileValues, scaleLog2, mask);
            }
            continue;
        }
        uint32_t const local[2] = {localKeys(tile)[0], localKeys(tile)[1]};
        if ((local[0] | local[1]) == 0)
        {
            continue; // every warp of the block
        }
        // The first column of the tile that the warp's first query sees, and the last one.
        int32_t const first = block.firstQuery + warpRow - block.window() - tiles.firstKey(tile);
        int32_t const last = first + lastOffset;
        attendKeys<Traits::kKEYS>(rows, tileKeys, tileValues, scaleLog2, [&](auto& scores) {
            if ((local[0] & local[1]) != UINT32_MAX)
            {
                keepKeys(scores, local);
            }
            if (first + Traits::kWARP_QUERIES > 1)
            {
                keepVisible(scores, [&](int n, int i) { return columnLessRow(n, i) >= first + laneRow; });
            }
            if (last < Traits::kKEYS - 1)
            {
                keepVisible(scores, [&](int n, int i) { return columnLessRow(n, i) <= last + laneRow; });
            }
        });
    }
    writeContext(block, rows, queries);
#endif
}

} // namespace lfx::banded
