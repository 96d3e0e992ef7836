// Counts bank conflicts in shared memory from the addresses that the emulated kernels use.
//
// Shared memory has 32 banks of 4 bytes. A warp's access is served in phases of as many neighbouring lanes as 128 bytes
// hold: 32 lanes of 4 bytes, or 8 lanes of 16 bytes, which are also the 8 rows of a matrix of ldmatrix. A phase takes one
// pass for each different word that it needs of one bank, at most over the banks; it is free of conflicts with one pass.
//
// Source: CUDA C++ Programming Guide, "Shared Memory" of compute capability 5.x and later; PTX ISA, "ldmatrix".
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace lfx
{
namespace race
{

class BankCounter
{
public:
    struct Count
    {
        size_t bytes; // of a lane's access
        int64_t phases;
        int64_t passes;
    };

    // A lane's access by the instruction at `place`. The n-th accesses of the lanes of a warp by an instruction are
    // taken for one access of the warp.
    void add(void const* place, int thread, size_t offset, size_t bytes)
    {
        int const n = mRepetitions[{place, thread}]++;
        int const lanes = std::min(128 / static_cast<int>(bytes), 32); // of a phase
        Phase& phase = mPhases[{place, n, thread / lanes}];
        phase.bytes = bytes;
        for (size_t word = offset / 4; word < (offset + bytes + 3) / 4; ++word)
        {
            phase.words.insert(word);
        }
    }

    void endBlock()
    {
        for (auto const& [key, phase] : mPhases)
        {
            int passes[32] = {};
            for (size_t word : phase.words)
            {
                ++passes[word % 32];
            }
            Count& count = counts[std::get<0>(key)];
            count.bytes = phase.bytes;
            ++count.phases;
            count.passes += *std::max_element(passes, passes + 32);
        }
        mPhases.clear();
        mRepetitions.clear();
    }

    std::map<void const*, Count> counts; // by instruction

private:
    struct Phase
    {
        size_t bytes;
        std::set<size_t> words;
    };

    std::map<std::pair<void const*, int>, int> mRepetitions;    // by instruction and thread
    std::map<std::tuple<void const*, int, int>, Phase> mPhases; // by instruction, repetition and phase of the block
};

} // namespace race
} // namespace lfx
