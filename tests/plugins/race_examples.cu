// Small kernels with and without races, which show what the detector finds. Blocks of 64 threads; `memory` is global.
#include "device.cuh"

#include <cstring>

namespace lfx
{
namespace
{

struct Memory
{
    int32_t* memory;
};

int32_t* shared()
{
    return static_cast<int32_t*>(sharedMemory());
}

void noBarrierBetweenWarps(Memory)
{
    shared()[threadIdx.x] = 1;
    shared()[64 + threadIdx.x] = shared()[(threadIdx.x + 32) % 64];
}

void barrierBetweenWarps(Memory)
{
    shared()[threadIdx.x] = 1;
    __syncthreads();
    shared()[64 + threadIdx.x] = shared()[(threadIdx.x + 32) % 64];
}

void warpBarrierBetweenWarps(Memory)
{
    shared()[threadIdx.x] = 1;
    __syncwarp();
    shared()[64 + threadIdx.x] = shared()[(threadIdx.x + 32) % 64];
}

void warpBarrierInAWarp(Memory)
{
    shared()[threadIdx.x] = 1;
    __syncwarp();
    shared()[64 + threadIdx.x] = shared()[threadIdx.x ^ 1];
}

void shuffleInAWarp(Memory)
{
    shared()[threadIdx.x] = 1;
    __shfl_xor_sync(kFULL_WARP, 0.0F, 1);
    shared()[64 + threadIdx.x] = shared()[threadIdx.x ^ 1];
}

void readBeforeWrite(Memory)
{
    shared()[threadIdx.x] = 1;
    __syncthreads();
    int32_t const read = shared()[threadIdx.x ^ 32];
    shared()[threadIdx.x] = read;
}

void sameValueByTwoThreads(Memory)
{
    shared()[0] = 1;
}

void atomicsByTwoThreads(Memory)
{
    atomicMax(shared(), threadIdx.x);
}

void atomicAndPlain(Memory)
{
    atomicMax(shared(), 1);
    shared()[64 + threadIdx.x] = shared()[0];
}

void copyWithoutWait(Memory p)
{
    copyAsync(shared() + 4 * threadIdx.x, p.memory, true);
    commitCopies();
    shared()[256 + threadIdx.x] = shared()[4 * threadIdx.x];
}

void copyThatTheThreadItselfReads(Memory p)
{
    copyAsync(shared() + 4 * threadIdx.x, p.memory, true);
    commitCopies();
    waitForCopies<0>();
    shared()[256 + threadIdx.x] = shared()[4 * threadIdx.x];
}

void copyThatAnotherThreadReads(Memory p)
{
    copyAsync(shared() + 4 * threadIdx.x, p.memory, true);
    commitCopies();
    waitForCopies<0>();
    shared()[256 + threadIdx.x] = shared()[4 * (threadIdx.x ^ 1)];
}

void copyOfThePendingGroup(Memory p)
{
    copyAsync(shared() + 4 * threadIdx.x, p.memory, true);
    commitCopies();
    waitForCopies<1>();
    shared()[256 + threadIdx.x] = shared()[4 * threadIdx.x];
}

void writeByAllBlocks(Memory p)
{
    p.memory[threadIdx.x] = 1;
}

void writeByEachBlock(Memory p)
{
    p.memory[blockIdx.x * 64 + threadIdx.x] = 1;
}

// Banks: 32 lanes read words that are memory[0] words apart.
void readWithStride(Memory p)
{
    p.memory[1] = shared()[threadIdx.x % kWARP_SIZE * p.memory[0]];
}

// The last block reads what the others have written; memory[0] counts the blocks that are done.
template <bool kRELEASE, bool kACQUIRE>
void lastBlockReads(Memory p)
{
    p.memory[4 + blockIdx.x * 64 + threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0)
    {
        if (kRELEASE)
        {
            __threadfence();
        }
        shared()[0] = atomicAdd(p.memory, 1);
        if (kACQUIRE)
        {
            __threadfence();
        }
    }
    __syncthreads();
    if (shared()[0] == 3)
    {
        int32_t sum = 0;
        for (int32_t block = 0; block < 4; ++block)
        {
            sum += p.memory[4 + block * 64 + (threadIdx.x ^ 1)];
        }
        p.memory[4 + 4 * 64 + threadIdx.x] = sum;
    }
}

// A number of the block's own in global memory: all its threads read it, and one that has read it writes it.
template <bool kBARRIER>
void readerWrites(Memory p)
{
    shared()[threadIdx.x] = p.memory[blockIdx.x];
    if (kBARRIER)
    {
        __syncthreads();
    }
    if (threadIdx.x == 63)
    {
        p.memory[blockIdx.x] = 1;
    }
}

// All blocks read a number, and the last one writes it; memory[0] counts the blocks that have read it.
template <bool kCOUNTED>
void lastBlockWrites(Memory p)
{
    if (threadIdx.x == 0)
    {
        shared()[0] = p.memory[4];
        shared()[1] = blockIdx.x;
        if (kCOUNTED)
        {
            __threadfence();
            shared()[1] = atomicAdd(p.memory, 1);
            __threadfence();
        }
        if (shared()[1] == 3)
        {
            p.memory[4] = 1;
        }
    }
}

void atomicAfterRead(Memory p)
{
    shared()[threadIdx.x] = threadIdx.x == 0 ? p.memory[blockIdx.x] : 0;
    if (threadIdx.x == 0 || threadIdx.x == 63)
    {
        atomicAdd(p.memory + blockIdx.x, 1); // the first one is of the thread that has read
    }
}

struct Example
{
    char const* name;
    void (*kernel)(Memory);
};

Example const kEXAMPLES[] = {
    {"noBarrierBetweenWarps", noBarrierBetweenWarps},
    {"barrierBetweenWarps", barrierBetweenWarps},
    {"warpBarrierBetweenWarps", warpBarrierBetweenWarps},
    {"warpBarrierInAWarp", warpBarrierInAWarp},
    {"shuffleInAWarp", shuffleInAWarp},
    {"readBeforeWrite", readBeforeWrite},
    {"sameValueByTwoThreads", sameValueByTwoThreads},
    {"atomicsByTwoThreads", atomicsByTwoThreads},
    {"atomicAndPlain", atomicAndPlain},
    {"copyWithoutWait", copyWithoutWait},
    {"copyThatTheThreadItselfReads", copyThatTheThreadItselfReads},
    {"copyThatAnotherThreadReads", copyThatAnotherThreadReads},
    {"copyOfThePendingGroup", copyOfThePendingGroup},
    {"writeByAllBlocks", writeByAllBlocks},
    {"writeByEachBlock", writeByEachBlock},
    {"readWithStride", readWithStride},
    {"lastBlockReads", lastBlockReads<true, true>},
    {"lastBlockReadsWithoutRelease", lastBlockReads<false, true>},
    {"lastBlockReadsWithoutAcquire", lastBlockReads<true, false>},
    {"readerWrites", readerWrites<true>},
    {"readerWritesWithoutBarrier", readerWrites<false>},
    {"lastBlockWrites", lastBlockWrites<true>},
    {"lastBlockWritesUncounted", lastBlockWrites<false>},
    {"atomicAfterRead", atomicAfterRead},
};

} // namespace
} // namespace lfx

// Launches a kernel by its name, in 4 blocks.
extern "C" int32_t lfxRaceExample(char const* name, int32_t* memory)
{
    for (lfx::Example const& example : lfx::kEXAMPLES)
    {
        if (std::strcmp(example.name, name) == 0)
        {
            return lfx::launch(example.kernel, dim3(4), 64, 4096, lfx::Memory{memory}, nullptr);
        }
    }
    return -1;
}
