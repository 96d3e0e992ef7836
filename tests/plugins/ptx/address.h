// State spaces and addresses.
#pragma once

#include "instruction.h"
#include "machine.h"

namespace lfx::ptx
{

// Generic addresses from here on are in shared memory; below are the host's.
constexpr uint64_t kSHARED_WINDOW = 1ULL << 60;
// Addresses of parameters, which only ld.param takes.
constexpr uint64_t kPARAMETER_WINDOW = 1ULL << 61;

inline bool isSharedWindow(uint64_t address)
{
    return address >= kSHARED_WINDOW && address < kPARAMETER_WINDOW;
}

inline Accessor accessor(Lanes const& lanes, int32_t lane)
{
    return {lanes.index, lane, lanes.block.epoch, lanes.epoch};
}

// An address operand: register, its size, and offset.
struct Address
{
    uint32_t base;
    bool isLong;
    int64_t offset;

    uint32_t defined(Registers& registers) const
    {
        return registers.defined(isLong ? Size::k64 : Size::k32, base);
    }

    uint64_t of(Registers const& registers, int lane) const
    {
        uint64_t const start = isLong ? registers.get<uint64_t>(base, lane) : registers.get<uint32_t>(base, lane);
        return start + static_cast<uint64_t>(offset);
    }
};

// In 32-bit shared memory an address that does not fit is outside; saturate it.
inline uint32_t sharedAddress(uint64_t address)
{
    return address > 0xfffffff0U ? 0xfffffff0U : static_cast<uint32_t>(address);
}

} // namespace lfx::ptx
