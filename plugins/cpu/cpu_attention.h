// The attention kernels on the CPU, in float32. They take the parameters of attention.h, with pointers to host memory that
// are aligned to 4 bytes.
#pragma once

#include "attention.h"

#include <cstddef>
#include <cstdint>

namespace lfx::cpu
{

using Task = void (*)(void* argument, size_t index);

// The threads of a host. parallelFor(pool, total, task, argument) calls task(argument, index) for each index below total,
// in any order and on any threads, and returns when all calls have returned. The results do not depend on the order.
struct ThreadPool
{
    void (*parallelFor)(void* pool, size_t total, Task task, void* argument);
    void* pool;
};

// Runs the tasks one after another on the caller's thread.
ThreadPool callerThread() noexcept;

enum class InstructionSet : int32_t
{
    kBASELINE = 0, // that of the compiler's target
    kAVX2 = 1,     // with FMA
    kAVX512 = 2,   // F, DQ, BW and VL
};

// Whether the library was built with the instruction set and this CPU has it.
bool isSupported(InstructionSet set) noexcept;

// The supported instruction set with the widest vectors.
InstructionSet widestInstructionSet() noexcept;

// The instruction set of a name: baseline, avx2 or avx512. Returns false if there is none, or it is not supported.
bool findInstructionSet(char const* name, InstructionSet& set) noexcept;

// Compute the op. They return nullptr, or the reason why they cannot. GlobalParams::workspace is not used.
char const* runBandedAttention(BandedParams const& params, ThreadPool const& threads, InstructionSet set) noexcept;
char const* runGlobalAttention(GlobalParams const& params, ThreadPool const& threads, InstructionSet set) noexcept;

} // namespace lfx::cpu
