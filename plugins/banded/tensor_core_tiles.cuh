// Tiles of queries, keys and values for the tensor cores: their sizes, their layout in shared memory, and their copies.
#pragma once

#include "banded/block.cuh"

namespace lfx::banded
{

// Of the wide blocks: the number that a multiprocessor should hold with head size 32 and 64, and kKEPT_STEPS with 64.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
constexpr int kWIDE_BLOCKS_32 = 4;
constexpr int kWIDE_BLOCKS_64 = 3;
constexpr int kWIDE_KEPT_STEPS = 3;
#elif __CUDA_ARCH__ == 800
constexpr int kWIDE_BLOCKS_32 = 4;
constexpr int kWIDE_BLOCKS_64 = 3;
constexpr int kWIDE_KEPT_STEPS = 2;
#elif __CUDA_ARCH__ == 1000
constexpr int kWIDE_BLOCKS_32 = 3;
constexpr int kWIDE_BLOCKS_64 = 3;
constexpr int kWIDE_KEPT_STEPS = 1;
#else
constexpr int kWIDE_BLOCKS_32 = 3;
constexpr int kWIDE_BLOCKS_64 = 2;
constexpr int kWIDE_KEPT_STEPS = 4;
#endif

// kD: columns of a tile in shared memory, 32, 64 or 128; smaller heads are padded with zeros.
// kROW_TILES: mma tiles of 16 queries in a warp. With 2 each fragment of keys and values feeds two products, and a block
// reads little more than half as many keys and values for a query; with 1 there are twice as many blocks.
template <int kD_, int kROW_TILES_>
struct TensorCoreTraits : BlockTraits
{
    static constexpr int kD = kD_;
    static constexpr int kROW_TILES = kROW_TILES_;
    static constexpr int kWARP_QUERIES = 16 * kROW_TILES;
    static constexpr int kQUERIES = kWARPS * kWARP_QUERIES;
    static constexpr int kKEYS = 64;       // of a tile
    static constexpr int kGROUP_KEYS = 32; // whose scores a warp computes at a time
    static constexpr int kGROUPS = kKEYS / kGROUP_KEYS;
    // So few global tokens of a tile, or fewer, are a group of their own. With one row tile they are not: nvcc would take
    // more instructions for all other groups.
    static constexpr int kFEW_KEYS = 16;
    static constexpr bool kGROUPS_FEW_KEYS = kROW_TILES > 1;
    static constexpr int kCHUNK = 8;            // elements of a 16-byte copy
    static constexpr int kCHUNKS = kD / kCHUNK; // of a row
    static constexpr int kTILE_SIZE = kKEYS * kD;
    static constexpr int kQUERIES_SIZE = kQUERIES * kD;
    static constexpr size_t kSHARED_BYTES
        = 2 * (kQUERIES_SIZE + 4 * kTILE_SIZE); // queries; two tiles of keys and values
    // Blocks that a multiprocessor should hold. Those of 8.6, 8.9 and 12 have shared memory for two of the wide ones.
    static constexpr int kMIN_NARROW_BLOCKS = kD <= 64 ? 4 : 2;
    static constexpr int kMIN_WIDE_BLOCKS = kD == 32 ? kWIDE_BLOCKS_32 : kD == 64 ? kWIDE_BLOCKS_64 : 1;
    static constexpr int kMIN_BLOCKS = kROW_TILES == 1 ? kMIN_NARROW_BLOCKS : kMIN_WIDE_BLOCKS;
    // Steps of 16 columns whose query fragments stay in registers, as many as fit; each group of keys loads the others
    // again.
    static constexpr int kKEPT_STEPS = kD == 128 ? 0 : kD == 64 && kROW_TILES == 2 ? kWIDE_KEPT_STEPS : kD / 16;

    static_assert(kKEYS <= kMAX_TILE_KEYS && kKEYS == 2 * kWORD_BITS, "a tile has two words of Block::localKeys");
};

// Offset in a tile of a row's 16-byte chunk. Chunks are permuted within a row, so that ldmatrix, which reads one chunk of
// eight rows, has no bank conflicts.
template <int kD>
LFX_HOST_DEVICE int32_t swizzled(int32_t row, int32_t chunk)
{
    int32_t const permutation = kD >= 64 ? row & 7 : (row >> 1) & 3;
    return row * kD + ((chunk ^ permutation) << 3);
}

// swizzled() of the chunk that is `chunks` further to the right, if no carry occurs: the chunk has zeros where `chunks` has
// ones.
LFX_HOST_DEVICE int32_t movedRight(int32_t offset, int32_t chunks)
{
    return offset ^ chunks << 3;
}

// The part of each tile that a thread copies: the same 16-byte chunk of every kROWS-th row.
template <int kD>
struct ThreadCopy
{
    static constexpr int kCHUNK = 8;                              // elements
    static constexpr int kCHUNKS = kD / kCHUNK;                   // of a row
    static constexpr int kROWS = BlockTraits::kTHREADS / kCHUNKS; // that the block copies in a step
    static_assert(kROWS % 8 == 0, "the chunks of all rows of a thread are permuted alike");
    static_assert(kWORD_BITS % kROWS == 0, "the rows of a step are in one word of Block::localKeys");

    __device__ __forceinline__ explicit ThreadCopy(BandedParams const& p)
        : ThreadCopy(p, threadIndexAgain())
    {
    }

    __device__ __forceinline__ ThreadCopy(BandedParams const& p, int32_t thread)
        : row(thread / kCHUNKS)
        , column(thread % kCHUNKS * kCHUNK)
        , rowBit(column < p.headSize ? 1U << row : 0U)
        , target(swizzled<kD>(row, column / kCHUNK))
    {
    }

    // Distance between the thread's rows in a tensor with this stride.
    __device__ __forceinline__ static int32_t step(BandedParams const& p, int64_t stride)
    {
        return kROWS * p.dilation * static_cast<int32_t>(stride);
    }

    int32_t row; // the first one
    int32_t column;
    uint32_t rowBit; // of the first row in a word; 0 if the column is past the end of the head
    int32_t target;  // offset of the first row's chunk in a tile
};

// The chunk at `column` of a token's key and value.
template <typename T>
struct KeyValueSource
{
    template <int kQUERIES>
    __device__ __forceinline__ KeyValueSource(Block<kQUERIES> const& block, int32_t position, int32_t column)
        : key(static_cast<T const*>(block.params.key) + block.offset(position, block.params.keyStride) + column)
        , value(static_cast<T const*>(block.params.value) + block.offset(position, block.params.valueStride) + column)
    {
    }

    T const* key;
    T const* value;
};

// Each of these starts the copies of a tile. Masked rows are zero-filled; their addresses are never dereferenced.
template <typename T, int kD, int kQUERIES>
__device__ __forceinline__ void copyQueries(Block<kQUERIES> const& block, ThreadCopy<kD> const& copy, T* tile)
{
    int32_t const query = block.firstQuery + copy.row;
    T const* const source = static_cast<T const*>(block.params.query)
        + block.offset(block.position(query), block.params.queryStride) + copy.column;
    int32_t const sourceStep = copy.step(block.params, block.params.queryStride);
#pragma unroll
    for (int step = 0; step < kQUERIES / ThreadCopy<kD>::kROWS; ++step)
    {
        int const row = step * ThreadCopy<kD>::kROWS;
        bool const valid = copy.rowBit != 0 && query + row < block.length;
        copyAsync(tile + copy.target + row * kD, source + step * sourceStep, valid);
    }
}

template <typename T, int kD, int kQUERIES>
__device__ __forceinline__ void copyBand(
    Block<kQUERIES> const& block, ThreadCopy<kD> const& copy, T* keys, T* values, int32_t firstKey)
{
    KeyValueSource<T> source(block, block.position(firstKey + copy.row), copy.column);
    uint32_t const* const localKeys = block.localKeys + (firstKey - block.band.begin) / kWORD_BITS;
    uint32_t const words[2] = {localKeys[0], localKeys[1]};
    int32_t const keyStep = copy.step(block.params, block.params.keyStride);
    int32_t const valueStep = copy.step(block.params, block.params.valueStride);
#pragma unroll
    for (int step = 0; step < kMAX_TILE_KEYS / ThreadCopy<kD>::kROWS; ++step)
    {
        int const row = step * ThreadCopy<kD>::kROWS;
        bool const valid = (words[row / kWORD_BITS] & copy.rowBit << row % kWORD_BITS) != 0;
        copyAsync(keys + copy.target + row * kD, source.key, valid);
        copyAsync(values + copy.target + row * kD, source.value, valid);
        source.key += keyStep;
        source.value += valueStep;
    }
}

// Groups of 32 slots from `slots` on are not copied; no query sees them.
template <typename T, int kD, int kQUERIES>
__device__ __forceinline__ void copyGlobalTokens(
    Block<kQUERIES> const& block, ThreadCopy<kD> const& copy, T* keys, T* values, int32_t firstSlot, int32_t slots)
{
#pragma unroll
    for (int step = 0; step < kMAX_TILE_KEYS / ThreadCopy<kD>::kROWS; ++step)
    {
        int const row = step * ThreadCopy<kD>::kROWS;
        if (row / kWORD_BITS * kWORD_BITS >= slots)
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
