// The interface of the attention kernels: for each op a params struct, a check and a launch. It needs no TensorRT.
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

// Every pointer is to device memory (to host memory for the host reference), contiguous, and 16-byte aligned.
struct BandedParams
{
    void const* query;          // (B, S, H·D)
    void const* key;            // (B, S, H·D)
    void const* value;          // (B, S, H·D)
    int32_t const* keyMask;     // (B, S), 0 = padding
    int32_t const* globalIndex; // (B, G), unused slots -1
    void const* globalContext;  // (B, G, H·D)
    void* context;              // (B, S, H·D)
    int32_t batch;
    int32_t seqlen;
    int32_t slots;
    int32_t numHeads;
    int32_t headSize;
    int32_t window; // one-sided, in steps of dilation
    int32_t dilation;
    int32_t causal;
    float scale;
    Type type;
};

struct GlobalParams
{
    void const* query;      // (B, G, H·D)
    void const* key;        // (B, S, H·D)
    void const* value;      // (B, S, H·D)
    int32_t const* keyMask; // (B, S)
    void* context;          // (B, G, H·D)
    float* workspace;       // globalWorkspaceBytes()
    int32_t batch;
    int32_t seqlen;
    int32_t queries;
    int32_t numHeads;
    int32_t headSize;
    float scale;
    Type type;
};

constexpr int32_t kMAX_BANDED_HEAD_SIZE = 128;
constexpr int32_t kMAX_GLOBAL_HEAD_SIZE = 1024;
constexpr int32_t kHEAD_SIZE_MULTIPLE = 8; // kernels copy 16 bytes at a time
constexpr int32_t kMAX_SEQLEN = 1 << 18;
constexpr int32_t kMAX_REACH = 1 << 17; // keys that the band of 64 queries covers; each takes a bit of shared memory

// Returns the reason why the kernels do not support these sizes and attributes, or nullptr if they do. Pointers are not
// checked.
char const* unsupportedReason(BandedParams const& params) noexcept;
char const* unsupportedReason(GlobalParams const& params) noexcept;

// Workspace of GlobalAttention for sizes up to these: the partial result of each part of the keys.
size_t globalWorkspaceBytes(int32_t batch, int32_t queries, int32_t numHeads, int32_t headSize) noexcept;

// Enqueue the kernels on a stream. Returns a cudaError_t, 0 on success. Neither allocates nor synchronizes.
int32_t launchBandedAttention(BandedParams const& params, CUstream_st* stream) noexcept;
int32_t launchGlobalAttention(GlobalParams const& params, CUstream_st* stream) noexcept;

} // namespace lfx
