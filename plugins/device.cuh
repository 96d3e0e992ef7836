// Device primitives of the kernels: tensor-core products, fragment loads, asynchronous copies, 16-bit floats, launches.
// Tests replace them with an emulation on the CPU (tests/plugins/emulated_device.h).
//
// Source: PTX ISA, "mma.sync m16n8k16", "ldmatrix", "cp.async", "ex2", "lg2".
#pragma once

namespace lfx
{

constexpr int kMAX_SHARED_BYTES = 101376; // of a block on compute capability 8.6, 8.9 and 12.0, the smallest limit

} // namespace lfx

#ifdef LFX_EMULATED
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace lfx
{

using Half = __half;
using Bf16 = __nv_bfloat16;

template <typename T>
__device__ __forceinline__ T fromFloat(float x);

template <>
__device__ __forceinline__ float fromFloat<float>(float x)
{
    return x;
}

template <>
__device__ __forceinline__ Half fromFloat<Half>(float x)
{
    return __float2half_rn(x);
}

template <>
__device__ __forceinline__ Bf16 fromFloat<Bf16>(float x)
{
    return __float2bfloat16_rn(x);
}

// Two numbers rounded and packed into one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high)
{
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high)
{
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

// 2^x with a relative error of at most 2^-22; subnormal results are flushed to 0.
__device__ __forceinline__ float exp2Flushed(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(x) with a relative error of at most 2^-22, and an absolute one between 0.5 and 2; -inf for 0 and subnormal numbers.
__device__ __forceinline__ float log2Flushed(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c (16×8) += a (16×16) · b (16×8). With r = lane / 4 and t = lane % 4, a lane holds
//   a: rows r, r + 8, r, r + 8 at columns 2t, 2t, 2t + 8, 2t + 8 (two neighbours each)
//   b: rows 2t, 2t + 8 (two neighbours each) of column r        c: rows r, r, r + 8, r + 8 at columns 2t, 2t + 1 twice
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<Half>(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<Bf16>(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t sharedAddress(void const* pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Loads four 8×8 matrices of 16-bit numbers; lanes 8i to 8i + 7 pass the addresses of the rows of matrix i, 16 bytes each.
// A lane receives row lane / 4, columns 2·(lane % 4) and the next, of each matrix.
__device__ __forceinline__ void loadMatrices(uint32_t (&r)[4], void const* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(sharedAddress(row))
        : "memory");
}

// loadMatrices() with each matrix transposed.
__device__ __forceinline__ void loadMatricesTransposed(uint32_t (&r)[4], void const* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(sharedAddress(row))
        : "memory");
}

// Products of a warpgroup: four warps, of which the first has a number that is a multiple of four. Only sm_90a has them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LFX_WARPGROUPS

// Rows of 128 bytes in shared memory, for products of a warpgroup. Row 0 is at a multiple of 1,024 bytes, and the 16-byte
// chunks of a row are permuted by the last three bits of its number.
class SharedRows
{
public:
    __device__ __forceinline__ explicit SharedRows(void const* rows)
        : mAddress((sharedAddress(rows) & 0x3ffff) >> 4)
    {
    }

    // From a column on, a multiple of 8.
    __device__ __forceinline__ SharedRows right(int columns) const
    {
        return SharedRows(mAddress + columns / 8);
    }

    // From a row on, a multiple of 8.
    __device__ __forceinline__ SharedRows down(int rows) const
    {
        return SharedRows(mAddress + rows * 8);
    }

    __device__ __forceinline__ uint64_t descriptor() const
    {
        constexpr uint64_t kPERMUTED = 1ULL << 62;
        constexpr uint64_t kEIGHT_ROWS = 1024ULL >> 4 << 32;
        return kPERMUTED | kEIGHT_ROWS | mAddress;
    }

private:
    __device__ __forceinline__ explicit SharedRows(uint32_t address)
        : mAddress(address)
    {
    }

    uint32_t mAddress; // in units of 16 bytes
};

#define LFX_TILE(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define LFX_2_TILES(c) LFX_TILE(c, 0), LFX_TILE(c, 1)
#define LFX_8_TILES(c)                                                                                                 \
    LFX_TILE(c, 0), LFX_TILE(c, 1), LFX_TILE(c, 2), LFX_TILE(c, 3), LFX_TILE(c, 4), LFX_TILE(c, 5), LFX_TILE(c, 6),    \
        LFX_TILE(c, 7)
#define LFX_WGMMA(columns, type) "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type
#define LFX_8_REGISTERS " {%0,%1,%2,%3,%4,%5,%6,%7}"
#define LFX_32_REGISTERS                                                                                               \
    " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,"                                                                                                             \
    "%31}"

// Starts c (64×8N) = a (64×16) · bᵀ, or c += a · bᵀ if kIS_SUM; b is 16 columns of 8N rows, with N = 2 or 8. A warp holds 16
// rows of a and c, in the layout of mma().
template <typename T, bool kIS_SUM, int kN>
__device__ __forceinline__ void startProduct(float (&c)[kN][4], uint32_t const (&a)[4], SharedRows b)
{
    constexpr bool kIS_HALF = std::is_same<T, Half>::value;
    if constexpr (kN == 2 && kIS_HALF)
    {
        asm volatile(LFX_WGMMA("16", "f16") LFX_8_REGISTERS ", {%8,%9,%10,%11}, %12, %13, 1, 1, 0;"
            : LFX_2_TILES(c)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "n"(kIS_SUM));
    }
    else if constexpr (kN == 2)
    {
        asm volatile(LFX_WGMMA("16", "bf16") LFX_8_REGISTERS ", {%8,%9,%10,%11}, %12, %13, 1, 1, 0;"
            : LFX_2_TILES(c)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "n"(kIS_SUM));
    }
    else if constexpr (kIS_HALF)
    {
        asm volatile(LFX_WGMMA("64", "f16") LFX_32_REGISTERS ", {%32,%33,%34,%35}, %36, %37, 1, 1, 0;"
            : LFX_8_TILES(c)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "n"(kIS_SUM));
    }
    else
    {
        asm volatile(LFX_WGMMA("64", "bf16") LFX_32_REGISTERS ", {%32,%33,%34,%35}, %36, %37, 1, 1, 0;"
            : LFX_8_TILES(c)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "n"(kIS_SUM));
    }
}

// Starts c (64×64) += a (64×16) · b, where b is 16 rows of 64 columns; a and c as above.
template <typename T>
__device__ __forceinline__ void startSum(float (&c)[8][4], uint32_t const (&a)[4], SharedRows b)
{
    if constexpr (std::is_same<T, Half>::value)
    {
        asm volatile(LFX_WGMMA("64", "f16") LFX_32_REGISTERS ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
            : LFX_8_TILES(c)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()));
    }
    else
    {
        asm volatile(LFX_WGMMA("64", "bf16") LFX_32_REGISTERS ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
            : LFX_8_TILES(c)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()));
    }
}

// The compiler moves no access of c across this.
template <int kN>
__device__ __forceinline__ void pinRegisters(float (&c)[kN][4])
{
#pragma unroll
    for (int n = 0; n < kN; ++n)
    {
        asm volatile("" : LFX_TILE(c, n)::"memory");
    }
}

// Comes before a product whose registers have been written since the last product; those of c pass pinRegisters() before.
__device__ __forceinline__ void beginProducts()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Waits for all products of the thread. Those of T have written c.
template <typename T, int kN>
__device__ __forceinline__ void finishProducts(float (&c)[kN][4])
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pinRegisters(c);
}

// Products that start after the next barrier see what copyAsync() of this thread has written, once it has arrived.
__device__ __forceinline__ void publishCopies()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#undef LFX_TILE
#undef LFX_2_TILES
#undef LFX_8_TILES
#undef LFX_WGMMA
#undef LFX_8_REGISTERS
#undef LFX_32_REGISTERS
#endif

// Starts an asynchronous copy of 16 bytes from global to shared memory; if not valid, writes zeros and reads nothing.
__device__ __forceinline__ void copyAsync(void* shared, void const* global, bool valid)
{
    int const bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sharedAddress(shared)), "l"(global), "r"(bytes)
        : "memory");
}

// Commits the copies since the last commit as one group.
__device__ __forceinline__ void commitCopies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPENDING groups, the newest, are unfinished.
template <int kPENDING>
__device__ __forceinline__ void waitForCopies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kPENDING) : "memory");
}

// threadIdx.x, read again, so that the compiler does not keep what is computed from it in registers.
__device__ __forceinline__ int32_t threadIndexAgain()
{
    int32_t index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

__device__ __forceinline__ void* sharedMemory()
{
    extern __shared__ __align__(1024) uint8_t memory[];
    return memory;
}

// Loads a kernel onto the current device and sets its attributes, which are the same for all launches.
template <typename Params>
int32_t preloadKernel(void (*kernel)(Params)) noexcept
{
    cudaError_t const error
        = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMAX_SHARED_BYTES);
    return error == cudaSuccess ? cudaSuccess : cudaGetLastError();
}

// Number of multiprocessors of the current device.
inline int32_t multiprocessors() noexcept
{
    int device = 0;
    int count = 0;
    if (cudaGetDevice(&device) != cudaSuccess
        || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    {
        return INT32_MAX; // the launch fails with the reason
    }
    return count;
}

// Whether the current device has the products of a warpgroup, and the library machine code with them, of which this kernel of
// so many threads is an example.
template <typename Params>
bool hasWarpgroups(void (*kernel)(Params), int32_t threads) noexcept
{
    int device = 0;
    int major = 0;
    int minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess
        || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess
        || cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess || major != 9
        || minor != 0)
    {
        return false;
    }
    static bool const isCompiled = [kernel, threads] { // the same for all such devices
        cudaFuncAttributes attributes;
        if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess)
        {
            static_cast<void>(cudaGetLastError()); // so that the next launch does not report it
            return false;
        }
        return attributes.maxThreadsPerBlock >= threads;
    }();
    return isCompiled;
}

template <typename Params>
int32_t launch(void (*kernel)(Params), dim3 grid, int32_t threads, size_t sharedBytes, Params const& params,
    cudaStream_t stream) noexcept
{
    if (sharedBytes > 48U * 1024U)
    {
        // Always the same value: the attribute is global to the process, and other threads launch with other sizes. After
        // preload() this changes nothing.
        int32_t const error = preloadKernel(kernel);
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    kernel<<<grid, threads, sharedBytes, stream>>>(params);
    return cudaGetLastError(); // clears the error, so that the next launch does not report it
}

} // namespace lfx

#endif

namespace lfx
{

constexpr int kWARP_SIZE = 32;
constexpr uint32_t kFULL_WARP = 0xffffffffU; // mask of all lanes

} // namespace lfx
