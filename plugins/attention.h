// The interface of the attention kernels: for each op a params struct, its checks and a launch. It needs no host's headers.
// cpu/cpu_attention.h has the launches on the CPU.
//
//   B batch    S sequence length    H heads    D head size    G global slots (or queries of GlobalAttention)
#pragma once

#include <cstddef>
#include <cstdint>

// Functions that callers look up by name; every other symbol is hidden.
#define LFX_EXPORT extern "C" __attribute__((visibility("default")))

struct CUstream_st; // cudaStream_t is a pointer to it

namespace lfx
{

enum class Type : int32_t
{
    kFLOAT = 0,
    kHALF = 1,
    kBF16 = 2,
};

// Pointers are to device memory, and to host memory for the CPU kernels and the host reference. On the device all but
// keyMask, globalIndex and logSumExp are 16-byte aligned, as is each row.
//
// A stride is the number of elements from a token's row to the next token's row, H·D or more. Batch elements follow one
// another without a gap: the rows of query, key and value may be thirds of the rows of one tensor (B, S, 3·H·D). The CUDA
// kernels of BandedAttention take a dilation times a stride of up to 2^24 - 1.
struct BandedParams
{
    uint32_t structBytes = sizeof(BandedParams); // a caller that was compiled with another layout is refused
    Type type = Type::kFLOAT;
    void const* query = nullptr;          // (B, S, H·D)
    void const* key = nullptr;            // (B, S, H·D)
    void const* value = nullptr;          // (B, S, H·D)
    int32_t const* keyMask = nullptr;     // (B, S), 0 = padding
    int32_t const* globalIndex = nullptr; // (B, G), each position once, unused slots -1
    void const* globalContext = nullptr;  // (B, G, H·D), without strides
    void* context = nullptr;              // (B, S, H·D)
    float* logSumExp = nullptr;           // (B, H, S), or nullptr if it is not wanted; see below
    int64_t queryStride = 0;
    int64_t keyStride = 0;
    int64_t valueStride = 0;
    int64_t contextStride = 0;
    int32_t batch = 0;
    int32_t seqlen = 0;
    int32_t slots = 0;
    int32_t numHeads = 0;
    int32_t headSize = 0;
    int32_t window = 0; // one-sided, in steps of dilation
    int32_t dilation = 1;
    int32_t causal = 0;
    float scale = 0.0F;
};

struct GlobalParams
{
    uint32_t structBytes = sizeof(GlobalParams);
    Type type = Type::kFLOAT;
    void const* query = nullptr;      // (B, G, H·D)
    void const* key = nullptr;        // (B, S, H·D)
    void const* value = nullptr;      // (B, S, H·D)
    int32_t const* keyMask = nullptr; // (B, S)
    void* context = nullptr;          // (B, G, H·D)
    float* logSumExp = nullptr;       // (B, H, G), or nullptr
    float* workspace = nullptr;       // globalWorkspaceBytes()
    int64_t queryStride = 0;
    int64_t keyStride = 0;
    int64_t valueStride = 0;
    int64_t contextStride = 0;
    int32_t batch = 0;
    int32_t seqlen = 0;
    int32_t queries = 0;
    int32_t numHeads = 0;
    int32_t headSize = 0;
    float scale = 0.0F;
};

// logSumExp of a row is the natural logarithm of the sum of exp(scale · query · key) over the keys that it sees. It is -inf
// for rows that see no key, and for the rows that BandedAttention does not compute: padding and global tokens.

// Sets the strides of tensors whose rows follow one another without a gap.
template <typename Params>
void setContiguous(Params& params)
{
    int64_t const width = static_cast<int64_t>(params.numHeads) * params.headSize;
    params.queryStride = params.keyStride = params.valueStride = params.contextStride = width;
}

constexpr int32_t kMAX_BANDED_HEAD_SIZE = 128;
constexpr int32_t kMAX_GLOBAL_HEAD_SIZE = 1024;
constexpr int32_t kHEAD_SIZE_MULTIPLE = 8; // kernels copy 16 bytes at a time
constexpr size_t kDEVICE_ALIGNMENT = 16;
constexpr int32_t kMAX_SEQLEN = 1 << 18;
constexpr int32_t kMAX_CPU_SEQLEN = 1 << 30; // so that the sum of two positions is an int32_t
constexpr int32_t kMAX_REACH = 1 << 17; // keys that the band of 64 queries covers; each takes a bit of shared memory

enum class Target : int32_t
{
    kCPU,
    kCUDA,
};

// Returns the reason why the kernels of a target do not support these sizes, strides and attributes, or nullptr if they do.
// Pointers are not checked.
char const* unsupportedReason(BandedParams const& params, Target target) noexcept;
char const* unsupportedReason(GlobalParams const& params, Target target) noexcept;

// Returns the reason why the kernels cannot access the tensors, or nullptr if they can: a pointer is null, or a pointer or
// a row is not aligned to `alignment` bytes. kDEVICE_ALIGNMENT on the device, 4 on the CPU.
char const* inaccessibleReason(BandedParams const& params, size_t alignment) noexcept;
char const* inaccessibleReason(GlobalParams const& params, size_t alignment) noexcept;

// Workspace of GlobalAttention for sizes up to these: the partial result of each part of the keys.
size_t globalWorkspaceBytes(int32_t batch, int32_t queries, int32_t numHeads, int32_t headSize) noexcept;

// Load all kernels of an op onto the current device and set their attributes, so that no launch does: call them before a
// stream is captured. Return a cudaError_t, 0 on success.
int32_t preloadBandedAttention() noexcept;
int32_t preloadGlobalAttention() noexcept;

// Enqueue the kernels on a stream. Returns a cudaError_t, 0 on success. Neither allocates nor synchronizes.
int32_t launchBandedAttention(BandedParams const& params, CUstream_st* stream) noexcept;
int32_t launchGlobalAttention(GlobalParams const& params, CUstream_st* stream) noexcept;

} // namespace lfx
