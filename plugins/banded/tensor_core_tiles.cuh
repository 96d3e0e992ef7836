// Tiles of queries, keys and values for the tensor cores: their sizes, their layout in shared memory, and their copies.
#pragma once

#include "banded/block.cuh"

namespace lfx::banded
{

// kD: columns of a tile in shared memory, 32, 64 or 128; smaller heads are padded with zeros.
template <int kD>
struct TensorCoreTraits : BlockTraits
{
    static constexpr int kKEYS = 64;       // of a tile
    static constexpr int kGROUP_KEYS = 16; // a warp computes a whole tile, or those groups of it that it needs
    static constexpr int kGROUPS = kKEYS / kGROUP_KEYS;
    static constexpr int kWARP_QUERIES = kQUERIES / kWARPS;
    static constexpr int kCHUNK = 8;            // elements of a 16-byte copy
    static constexpr int kCHUNKS = kD / kCHUNK; // of a row
    static constexpr int kTILE_SIZE = kKEYS * kD;
    static constexpr size_t kSHARED_BYTES
        = 2 * (kQUERIES * kD + 4 * kTILE_SIZE); // queries; two tiles of keys and values
    // The fragments of the queries stay in registers if there are enough of them; otherwise each tile loads them again.
    static constexpr bool kKEEPS_QUERIES = kD <= 64;
    // Blocks that a multiprocessor should hold. For 4 with head size 64 the compiler spills on sm_80, sm_100 and sm_120,
    // and on compute capability 8.6, 8.9 and 12 the shared memory is too small for a fourth.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    static constexpr int kMIN_BLOCKS = kD <= 64 ? 4 : 1;
#else
    static constexpr int kMIN_BLOCKS = kD <= 32 ? 4 : kD <= 64 ? 3 : 1;
#endif

    static_assert(kKEYS <= kMAX_TILE_KEYS && kKEYS == 2 * kWORD_BITS, "a tile has two words of Block::localKeys");
    static_assert(kKEYS == kQUERIES, "queries are copied as a tile of keys is");
    static_assert(kWARP_QUERIES == 16, "the rows of an mma");
};

// Offset in a tile of a row's 16-byte chunk. Chunks are permuted within a row, so that ldmatrix, which reads one chunk of
// eight rows, has no bank conflicts.
template <int kD>
LFX_HOST_DEVICE int32_t swizzled(int32_t row, int32_t chunk)
{
    int32_t const permutation = kD >= 64 ? row & 7 : (row >> 1) & 3;
    return row * kD + ((chunk ^ permutation) << 3);
}

// The part of each tile that a thread copies: the same 16-byte chunk of every kROWS-th row.
template <int kD>
struct ThreadCopy
{
    using Traits = TensorCoreTraits<kD>;
    static constexpr int kROWS = Traits::kTHREADS / Traits::kCHUNKS; // that the block copies in a step
    static constexpr int kSTEPS = Traits::kKEYS / kROWS;
    static_assert(kROWS % 8 == 0, "the chunks of all rows of a thread are permuted alike");
    static_assert(kWORD_BITS % kROWS == 0, "the rows of a step are in one word of Block::localKeys");

    __device__ __forceinline__ explicit ThreadCopy(BandedParams const& p)
        : row(threadIdx.x / Traits::kCHUNKS)
        , column(threadIdx.x % Traits::kCHUNKS * Traits::kCHUNK)
        , rowBit(column < p.headSize ? 1U << row : 0U)
        , stride(kROWS * p.dilation * p.numHeads * p.headSize)
        , target(swizzled<kD>(row, column / Traits::kCHUNK))
    {
    }

    int32_t row; // the first one
    int32_t column;
    uint32_t rowBit; // of the first row in a word; 0 if the column is past the end of the head
    int32_t stride;  // between its rows in a tensor; below 2^26, as kROWS · D and dilation · H are limited
    int32_t target;  // offset of the first row's chunk in a tile
};

// The chunk at `column` of a token's key and value.
template <typename T>
struct KeyValueSource
{
    __device__ __forceinline__ KeyValueSource(Block const& block, int32_t position, int32_t column)
        : key(static_cast<T const*>(block.params.key) + block.offset(position) + column)
        , value(static_cast<T const*>(block.params.value) + block.offset(position) + column)
    {
    }

    T const* key;
    T const* value;
};

// Each of these starts the copies of a tile. Masked rows are zero-filled; their addresses are never dereferenced.
template <typename T, int kD>
__device__ __forceinline__ void copyQueries(Block const& block, ThreadCopy<kD> const& copy, T* tile)
{
    int32_t const query = block.firstQuery + copy.row;
    T const* const source
        = static_cast<T const*>(block.params.query) + block.offset(block.position(query)) + copy.column;
#pragma unroll
    for (int step = 0; step < ThreadCopy<kD>::kSTEPS; ++step)
    {
        int const row = step * ThreadCopy<kD>::kROWS;
        bool const valid = copy.rowBit != 0 && query + row < block.length;
        copyAsync(tile + copy.target + row * kD, source + step * copy.stride, valid);
    }
}

template <typename T, int kD>
__device__ __forceinline__ void copyBand(
    Block const& block, ThreadCopy<kD> const& copy, T* keys, T* values, int32_t firstKey)
{
    KeyValueSource<T> source(block, block.position(firstKey + copy.row), copy.column);
    uint32_t const* const localKeys = block.localKeys + (firstKey - block.band.begin) / kWORD_BITS;
    uint32_t const words[2] = {localKeys[0], localKeys[1]};
#pragma unroll
    for (int step = 0; step < ThreadCopy<kD>::kSTEPS; ++step)
    {
        int const row = step * ThreadCopy<kD>::kROWS;
        bool const valid = (words[row / kWORD_BITS] & copy.rowBit << row % kWORD_BITS) != 0;
        copyAsync(keys + copy.target + row * kD, source.key, valid);
        copyAsync(values + copy.target + row * kD, source.value, valid);
        source.key += copy.stride;
        source.value += copy.stride;
    }
}

// Only the first `groups` groups of 16 slots are copied.
template <typename T, int kD>
__device__ __forceinline__ void copyGlobalTokens(
    Block const& block, ThreadCopy<kD> const& copy, T* keys, T* values, int32_t firstSlot, int32_t groups)
{
#pragma unroll
    for (int step = 0; step < ThreadCopy<kD>::kSTEPS; ++step)
    {
        int const row = step * ThreadCopy<kD>::kROWS;
        if (row >= groups * TensorCoreTraits<kD>::kGROUP_KEYS)
        {
            break;
        }
        int32_t const position = block.slotPosition(firstSlot + row + copy.row);
        bool const valid = copy.rowBit != 0 && position >= 0;
        KeyValueSource<T> const source(block, position, copy.column);
        copyAsync(keys + copy.target + row * kD, source.key, valid);
        copyAsync(values + copy.target + row * kD, source.value, valid);
    }
}

} // namespace lfx::banded
