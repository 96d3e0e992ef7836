#include "memory.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace lfx::ptx
{
namespace
{

std::string describe(uint64_t address, size_t bytes)
{
    char text[64];
    std::snprintf(text, sizeof(text), "%zu bytes at 0x%llx", bytes, static_cast<unsigned long long>(address));
    return text;
}

void checkAlignment(uint64_t address, size_t bytes, int32_t lane)
{
    if ((address & (bytes - 1)) != 0) // bytes is a power of 2
    {
        throw Fault("unaligned access of " + describe(address, bytes), lane);
    }
}

} // namespace

Buffer& GlobalMemory::find(uint64_t address, size_t bytes, int32_t lane)
{
    checkAlignment(address, bytes, lane);
    auto const contains = [&](Buffer const& buffer) {
        return address >= buffer.address && address - buffer.address + bytes <= buffer.bytes;
    };
    if (mLast < buffers.size() && contains(buffers[mLast]))
    {
        return buffers[mLast];
    }
    auto const buffer = std::find_if(buffers.begin(), buffers.end(), contains);
    if (buffer == buffers.end())
    {
        throw Fault("access outside the buffers: " + describe(address, bytes), lane);
    }
    mLast = buffer - buffers.begin();
    return *buffer;
}

uint8_t const* GlobalMemory::read(uint64_t address, size_t bytes, int32_t lane)
{
    Buffer const& buffer = find(address, bytes, lane);
    if (!buffer.isDefined.empty())
    {
        auto const first = buffer.isDefined.begin() + (address - buffer.address);
        if (std::find(first, first + bytes, 0) != first + bytes)
        {
            throw Fault("global memory is read before it is written: " + describe(address, bytes), lane);
        }
    }
    return reinterpret_cast<uint8_t const*>(address);
}

uint8_t* GlobalMemory::write(uint64_t address, size_t bytes, int32_t lane)
{
    Buffer& buffer = find(address, bytes, lane);
    if (!buffer.isWritable)
    {
        throw Fault("an input is written: " + describe(address, bytes), lane);
    }
    if (!buffer.isDefined.empty())
    {
        std::fill_n(buffer.isDefined.begin() + (address - buffer.address), bytes, 1);
    }
    return reinterpret_cast<uint8_t*>(address);
}

void SharedMemory::reset(size_t bytes, size_t alignment)
{
    mBytes = bytes;
    mBegin = begin(alignment);
    mData.resize(bytes);
    mState.assign(bytes, kUNDEFINED);
    mHistory.resize((bytes + kELEMENT - 1) / kELEMENT);
}

size_t SharedMemory::offset(uint32_t address, size_t bytes, Accessor const& accessor) const
{
    checkAlignment(address, bytes, accessor.lane);
    if (address < mBegin || address - mBegin + bytes > mBytes)
    {
        throw Fault("access outside the block's shared memory: " + describe(address, bytes) + ", which begin at "
                + describe(mBegin, mBytes),
            accessor.lane);
    }
    return address - mBegin;
}

void SharedMemory::checkState(size_t offset, size_t bytes, Accessor const& accessor, bool reads) const
{
    static constexpr std::array<uint8_t, kMAX_ACCESS> kALL_DEFINED{kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED,
        kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED, kDEFINED};
    if (bytes <= kMAX_ACCESS && std::memcmp(&mState[offset], kALL_DEFINED.data(), bytes) == 0)
    {
        return;
    }
    for (size_t i = offset; i < offset + bytes; ++i)
    {
        if (mState[i] == kIN_FLIGHT)
        {
            throw Fault(
                "shared memory is accessed before the copy to it has been waited for, at byte " + std::to_string(i),
                accessor.lane);
        }
        if (reads && mState[i] == kUNDEFINED)
        {
            throw Fault("shared memory is read before it is written, at byte " + std::to_string(i), accessor.lane);
        }
    }
}

void SharedMemory::noteRead(size_t offset, size_t bytes, Accessor const& accessor)
{
    uint32_t const lanes = accessor.lane == kWHOLE_WARP ? 0xffffffffU : 1U << accessor.lane;
    for (size_t i = offset / kELEMENT; i <= (offset + bytes - 1) / kELEMENT; ++i)
    {
        History& history = mHistory[i];
        bool const sameWarp = history.writeWarp == accessor.warp
            && (history.writeWarpEpoch < accessor.warpEpoch || history.writeLane == accessor.lane);
        if (history.writeEpoch == accessor.blockEpoch && (history.isAtomic || !sameWarp))
        {
            throw Fault("race: no barrier separates this read of shared memory from another thread's write, at byte "
                    + std::to_string(i * kELEMENT),
                accessor.lane);
        }
        if (history.readEpoch != accessor.blockEpoch)
        {
            history.readEpoch = accessor.blockEpoch;
            history.readWarps = 0;
            history.readLanes = 0;
        }
        history.readWarps |= 1U << accessor.warp;
        if (history.lastReadWarp != accessor.warp || history.readWarpEpoch != accessor.warpEpoch)
        {
            history.lastReadWarp = static_cast<uint8_t>(accessor.warp);
            history.readWarpEpoch = accessor.warpEpoch;
            history.readLanes = 0;
        }
        history.readLanes |= lanes;
    }
}

void SharedMemory::noteWrite(size_t offset, size_t bytes, Accessor const& accessor, bool isAtomic)
{
    for (size_t i = offset / kELEMENT; i <= (offset + bytes - 1) / kELEMENT; ++i)
    {
        History& history = mHistory[i];
        bool const sameWarp = history.writeWarp == accessor.warp
            && (history.writeWarpEpoch < accessor.warpEpoch || history.writeLane == accessor.lane);
        bool const wasWritten
            = history.writeEpoch == accessor.blockEpoch && !sameWarp && !(isAtomic && history.isAtomic);
        bool const wasReadByOthers = history.readEpoch == accessor.blockEpoch
            && ((history.readWarps & ~(1U << accessor.warp)) != 0
                || (history.lastReadWarp == accessor.warp && history.readWarpEpoch == accessor.warpEpoch
                    && (history.readLanes & ~(1U << accessor.lane)) != 0));
        if (wasWritten || wasReadByOthers)
        {
            throw Fault(std::string("race: no barrier separates this write of shared memory from another thread's ")
                    + (wasWritten ? "write" : "read") + ", at byte " + std::to_string(i * kELEMENT),
                accessor.lane);
        }
        history.writeEpoch = accessor.blockEpoch;
        history.writeWarpEpoch = accessor.warpEpoch;
        history.writeWarp = static_cast<uint8_t>(accessor.warp);
        history.writeLane = static_cast<int8_t>(accessor.lane);
        history.isAtomic = isAtomic;
    }
}

void SharedMemory::read(uint32_t address, void* data, size_t bytes, Accessor const& accessor)
{
    size_t const at = offset(address, bytes, accessor);
    checkState(at, bytes, accessor, true);
    noteRead(at, bytes, accessor);
    std::memcpy(data, &mData[at], bytes);
}

void SharedMemory::write(uint32_t address, void const* data, size_t bytes, Accessor const& accessor)
{
    size_t const at = offset(address, bytes, accessor);
    checkState(at, bytes, accessor, false);
    noteWrite(at, bytes, accessor, false);
    std::fill_n(mState.begin() + at, bytes, kDEFINED);
    std::memcpy(&mData[at], data, bytes);
}

uint32_t& SharedMemory::atomic(uint32_t address, Accessor const& accessor)
{
    size_t const at = offset(address, sizeof(uint32_t), accessor);
    checkState(at, sizeof(uint32_t), accessor, true);
    noteWrite(at, sizeof(uint32_t), accessor, true);
    return *reinterpret_cast<uint32_t*>(&mData[at]);
}

void SharedMemory::startCopy(uint32_t address, size_t bytes, Accessor const& accessor)
{
    size_t const at = offset(address, bytes, accessor);
    checkState(at, bytes, accessor, false);
    noteWrite(at, bytes, accessor, false);
    std::fill_n(mState.begin() + at, bytes, kIN_FLIGHT);
}

void SharedMemory::finishCopy(uint32_t address, void const* data, size_t bytes, Accessor const& accessor)
{
    size_t const at = offset(address, bytes, accessor);
    noteWrite(at, bytes, accessor, false);
    std::fill_n(mState.begin() + at, bytes, kDEFINED);
    std::memcpy(&mData[at], data, bytes);
}

} // namespace lfx::ptx
