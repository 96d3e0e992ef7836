// Which of a group of 32 keys the queries of a warp see.
#pragma once

#include "banded/block.cuh"

namespace lfx::banded
{

// Query r of the warp sees key c of the group if its bit is set and 0 <= distance + c - r <= last.
template <int kWARP_QUERIES>
struct Visibility
{
    static constexpr int kKEYS = kWORD_BITS;

    __device__ __forceinline__ bool isNone() const
    {
        return keys == 0 || distance + kKEYS <= 0 || distance - kWARP_QUERIES >= last;
    }

    __device__ __forceinline__ bool isAll() const
    {
        return keys == UINT32_MAX && distance >= kWARP_QUERIES - 1 && distance + kKEYS - 1 <= last;
    }

    uint32_t keys;    // one bit for each key: local key, or used slot
    int32_t distance; // from the first key of the first query's band to the first key of the group
    int32_t last;     // last key of a query's band, counted from its first
};

// Every query sees the global tokens.
template <typename Traits>
__device__ __forceinline__ Visibility<Traits::kWARP_QUERIES> visibleSlots(
    Block<Traits::kQUERIES> const& block, int32_t firstSlot)
{
    bool const isUsed = block.slotPosition(firstSlot + threadIdx.x % kWARP_SIZE) >= 0;
    return {__ballot_sync(kFULL_WARP, isUsed), Traits::kWARP_QUERIES, INT32_MAX};
}

template <typename Traits>
__device__ __forceinline__ Visibility<Traits::kWARP_QUERIES> visibleKeys(
    Block<Traits::kQUERIES> const& block, int32_t firstKey)
{
    int32_t const firstQuery = block.firstQuery + threadIdx.x / kWARP_SIZE * Traits::kWARP_QUERIES;
    uint32_t const keys = block.localKeys[(firstKey - block.band.begin) / kWORD_BITS];
    return {keys, firstKey - (firstQuery - block.window()), block.window() + (block.isCausal() ? 0 : block.window())};
}

} // namespace lfx::banded
