// Finds data races of the emulated kernels. It is on in programs that are compiled with LFX_DETECT_RACES and
// -fsanitize=thread, and linked with race_detector.cpp, which takes the place of the sanitizer's runtime; in all others
// these functions do nothing.
//
// The compiler makes every load and store of the kernels a call of race_detector.cpp. Two accesses of the same bytes by
// two threads, at least one of which writes, are a race unless they are ordered:
//   - by a barrier of the block, or by __syncwarp() if the threads are of one warp (shuffles and votes order nothing);
//   - in global memory also by the end of a kernel, or by __threadfence() and an atomic operation on each side.
// The destination of an asynchronous copy is written by the copying thread at an unknown time between its start and the
// wait for its group; until then, no thread may access it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef LFX_DETECT_RACES
// Inlined, so that the return address of a hook leads to the line of the kernel that has called the emulator.
#define LFX_AT_CALLER __attribute__((always_inline)) inline
#else
#define LFX_AT_CALLER inline
#endif

namespace lfx
{
namespace race
{

constexpr int kNO_THREAD = -1; // the scheduler of the emulator, whose accesses are not checked

#ifdef LFX_DETECT_RACES

void beginLaunch(void const* kernel, void const* shared, size_t sharedBytes);
void beginBlock(int block);
void setThread(int thread); // the one that runs, or kNO_THREAD
void blockBarrier();
void warpBarrier(int warp);
void read(void const* address, size_t bytes);
void atomic(void const* address, size_t bytes);
void fence();
void copyStarted(void const* destination);
void copyArrived(void const* destination, int thread);

// Whether the barrier, wait or commit in this line of the source is to be left out; see lfxRaceRemove().
bool isRemoved(char const* file, int line);

// Accesses while it lives are not checked.
class Unchecked
{
public:
    Unchecked();
    ~Unchecked();

private:
    int mThread;
};

#else

inline void beginLaunch(void const*, void const*, size_t)
{
}
inline void beginBlock(int)
{
}
inline void setThread(int)
{
}
inline void blockBarrier()
{
}
inline void warpBarrier(int)
{
}
inline void read(void const*, size_t)
{
}
inline void atomic(void const*, size_t)
{
}
inline void fence()
{
}
inline void copyStarted(void const*)
{
}
inline void copyArrived(void const*, int)
{
}
inline bool isRemoved(char const*, int)
{
    return false;
}
struct Unchecked
{
    Unchecked()
    {
    }
    ~Unchecked()
    {
    }
};

#endif

} // namespace race
} // namespace lfx
