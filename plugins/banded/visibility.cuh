// Which keys of a tile the 16 queries of a warp see.
#pragma once

#include "banded/block.cuh"

namespace lfx::banded
{

struct Visibility
{
    uint64_t keys;    // one bit for each key of the tile: used slot, or local key
    Range groups;     // of 16 keys; the others are outside the band of every query of the warp
    int32_t distance; // from the first key of the first query's band to the first key of the tile
    uint32_t last;    // last key of a query's band, counted from its first
    bool all;         // every query sees every key

    // The visibility of the groups from `group` on.
    __device__ __forceinline__ Visibility from(int32_t group) const
    {
        return {keys >> group * 16, groups, distance + group * 16, last, all};
    }
};

__device__ __forceinline__ Visibility visibleGlobalTokens(Block const& block, int32_t firstSlot, int32_t groups)
{
    uint32_t used[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        int32_t const slot = firstSlot + i * kWORD_BITS + threadIdx.x % kWARP_SIZE;
        used[i] = __ballot_sync(kFULL_WARP, block.slotPosition(slot) >= 0);
    }
    uint64_t const keys = used[0] | static_cast<uint64_t>(used[1]) << kWORD_BITS;
    return {keys, {0, groups}, 0, UINT32_MAX, false};
}

template <typename Traits>
__device__ __forceinline__ Visibility visibleBand(Block const& block, int32_t firstKey)
{
    constexpr int kWARP_QUERIES = Traits::kWARP_QUERIES;
    int32_t const firstQuery = block.firstQuery + threadIdx.x / kWARP_SIZE * kWARP_QUERIES;
    uint32_t const* const localKeys = block.localKeys + (firstKey - block.band.begin) / kWORD_BITS;
    uint64_t const keys = localKeys[0] | static_cast<uint64_t>(localKeys[1]) << kWORD_BITS;
    int32_t const last = block.window + (block.causal ? 0 : block.window);
    int32_t const distance = firstKey - (firstQuery - block.window);
    int32_t const firstGroup = max(-distance, 0) / Traits::kGROUP_KEYS;
    int32_t const endGroup
        = min(ceilDiv(max(last + kWARP_QUERIES - distance, 0), Traits::kGROUP_KEYS), Traits::kGROUPS);
    bool const all = keys == UINT64_MAX && distance >= kWARP_QUERIES - 1 && distance + Traits::kKEYS - 1 <= last;
    return {keys, {firstGroup, endGroup}, distance, static_cast<uint32_t>(last), all};
}

} // namespace lfx::banded
