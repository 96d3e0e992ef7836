#include "instruction.h"

namespace lfx::ptx
{
namespace
{

template <typename Register, typename T>
void storeLanes(std::array<Register, kLANES>& target, std::array<T, kLANES> const& values, uint32_t lanes)
{
    if (lanes == kALL_LANES)
    {
        for (int lane = 0; lane < kLANES; ++lane)
        {
            target[lane] = values[lane];
        }
        return;
    }
    forEachLane(lanes, [&](int lane) { target[lane] = values[lane]; });
}

} // namespace

void Registers::store(uint32_t index, std::array<bool, kLANES> const& values, uint32_t lanes)
{
    uint32_t bits = 0;
    for (int lane = 0; lane < kLANES; ++lane)
    {
        bits |= static_cast<uint32_t>(values[lane]) << lane;
    }
    predicates[index] = (predicates[index] & ~lanes) | (bits & lanes);
}

void Registers::store(uint32_t index, std::array<uint16_t, kLANES> const& values, uint32_t lanes)
{
    storeLanes(words[index], values, lanes);
}

void Registers::store(uint32_t index, std::array<uint32_t, kLANES> const& values, uint32_t lanes)
{
    storeLanes(words[index], values, lanes);
}

void Registers::store(uint32_t index, std::array<uint64_t, kLANES> const& values, uint32_t lanes)
{
    storeLanes(longs[index], values, lanes);
}

} // namespace lfx::ptx
