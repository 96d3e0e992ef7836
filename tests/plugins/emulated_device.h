// An emulation of plugins/device.cuh and of the CUDA that the attention kernels use, on one CPU thread.
//
// Every CUDA thread is a fiber. It runs until a collective operation (a barrier, a shuffle, a tensor-core product) and
// continues when all threads of its warp or block have arrived. If they never arrive, the kernel's threads have diverged
// and the program stops. Shared memory starts as NaN, ends at a guard page, and receives an asynchronous copy only when
// the thread waits for it, so that a kernel that reads too early or past the end fails. It starts at a multiple of 16
// bytes: the bytes between its end and the guard page, if any, are NaN and must stay as they are.
//
// Blocks, warps and lanes take turns in ascending order, or in a random one; see lfxEmulatedOrder().
#pragma once

#include "race_detector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (lfx::emulated::current->index)
#define blockIdx (lfx::emulated::blockIndex)

struct CUstream_st;
using cudaStream_t = CUstream_st*;
constexpr int cudaErrorInvalidValue = 1;

struct dim3
{
    dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1)
        : x(x)
        , y(y)
        , z(z)
    {
    }
    uint32_t x, y, z;
};

struct Index
{
    int32_t x, y, z;
};

// Four numbers that are loaded and stored in one access of 16 bytes, as on the device.
template <typename T>
struct alignas(16) Vector4
{
    Vector4(T x, T y, T z, T w)
        : x(x)
        , y(y)
        , z(z)
        , w(w)
    {
    }
    Vector4()
        : whole()
    {
    }
    Vector4(Vector4 const& other)
        : whole(other.whole)
    {
    }
    Vector4& operator=(Vector4 const& other)
    {
        whole = other.whole;
        return *this;
    }

    union
    {
        struct
        {
            T x, y, z, w;
        };
        uint32_t __attribute__((vector_size(16))) whole;
    };
};

using uint4 = Vector4<uint32_t>;
using float4 = Vector4<float>;

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return {x, y, z, w};
}

inline uint32_t __float_as_uint(float x)
{
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

namespace lfx
{
namespace emulated
{

struct Copy
{
    void* to;
    uint8_t bytes[16];
};

// A product of a warpgroup: rows of `c`, `columns` of them, are a · b, 16 by `columns`, added to c if isSum. Without isSum the
// rows of b in shared memory are its columns.
struct GroupProduct
{
    float (*c)[4];
    int columns;
    uint32_t a[4];
    size_t b; // offset in shared memory
    bool isSum;
    bool isTransposed;
};

enum class State
{
    kRUNNING,
    kAT_WARP,
    kAT_BLOCK,
    kDONE,
};

// Of __builtin_setjmp. The jumps of the C library, which do more, took a quarter of the time of a run.
using Place = void* [5];

struct Fiber
{
    Index index;
    State state;
    char const* operation;
    void* argument;
    Place place;
    bool started;
    std::vector<Copy> open;               // copies since the last commitCopies()
    std::deque<std::vector<Copy>> groups; // committed, not yet waited for
    bool hasUnpublished;                  // copies have arrived since the last publishCopies()
    std::vector<GroupProduct> products;   // of a warpgroup, started and not yet finished
    bool mayStartProducts;
    int numProducts; // that it has started
};

// What a fiber needs to start. Apart, so that what is read at each turn is small.
struct Start
{
    ucontext_t context;
    std::vector<uint8_t> stack;
};

inline Fiber* current = nullptr;
inline Index blockIndex;
inline uint8_t* shared = nullptr;
inline std::vector<Fiber> fibers;
inline std::vector<Start> starts; // of each fiber
inline Place scheduler;
inline ucontext_t schedulerContext;
inline std::function<void()> body;
inline bool isRandom = false; // the order of blocks, warps and lanes
inline std::mt19937_64 random;

// Numbers below `count`, in the order in which they take turns.
class Turns
{
public:
    explicit Turns(size_t count)
        : mOrder(count)
    {
        std::iota(mOrder.begin(), mOrder.end(), size_t{0});
    }
    // The order of a round.
    std::vector<size_t> const& next()
    {
        if (isRandom)
        {
            std::iota(mOrder.begin(), mOrder.end(), size_t{0});
            std::shuffle(mOrder.begin(), mOrder.end(), random);
        }
        return mOrder;
    }

private:
    std::vector<size_t> mOrder;
};

[[noreturn]] inline void fail(char const* reason)
{
    std::fprintf(stderr, "emulated kernel: %s (block %d %d %d, thread %d)\n", reason, blockIndex.x, blockIndex.y,
        blockIndex.z, current != nullptr ? current->index.x : -1);
    std::abort();
}

// Jumps are functions of their own: one that has set a place, this one or another, must not jump.
[[noreturn]] __attribute__((noinline)) inline void jumpTo(Place& place)
{
    __builtin_longjmp(place, 1);
}

inline void yield(State state, char const* operation, void* argument)
{
    current->state = state;
    current->operation = operation;
    current->argument = argument;
    if (__builtin_setjmp(current->place) == 0)
    {
        jumpTo(scheduler);
    }
}

inline void run()
{
    body();
    current->state = State::kDONE;
    jumpTo(scheduler);
}

inline void resume(Fiber& fiber)
{
    current = &fiber;
    race::setThread(fiber.index.x);
    fiber.state = State::kRUNNING;
    if (__builtin_setjmp(scheduler) == 0)
    {
        if (fiber.started)
        {
            jumpTo(fiber.place);
        }
        fiber.started = true;
        swapcontext(&schedulerContext, &starts[fiber.index.x].context);
    }
    race::setThread(race::kNO_THREAD);
}

// Executes the operation that `count` fibers from `first` on wait for, if all of them wait; returns whether it did.
template <typename Finish>
bool together(size_t first, size_t count, State state, Finish finish)
{
    for (size_t i = first; i < first + count; ++i)
    {
        if (fibers[i].state != state)
        {
            return false;
        }
        if (fibers[i].operation != fibers[first].operation
            && std::strcmp(fibers[i].operation, fibers[first].operation) != 0)
        {
            fail("threads of a warp wait for different operations");
        }
    }
    finish(first);
    return true;
}

using WarpOperation = void (*)(void* const (&arguments)[32]);

struct WarpCall
{
    WarpOperation operation;
    void* argument;
};

inline void finishWarp(size_t first)
{
    void* arguments[32];
    for (size_t i = 0; i < 32; ++i)
    {
        arguments[i] = static_cast<WarpCall*>(fibers[first + i].argument)->argument;
    }
    static_cast<WarpCall*>(fibers[first].argument)->operation(arguments);
}

inline bool isUnpublished = false; // copies that arrived before the last barrier

// At a barrier: the warps of a warpgroup have started the same number of products.
inline void checkProducts(size_t threads)
{
    isUnpublished = false;
    for (size_t i = 0; i < threads; ++i)
    {
        isUnpublished |= fibers[i].hasUnpublished;
        if (fibers[i].numProducts != fibers[i / 128 * 128].numProducts)
        {
            fail("warps of a warpgroup start different products");
        }
    }
}

inline void runBlock(size_t threads)
{
    for (size_t i = 0; i < threads; ++i)
    {
        Fiber& fiber = fibers[i];
        fiber.index = {static_cast<int32_t>(i), 0, 0};
        fiber.state = State::kRUNNING;
        fiber.started = false;
        fiber.open.clear();
        fiber.groups.clear();
        fiber.hasUnpublished = false;
        fiber.products.clear();
        fiber.mayStartProducts = false;
        fiber.numProducts = 0;
        Start& start = starts[i];
        start.stack.resize(256 * 1024);
        getcontext(&start.context);
        start.context.uc_stack.ss_sp = start.stack.data();
        start.context.uc_stack.ss_size = start.stack.size();
        start.context.uc_link = nullptr;
        makecontext(&start.context, run, 0);
    }
    std::vector<uint8_t> ready(threads / 32, 1); // the warps whose threads all run
    Turns warps(threads / 32);
    Turns lanes(32);
    for (;;)
    {
        bool progress = false;
        for (size_t warp : warps.next())
        {
            if (!ready[warp])
            {
                continue;
            }
            progress = true;
            if (isRandom && random() % 2 == 0)
            {
                continue; // the warp misses a turn, so that others get ahead of it
            }
            ready[warp] = 0;
            for (size_t lane : lanes.next())
            {
                resume(fibers[32 * warp + lane]);
            }
            if (together(32 * warp, 32, State::kAT_WARP, finishWarp))
            {
                for (size_t i = 32 * warp; i < 32 * warp + 32; ++i)
                {
                    fibers[i].state = State::kRUNNING;
                }
                ready[warp] = 1;
            }
        }
        if (together(0, threads, State::kAT_BLOCK, [threads](size_t) {
                race::blockBarrier();
                checkProducts(threads);
                bool any = false;
                for (size_t i = 0; i < threads; ++i)
                {
                    any |= *static_cast<bool*>(fibers[i].argument);
                }
                for (size_t i = 0; i < threads; ++i)
                {
                    *static_cast<bool*>(fibers[i].argument) = any;
                }
            }))
        {
            for (size_t i = 0; i < threads; ++i)
            {
                fibers[i].state = State::kRUNNING;
            }
            std::fill(ready.begin(), ready.end(), 1);
            progress = true;
        }
        if (!progress)
        {
            break;
        }
    }
    for (size_t i = 0; i < threads; ++i)
    {
        if (fibers[i].state != State::kDONE)
        {
            current = &fibers[i];
            fail("threads wait for others that have ended");
        }
    }
    current = nullptr;
}

inline void warp(WarpOperation operation, char const* name, void* argument)
{
    WarpCall call{operation, argument};
    yield(State::kAT_WARP, name, &call);
}

// Shared memory of `bytes`, rounded up to 16, followed by a guard page.
class SharedMemory
{
public:
    explicit SharedMemory(size_t bytes)
        : mBytes(bytes)
        , mRounded((bytes + 15) / 16 * 16)
        , mPages((mRounded + 4095) / 4096 * 4096)
    {
        mStart = static_cast<uint8_t*>(
            mmap(nullptr, mPages + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(mStart + mPages, 4096, PROT_NONE);
        shared = mStart + mPages - mRounded;
    }
    ~SharedMemory()
    {
        munmap(mStart, mPages + 4096);
    }
    void poison()
    {
        std::memset(shared, 0xff, mBytes);
        std::memcpy(shared + mBytes, kPAST_THE_END, mRounded - mBytes);
    }
    void checkEnd() const
    {
        if (std::memcmp(shared + mBytes, kPAST_THE_END, mRounded - mBytes) != 0)
        {
            fail("a write past the end of shared memory");
        }
    }

private:
    // NaN in float32, float16 and bfloat16, and no number that a kernel writes.
    static constexpr uint16_t kPAST_THE_END[8] = {0x7fc1, 0x7fc1, 0x7fc1, 0x7fc1, 0x7fc1, 0x7fc1, 0x7fc1, 0x7fc1};

    size_t mBytes;
    size_t mRounded;
    size_t mPages;
    uint8_t* mStart;
};

} // namespace emulated

struct Half
{
    uint16_t bits;
};

struct Bf16
{
    uint16_t bits;
};

inline float toFloat(Half x)
{
    _Float16 value;
    std::memcpy(&value, &x.bits, 2);
    return static_cast<float>(value);
}

inline float toFloat(Bf16 x)
{
    uint32_t const bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <typename T>
T fromFloat(float x);

template <>
inline float fromFloat<float>(float x)
{
    return x;
}

template <>
inline Half fromFloat<Half>(float x)
{
    _Float16 const value = static_cast<_Float16>(x);
    Half half;
    std::memcpy(&half.bits, &value, 2);
    return half;
}

template <>
inline Bf16 fromFloat<Bf16>(float x)
{
    if (std::isnan(x))
    {
        return {0x7fff};
    }
    uint32_t const bits = __float_as_uint(x);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)}; // to nearest, ties to even
}

template <typename T>
uint32_t pack(float low, float high)
{
    return fromFloat<T>(low).bits | static_cast<uint32_t>(fromFloat<T>(high).bits) << 16;
}

template <typename T>
float unpack(uint32_t pair, int which)
{
    return toFloat(T{static_cast<uint16_t>(which == 0 ? pair & 0xffff : pair >> 16)});
}

inline float exp2Flushed(float x)
{
    float const y = std::exp2(x);
    return y < std::numeric_limits<float>::min() ? 0.0F : y;
}

inline float log2Flushed(float x)
{
    return std::log2(x < std::numeric_limits<float>::min() ? 0.0F : x);
}

struct Product
{
    float* c;
    uint32_t const* a;
    uint32_t b[2];
};

template <typename T>
void mma(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    Product product{c, a, {b0, b1}};
    emulated::warp(
        [](void* const(&lanes)[32]) {
            using Row = float __attribute__((vector_size(32)));
            float a[16][16];
            Row b[16];
            Row c[16];
            for (int lane = 0; lane < 32; ++lane)
            {
                Product const& p = *static_cast<Product*>(lanes[lane]);
                for (int i = 0; i < 8; ++i) // PTX ISA, figures of mma.m16n8k16 with .f16 and .bf16
                {
                    a[lane / 4 + (i / 2 % 2) * 8][lane % 4 * 2 + i % 2 + (i / 4) * 8] = unpack<T>(p.a[i / 2], i % 2);
                }
                for (int i = 0; i < 4; ++i)
                {
                    b[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = unpack<T>(p.b[i / 2], i % 2);
                    c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = p.c[i];
                }
            }
            for (int row = 0; row < 16; ++row)
            {
                for (int k = 0; k < 16; ++k)
                {
                    c[row] += a[row][k] * b[k];
                }
            }
            for (int lane = 0; lane < 32; ++lane)
            {
                for (int i = 0; i < 4; ++i)
                {
                    static_cast<Product*>(lanes[lane])->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
                }
            }
        },
        "mma", &product);
}

struct MatrixLoad
{
    uint32_t* registers;
    uint16_t const* row;
    bool transposed;
};

LFX_AT_CALLER void loadMatrices(uint32_t (&r)[4], void const* row, bool transposed)
{
    race::read(row, 16);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    {
        emulated::fail("ldmatrix of an address that is no multiple of 16");
    }
    MatrixLoad load{r, static_cast<uint16_t const*>(row), transposed};
    emulated::warp(
        [](void* const(&lanes)[32]) {
            for (int lane = 0; lane < 32; ++lane)
            {
                MatrixLoad const& mine = *static_cast<MatrixLoad*>(lanes[lane]);
                for (int m = 0; m < 4; ++m)
                {
                    uint32_t pair = 0;
                    for (int i = 0; i < 2; ++i)
                    {
                        int const row = mine.transposed ? lane % 4 * 2 + i : lane / 4;
                        int const column = mine.transposed ? lane / 4 : lane % 4 * 2 + i;
                        uint32_t const element = static_cast<MatrixLoad*>(lanes[m * 8 + row])->row[column];
                        pair |= element << 16 * i;
                    }
                    mine.registers[m] = pair;
                }
            }
        },
        transposed ? "ldmatrix.trans" : "ldmatrix", &load);
}

LFX_AT_CALLER void loadMatrices(uint32_t (&r)[4], void const* row)
{
    loadMatrices(r, row, false);
}

LFX_AT_CALLER void loadMatricesTransposed(uint32_t (&r)[4], void const* row)
{
    loadMatrices(r, row, true);
}

LFX_AT_CALLER void copyAsync(void* to, void const* from, bool valid)
{
    race::copyStarted(to);
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    {
        emulated::fail("cp.async of an address that is no multiple of 16");
    }
    emulated::Copy copy{to, {}};
    if (valid)
    {
        std::memcpy(copy.bytes, from, 16);
    }
    emulated::current->open.push_back(copy);
}

inline void commitCopies(char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    if (race::isRemoved(file, line))
    {
        return;
    }
    emulated::current->groups.push_back(std::move(emulated::current->open));
    emulated::current->open.clear();
}

template <int kPENDING>
void waitForCopies(char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    if (race::isRemoved(file, line))
    {
        return;
    }
    race::Unchecked const unchecked;
    auto& groups = emulated::current->groups;
    while (groups.size() > kPENDING)
    {
        for (emulated::Copy const& copy : groups.front())
        {
            std::memcpy(copy.to, copy.bytes, 16);
            race::copyArrived(copy.to, emulated::current->index.x);
            emulated::current->hasUnpublished = true;
        }
        groups.pop_front();
    }
}

#define LFX_WARPGROUPS

inline void publishCopies(char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    if (!race::isRemoved(file, line))
    {
        emulated::current->hasUnpublished = false;
    }
}

// See plugins/device.cuh. Shared memory starts at a multiple of 1,024 bytes there.
class SharedRows
{
public:
    explicit SharedRows(void const* rows)
        : SharedRows(static_cast<uint8_t const*>(rows) - emulated::shared)
    {
        if (mOffset % 1024 != 0)
        {
            emulated::fail("rows for a warpgroup start at an address that is no multiple of 1,024");
        }
    }
    SharedRows right(int columns) const
    {
        return SharedRows(mOffset + columns * 2);
    }
    SharedRows down(int rows) const
    {
        return SharedRows(mOffset + rows * 128);
    }
    size_t offset() const
    {
        return mOffset;
    }
    // PTX ISA, "128-byte swizzle": bits 4 to 6 of an address are exclusive with bits 7 to 9.
    static uint8_t const* address(size_t offset, int row, int column)
    {
        size_t const plain = offset + row * 128 + column * 2;
        return emulated::shared + (plain ^ (plain >> 7 & 7) << 4);
    }

private:
    explicit SharedRows(size_t offset)
        : mOffset(offset)
    {
    }
    size_t mOffset;
};

inline void startProduct(
    float (*c)[4], int columns, uint32_t const (&a)[4], SharedRows b, bool isSum, bool isTransposed)
{
    if (!emulated::current->mayStartProducts)
    {
        emulated::fail("a product of a warpgroup before beginProducts()");
    }
    emulated::current->products.push_back({c, columns, {a[0], a[1], a[2], a[3]}, b.offset(), isSum, isTransposed});
    ++emulated::current->numProducts;
}

template <typename T, bool kIS_SUM, int kN>
void startProduct(float (&c)[kN][4], uint32_t const (&a)[4], SharedRows b)
{
    startProduct(c, kN * 8, a, b, kIS_SUM, true);
}

template <typename T>
void startSum(float (&c)[8][4], uint32_t const (&a)[4], SharedRows b)
{
    startProduct(c, 64, a, b, true, false);
}

template <int kN>
void pinRegisters(float (&)[kN][4])
{
}

inline void beginProducts(char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    emulated::current->mayStartProducts = !race::isRemoved(file, line);
}

// Computes the products, so that a kernel that uses them too early fails.
template <typename T, int kN>
LFX_AT_CALLER void finishProducts(float (&)[kN][4], char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    emulated::Fiber& fiber = *emulated::current;
    fiber.mayStartProducts = false;
    if (race::isRemoved(file, line))
    {
        return;
    }
    if (emulated::isUnpublished)
    {
        emulated::fail("a product of a warpgroup reads copies that were not published before the barrier");
    }
    for (emulated::GroupProduct const& product : fiber.products)
    {
        int const chunks = product.isTransposed ? 2 : 8; // of a row; the lanes read them in turn
        int const rows = product.isTransposed ? product.columns : 16;
        for (int i = fiber.index.x % 32; i < rows * chunks; i += 32)
        {
            race::read(SharedRows::address(product.b, i / chunks, i % chunks * 8), 16);
        }
    }
    emulated::warp(
        [](void* const(&lanes)[32]) {
            auto const products = [&](int lane) -> std::vector<emulated::GroupProduct> const& {
                return static_cast<emulated::Fiber*>(lanes[lane])->products;
            };
            for (size_t i = 0; i < products(0).size(); ++i)
            {
                emulated::GroupProduct const& first = products(0)[i];
                static float b[16][64];
                for (int k = 0; k < 16; ++k)
                {
                    for (int column = 0; column < first.columns; ++column)
                    {
                        uint8_t const* const from = first.isTransposed ? SharedRows::address(first.b, column, k)
                                                                       : SharedRows::address(first.b, k, column);
                        T element;
                        std::memcpy(&element, from, 2);
                        b[k][column] = toFloat(element);
                    }
                }
                static float a[16][16];
                for (int lane = 0; lane < 32; ++lane)
                {
                    for (int j = 0; j < 8; ++j) // as for mma()
                    {
                        a[lane / 4 + (j / 2 % 2) * 8][lane % 4 * 2 + j % 2 + (j / 4) * 8]
                            = unpack<T>(products(lane)[i].a[j / 2], j % 2);
                    }
                }
                for (int lane = 0; lane < 32; ++lane)
                {
                    for (int column = lane % 4 * 2; column < first.columns; column += 8)
                    {
                        for (int j = 0; j < 4; ++j)
                        {
                            float sum = 0.0F;
                            for (int k = 0; k < 16; ++k)
                            {
                                sum += a[lane / 4 + j / 2 * 8][k] * b[k][column + j % 2];
                            }
                            float& c = products(lane)[i].c[column / 8][j];
                            c = first.isSum ? c + sum : sum;
                        }
                    }
                }
            }
        },
        "wgmma", &fiber);
    fiber.products.clear();
}

inline int32_t threadIndexAgain()
{
    return emulated::current->index.x;
}

inline void* sharedMemory()
{
    return emulated::shared;
}

// An emulated kernel has nothing to load.
template <typename Params>
int32_t preloadKernel(void (*)(Params)) noexcept
{
    return 0;
}

// Of the emulated GPU: LFX_MULTIPROCESSORS, or those of an H100.
inline int32_t multiprocessors() noexcept
{
    char const* const count = std::getenv("LFX_MULTIPROCESSORS");
    return count != nullptr ? std::atoi(count) : 132;
}

// Whether the emulated GPU has products of a warpgroup: LFX_COMPUTE_CAPABILITY, or that of an A100.
template <typename Params>
bool hasWarpgroups(void (*)(Params), int32_t) noexcept
{
    char const* const capability = std::getenv("LFX_COMPUTE_CAPABILITY");
    return capability != nullptr && std::strcmp(capability, "90") == 0;
}

template <typename Params>
int32_t launch(
    void (*kernel)(Params), dim3 grid, int32_t threads, size_t sharedBytes, Params const& params, cudaStream_t) noexcept
{
    if (sharedBytes > 101376) // kMAX_SHARED_BYTES of plugins/device.cuh
    {
        return cudaErrorInvalidValue;
    }
    emulated::SharedMemory memory(sharedBytes);
    race::beginLaunch(reinterpret_cast<void const*>(kernel), emulated::shared, sharedBytes);
    if (emulated::fibers.size() < static_cast<size_t>(threads))
    {
        emulated::fibers = std::vector<emulated::Fiber>(threads);
        emulated::starts = std::vector<emulated::Start>(threads);
    }
    emulated::body = [kernel, &params] { kernel(params); };
    emulated::Turns blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
    for (size_t block : blocks.next())
    {
        emulated::blockIndex = {static_cast<int32_t>(block % grid.x), static_cast<int32_t>(block / grid.x % grid.y),
            static_cast<int32_t>(block / grid.x / grid.y)};
        memory.poison();
        race::beginBlock(static_cast<int>(block));
        emulated::runBlock(threads);
        memory.checkEnd();
    }
    return 0;
}

} // namespace lfx

// A removed barrier, wait or commit does nothing; see lfxRaceRemove() in race_detector.cpp.
inline void __syncthreads(char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    bool value = false;
    if (!lfx::race::isRemoved(file, line))
    {
        lfx::emulated::yield(lfx::emulated::State::kAT_BLOCK, "__syncthreads", &value);
    }
}

inline int __syncthreads_or(int predicate, char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    bool value = predicate != 0;
    if (!lfx::race::isRemoved(file, line))
    {
        lfx::emulated::yield(lfx::emulated::State::kAT_BLOCK, "__syncthreads_or", &value);
    }
    return value ? 1 : 0;
}

inline void __syncwarp(char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    if (!lfx::race::isRemoved(file, line))
    {
        int32_t thread = lfx::emulated::current->index.x;
        lfx::emulated::warp(
            [](void* const(&lanes)[32]) { lfx::race::warpBarrier(*static_cast<int32_t*>(lanes[0]) / 32); },
            "__syncwarp", &thread);
    }
}

inline void __threadfence(char const* file = __builtin_FILE(), int line = __builtin_LINE())
{
    if (!lfx::race::isRemoved(file, line))
    {
        lfx::race::fence();
    }
}

inline uint32_t __ballot_sync(uint32_t, bool predicate)
{
    struct Vote
    {
        bool predicate;
        uint32_t bits;
    } vote{predicate, 0};
    lfx::emulated::warp(
        [](void* const(&lanes)[32]) {
            uint32_t bits = 0;
            for (int lane = 0; lane < 32; ++lane)
            {
                bits |= static_cast<uint32_t>(static_cast<Vote*>(lanes[lane])->predicate) << lane;
            }
            for (void* lane : lanes)
            {
                static_cast<Vote*>(lane)->bits = bits;
            }
        },
        "__ballot_sync", &vote);
    return vote.bits;
}

inline float __shfl_xor_sync(uint32_t, float value, int mask)
{
    struct Shuffle
    {
        float value;
        int mask;
        float result;
    } shuffle{value, mask, 0.0F};
    lfx::emulated::warp(
        [](void* const(&lanes)[32]) {
            for (int lane = 0; lane < 32; ++lane)
            {
                Shuffle& mine = *static_cast<Shuffle*>(lanes[lane]);
                mine.result = static_cast<Shuffle*>(lanes[lane ^ mine.mask])->value;
            }
        },
        "__shfl_xor_sync", &shuffle);
    return shuffle.result;
}

template <typename T, typename Operation>
LFX_AT_CALLER T atomicOperation(T* address, Operation operation)
{
    lfx::race::atomic(address, sizeof(T));
    lfx::race::Unchecked const unchecked;
    T const old = *address;
    *address = operation(old);
    return old;
}

LFX_AT_CALLER uint32_t atomicAnd(uint32_t* address, uint32_t value)
{
    return atomicOperation(address, [value](uint32_t old) { return old & value; });
}

LFX_AT_CALLER int32_t atomicMax(int32_t* address, int32_t value)
{
    return atomicOperation(address, [value](int32_t old) { return std::max(old, value); });
}

LFX_AT_CALLER int32_t atomicAdd(int32_t* address, int32_t value)
{
    return atomicOperation(address, [value](int32_t old) { return old + value; });
}

// Blocks, warps and lanes take turns in the random order of a seed from now on; 0: in ascending order.
extern "C" __attribute__((used)) inline void lfxEmulatedOrder(uint64_t seed)
{
    lfx::emulated::isRandom = seed != 0;
    lfx::emulated::random.seed(seed);
}
