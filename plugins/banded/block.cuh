// Shared by the kernels of BandedAttention: the block's part of the problem, its tables, and the tiles that it visits.
#pragma once

#include "attention.h"
#include "band.h"
#include "device.cuh"
#include "softmax.cuh"

namespace lfx::banded
{

struct BlockTraits
{
    static constexpr int kTHREADS = 128;
    static constexpr int kWARPS = kTHREADS / kWARP_SIZE;
};

constexpr int kMAX_TILE_KEYS = 64;
constexpr int kWORD_BITS = 32; // of Block::localKeys
static_assert(kWORD_BITS == kWARP_SIZE, "a ballot of a warp makes one word");

// Content of a row of the context: zeros, the result of attention, or slot g of global_context, as kGLOBAL_ROW + g.
constexpr int32_t kNO_ROW = -2;   // past the end
constexpr int32_t kZERO_ROW = -1; // padding
constexpr int32_t kLOCAL_ROW = 0;
constexpr int32_t kGLOBAL_ROW = 1;

// A block of threads computes kQUERIES queries of one head of one subsequence.
template <int kQUERIES>
struct Block
{
    static_assert(kQUERIES <= BlockTraits::kTHREADS, "a thread fills at most one entry of rowContent");

    __device__ __forceinline__ Block(BandedParams const& p, void* tables)
        : params(p)
        , head(p.dilation == 1 ? blockIdx.y : blockIdx.y / p.dilation) // a division takes some 30 instructions
        , subsequence(blockIdx.y - head * p.dilation)
        , batch(blockIdx.z)
        , length(p.dilation == 1 ? p.seqlen : subsequenceLength(p.seqlen, p.dilation, subsequence))
        , firstQuery(blockIdx.x * kQUERIES)
        , band(keysOfTile(firstQuery, kQUERIES, window(), isCausal(), length))
        , rowContent(static_cast<int32_t*>(tables))
        , numSlots(rowContent + kQUERIES)
        , localKeys(reinterpret_cast<uint32_t*>(numSlots + 1))
    {
    }

    // Shared memory for the tables of the block with the most keys.
    LFX_HOST_DEVICE static size_t tableBytes(BandedParams const& p)
    {
        int32_t const window = min(p.window, p.seqlen);
        int32_t const maxKeys = min(kQUERIES + 2 * window, ceilDiv(p.seqlen, p.dilation));
        int32_t const words = ceilDiv(maxKeys, kMAX_TILE_KEYS) * (kMAX_TILE_KEYS / kWORD_BITS);
        return sizeof(int32_t) * (kQUERIES + 1 + static_cast<size_t>(words));
    }

    // Fills the tables and returns whether any row of the block is local. All threads call it.
    __device__ __forceinline__ bool fillTables() const
    {
        int32_t const token = tokenOf(threadIdx.x); // while the mask is read
        markPadding();
        __syncthreads();
        markGlobalTokens(token);
        __syncthreads();
        return __syncthreads_or(threadIdx.x < kQUERIES && rowContent[threadIdx.x] == kLOCAL_ROW) != 0;
    }

    // Computed where they are used, which takes no registers between.
    __device__ __forceinline__ int32_t window() const
    {
        return min(params.window, params.seqlen);
    }

    __device__ __forceinline__ bool isCausal() const
    {
        return params.causal != 0;
    }

    // Position of a query or key of the subsequence.
    __device__ __forceinline__ int32_t position(int32_t index) const
    {
        return positionOf(index, params.dilation, subsequence);
    }

    // Position of a key of the band, or -1 if it is padding, global or past the end.
    __device__ __forceinline__ int32_t keyPosition(int32_t key) const
    {
        return isLocal(key) ? position(key) : -1;
    }

    // Position of the global token in a slot, or -1 if the slot is unused.
    __device__ __forceinline__ int32_t slotPosition(int32_t slot) const
    {
        int32_t const token = tokenOf(slot);
        return isUsedSlot(token, params.seqlen) ? token : -1;
    }

    // Whether a key of the band is neither padding, nor global, nor past the end.
    __device__ __forceinline__ bool isLocal(int32_t key) const
    {
        int32_t const bit = key - band.begin;
        return (localKeys[bit / kWORD_BITS] >> (bit % kWORD_BITS) & 1U) != 0;
    }

    // Offset in a tensor of this head of the token at a position. `stride` is the tensor's, and fits in 32 bits. The type
    // of the head's column changes nothing but the number of registers that nvcc takes.
    template <typename Column = size_t>
    __device__ __forceinline__ size_t offset(int32_t position, int64_t stride) const
    {
        size_t const row = static_cast<size_t>(batch) * params.seqlen + position;
        return row * static_cast<uint32_t>(stride) + static_cast<Column>(head) * params.headSize;
    }

    // Writes the log-sum-exp of a row of the block, if it is one of the sequence.
    __device__ __forceinline__ void writeLogSumExp(int32_t row, float logSumExp) const
    {
        int32_t const content = rowContent[row];
        if (content != kNO_ROW)
        {
            size_t const batchHead = static_cast<size_t>(batch) * params.numHeads + head;
            params.logSumExp[batchHead * params.seqlen + position(firstQuery + row)]
                = content == kLOCAL_ROW ? logSumExp : kNEG_INF;
        }
    }

    // Returns 16 bytes of a context row that is not local, from global_context or zeros.
    template <typename T>
    __device__ __forceinline__ uint4 givenChunk(int32_t content, int32_t chunk) const
    {
        if (content == kZERO_ROW)
        {
            return make_uint4(0, 0, 0, 0);
        }
        size_t const row = static_cast<size_t>(batch) * params.slots + (content - kGLOBAL_ROW);
        T const* const source = static_cast<T const*>(params.globalContext)
            + (row * params.numHeads + head) * params.headSize + chunk * (16 / static_cast<int>(sizeof(T)));
        return *reinterpret_cast<uint4 const*>(source);
    }

    BandedParams const& params;
    int32_t head;
    int32_t subsequence;
    int32_t batch;
    int32_t length; // tokens of the subsequence
    int32_t firstQuery;
    Range band; // keys in the band of the block's queries

    // Tables in shared memory.
    int32_t* rowContent; // (kQUERIES) kNO_ROW, kZERO_ROW, kLOCAL_ROW or kGLOBAL_ROW + slot
    int32_t* numSlots;   // (1) number of slots up to the last used one
    uint32_t* localKeys; // one bit for each key of the band, and zeros up to the end of the last tile; see isLocal()

private:
    // The entry of global_index for a slot, or -1 past the last one.
    __device__ __forceinline__ int32_t tokenOf(int32_t slot) const
    {
        return slot < params.slots ? params.globalIndex[static_cast<size_t>(batch) * params.slots + slot] : -1;
    }

    // Marks the rows and keys that the key mask masks as padding, and all others as local.
    __device__ __forceinline__ void markPadding() const
    {
        int32_t const* const mask = params.keyMask + static_cast<size_t>(batch) * params.seqlen;
        if (threadIdx.x < kQUERIES)
        {
            int32_t const query = firstQuery + threadIdx.x;
            rowContent[threadIdx.x] = query >= length ? kNO_ROW : mask[position(query)] != 0 ? kLOCAL_ROW : kZERO_ROW;
        }
        if (threadIdx.x == 0)
        {
            *numSlots = 0;
        }
        int32_t const words = ceilDiv(band.end - band.begin, kMAX_TILE_KEYS) * (kMAX_TILE_KEYS / kWORD_BITS);
        constexpr int kLOADS = 5; // that a thread starts before it needs the first
        for (int32_t word = threadIdx.x / kWARP_SIZE; word < words; word += kLOADS * BlockTraits::kWARPS)
        {
            bool isReal[kLOADS];
#pragma unroll
            for (int i = 0; i < kLOADS; ++i)
            {
                int32_t const key
                    = band.begin + (word + i * BlockTraits::kWARPS) * kWORD_BITS + threadIdx.x % kWARP_SIZE;
                isReal[i] = key < band.end && mask[position(key)] != 0;
            }
#pragma unroll
            for (int i = 0; i < kLOADS; ++i)
            {
                uint32_t const bits = __ballot_sync(kFULL_WARP, isReal[i]);
                if (threadIdx.x % kWARP_SIZE == 0 && word + i * BlockTraits::kWARPS < words)
                {
                    localKeys[word + i * BlockTraits::kWARPS] = bits;
                }
            }
        }
    }

    // Marks the rows of global tokens as global, and removes their keys from the local keys of the band. `token` is that of
    // slot threadIdx.x.
    __device__ __forceinline__ void markGlobalTokens(int32_t token) const
    {
        for (int32_t slot = threadIdx.x; slot < params.slots; slot += BlockTraits::kTHREADS, token = tokenOf(slot))
        {
            if (!isUsedSlot(token, params.seqlen))
            {
                continue;
            }
            atomicMax(numSlots, slot + 1);
            int32_t const i = params.dilation == 1 ? token : token / params.dilation;
            if (position(i) != token)
            {
                continue; // of another subsequence
            }
            if (i >= firstQuery && i < firstQuery + kQUERIES)
            {
                rowContent[i - firstQuery] = kGLOBAL_ROW + slot;
            }
            if (i >= band.begin && i < band.end)
            {
                int32_t const bit = i - band.begin;
                atomicAnd(&localKeys[bit / kWORD_BITS], ~(1U << (bit % kWORD_BITS)));
            }
        }
    }
};

// The tiles that a block visits: the gathered global tokens first, then the band.
template <int kKEYS>
struct TileSequence
{
    // Without a local row there is nothing to compute, so no tile.
    template <int kQUERIES>
    __device__ __forceinline__ TileSequence(Block<kQUERIES> const& block, bool hasLocalRow)
        : numSlots(*block.numSlots)
        , firstBandKey(block.band.begin)
        , numGlobal(ceilDiv(numSlots, kKEYS))
        , count(hasLocalRow ? numGlobal + ceilDiv(block.band.end - block.band.begin, kKEYS) : 0)
    {
    }

    __device__ __forceinline__ bool isGlobal(int32_t tile) const
    {
        return tile < numGlobal;
    }

    __device__ __forceinline__ int32_t firstSlot(int32_t tile) const
    {
        return tile * kKEYS;
    }

    // Number of slots from the first one of a global tile to the last used one.
    __device__ __forceinline__ int32_t slotsFrom(int32_t tile) const
    {
        return numSlots - firstSlot(tile);
    }

    __device__ __forceinline__ int32_t firstKey(int32_t tile) const
    {
        return firstBandKey + (tile - numGlobal) * kKEYS;
    }

    int32_t numSlots;
    int32_t firstBandKey;
    int32_t numGlobal; // tiles of global tokens
    int32_t count;     // tiles
};

} // namespace lfx::banded
