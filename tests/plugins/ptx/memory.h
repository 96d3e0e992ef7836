// Global and shared memory that know which bytes have been written, and in shared memory by whom.
#pragma once

#include "program.h"

#include <deque>
#include <string>
#include <vector>

namespace lfx::ptx
{

// A violation by one lane of a warp.
class Fault : public Error
{
public:
    Fault(std::string const& reason, int32_t lane)
        : Error(reason)
        , lane(lane)
    {
    }

    int32_t lane; // -1: of the warp as a whole
};

// A range of the host's memory that kernels may access; global addresses are host addresses.
struct Buffer
{
    uint64_t address;
    uint64_t bytes;
    bool isWritable;
    std::vector<uint8_t> isDefined; // one for each byte; empty: all are
};

class GlobalMemory
{
public:
    std::vector<Buffer> buffers;

    // Each checks alignment and bounds, and returns the host's address. `bytes` is a power of 2.
    uint8_t const* read(uint64_t address, size_t bytes, int32_t lane);
    uint8_t* write(uint64_t address, size_t bytes, int32_t lane);

private:
    Buffer& find(uint64_t address, size_t bytes, int32_t lane);

    size_t mLast = 0; // buffer of the previous access
};

// Who accesses shared memory, and when: epochs count the barriers of the block and of the warp.
struct Accessor
{
    uint32_t warp;
    int32_t lane; // kWHOLE_WARP: all its lanes together
    uint32_t blockEpoch;
    uint32_t warpEpoch;
};

constexpr int32_t kWHOLE_WARP = -1;

// The shared memory of a block. Reading what was not written is an error, and so are two accesses of one element of which
// one writes, by two threads that no barrier separates.
class SharedMemory
{
public:
    // The first address: aligned as the kernel declares, and no more.
    static uint32_t begin(size_t alignment)
    {
        return static_cast<uint32_t>(1024 + alignment);
    }

    void reset(size_t bytes, size_t alignment);
    void read(uint32_t address, void* data, size_t bytes, Accessor const& accessor);
    void write(uint32_t address, void const* data, size_t bytes, Accessor const& accessor);
    // 32-bit atomic operations do not race with one another. Returns the address of the value.
    uint32_t& atomic(uint32_t address, Accessor const& accessor);
    // Between the two, nobody may access the bytes.
    void startCopy(uint32_t address, size_t bytes, Accessor const& accessor);
    void finishCopy(uint32_t address, void const* data, size_t bytes, Accessor const& accessor);

private:
    enum State : uint8_t
    {
        kUNDEFINED,
        kDEFINED,
        kIN_FLIGHT,
    };

    // The last accesses of an element.
    struct History
    {
        uint32_t writeEpoch = 0; // of the block; epochs of a launch start at 1
        uint32_t writeWarpEpoch = 0;
        uint32_t readEpoch = 0;
        uint32_t readWarpEpoch = 0;
        uint32_t readWarps = 0; // in readEpoch
        uint32_t readLanes = 0; // of lastReadWarp, in readWarpEpoch
        uint8_t writeWarp = 0;
        uint8_t lastReadWarp = 0;
        int8_t writeLane = 0;
        bool isAtomic = false;
    };

    static constexpr size_t kELEMENT = 2; // bytes of the smallest access
    static constexpr size_t kMAX_ACCESS = 16;

    size_t offset(uint32_t address, size_t bytes, Accessor const& accessor) const;
    void checkState(size_t offset, size_t bytes, Accessor const& accessor, bool reads) const;
    void noteRead(size_t offset, size_t bytes, Accessor const& accessor);
    void noteWrite(size_t offset, size_t bytes, Accessor const& accessor, bool isAtomic);

    size_t mBytes = 0;
    uint32_t mBegin = 0;
    std::vector<uint8_t> mData;
    std::vector<uint8_t> mState;
    std::vector<History> mHistory;
};

struct Copy
{
    uint32_t address;
    uint8_t data[16];
};

// The asynchronous copies of a thread.
struct Copies
{
    std::vector<Copy> open;               // since the last commit
    std::deque<std::vector<Copy>> groups; // committed, not yet waited for
};

} // namespace lfx::ptx
