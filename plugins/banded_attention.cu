// BandedAttention: every query over its window and the global tokens of its row, one online softmax over the union.
//
// A block of threads takes 64 queries of one head of one subsequence. It visits the key tiles that meet the band of its
// queries, after the gathered columns of the global tokens, FlashAttention's way: scores never leave the registers.
// Rows of global tokens are copied from global_context, rows of padding are zero.
//
// Source: Beltagy et al. 2020, arXiv:2004.05150, section 3; Dao 2023, arXiv:2307.08691, section 3.
#include "attention.h"
#include "band.h"
#include "device.cuh"

namespace lfx
{
namespace
{

constexpr int kQUERIES = 64;      // a block
constexpr int kTHREADS = 128;
constexpr int kWORD = 32;
constexpr float kLOG2E = 1.4426950408889634F;
constexpr float kNEVER = -INFINITY;

// The block's part of the problem, and the tables that it keeps in shared memory.
struct Block
{
    int32_t lane;       // of the dilation
    int32_t head;
    int32_t batch;
    int32_t length;     // tokens of the subsequence
    int32_t firstQuery;
    Range keys;         // that the band of the queries meets
    int32_t window;
    bool causal;
    int32_t* slots;     // [kQUERIES] -1 padding or behind the end, 0 local, g + 1 global
    int32_t* usedSlots; // [1] slots up to the last one in use
    uint32_t* local;    // one bit a key of `keys`: real and not global
    size_t row;         // of the batch row's first token in (B, S)
};

// The tables of the block with the most keys; `Block::local` has bits for keys in 64s.
LFX_HOST_DEVICE size_t tableBytes(BandedParams const& p)
{
    int32_t const window = smaller(p.window, p.seqlen);
    int32_t const widest = smaller(kQUERIES + 2 * window, ceilDiv(p.seqlen, p.dilation));
    return sizeof(int32_t) * (kQUERIES + 1 + 2 * static_cast<size_t>(ceilDiv(widest, 64)));
}

__device__ __forceinline__ Block findBlock(BandedParams const& p, void* tables)
{
    Block block;
    block.lane = blockIdx.y % p.dilation;
    block.head = blockIdx.y / p.dilation;
    block.batch = blockIdx.z;
    block.length = laneLength(p.seqlen, p.dilation, block.lane);
    block.firstQuery = blockIdx.x * kQUERIES;
    block.window = smaller(p.window, p.seqlen);
    block.causal = p.causal != 0;
    block.keys = keysOfTile(block.firstQuery, kQUERIES, block.window, block.causal, block.length);
    block.slots = static_cast<int32_t*>(tables);
    block.usedSlots = block.slots + kQUERIES;
    block.local = reinterpret_cast<uint32_t*>(block.usedSlots + 1);
    block.row = static_cast<size_t>(block.batch) * p.seqlen;
    return block;
}

// Fills the tables; returns whether any query of the block is local. All threads call it.
__device__ __forceinline__ bool fillTables(BandedParams const& p, Block const& block)
{
    int32_t const* const mask = p.keyMask + block.row;
    if (threadIdx.x < kQUERIES)
    {
        int32_t const query = block.firstQuery + threadIdx.x;
        bool const real = query < block.length && mask[positionOf(query, p.dilation, block.lane)] != 0;
        block.slots[threadIdx.x] = real ? 0 : -1;
    }
    if (threadIdx.x == 0)
    {
        *block.usedSlots = 0;
    }
    int32_t const words = 2 * ceilDiv(block.keys.end - block.keys.begin, 64);
    for (int32_t word = threadIdx.x / kWORD; word < words; word += kTHREADS / kWORD)
    {
        int32_t const key = block.keys.begin + word * kWORD + threadIdx.x % kWORD;
        bool const real = key < block.keys.end && mask[positionOf(key, p.dilation, block.lane)] != 0;
        uint32_t const bits = __ballot_sync(0xffffffffU, real);
        if (threadIdx.x % kWORD == 0)
        {
            block.local[word] = bits;
        }
    }
    __syncthreads();
    int32_t const* const index = p.globalIndex + static_cast<size_t>(block.batch) * p.slots;
    for (int32_t g = threadIdx.x; g < p.slots; g += kTHREADS)
    {
        int32_t const at = index[g];
        if (!isUsed(at, p.seqlen))
        {
            continue;
        }
        atomicMax(block.usedSlots, g + 1);
        if (at % p.dilation == block.lane)
        {
            int32_t const i = at / p.dilation;
            if (i >= block.firstQuery && i < block.firstQuery + kQUERIES)
            {
                block.slots[i - block.firstQuery] = g + 1;
            }
            if (i >= block.keys.begin && i < block.keys.end)
            {
                int32_t const bit = i - block.keys.begin;
                atomicAnd(&block.local[bit / kWORD], ~(1U << (bit % kWORD)));
            }
        }
    }
    __syncthreads();
    return __syncthreads_or(threadIdx.x < kQUERIES && block.slots[threadIdx.x] == 0) != 0;
}

__device__ __forceinline__ bool isLocal(Block const& block, int32_t key)
{
    int32_t const bit = key - block.keys.begin;
    return (block.local[bit / kWORD] >> (bit % kWORD) & 1U) != 0; // none behind keys.end
}

// The position of key `column` of a tile, or -1 where there is none to read.
__device__ __forceinline__ int32_t keyPosition(BandedParams const& p, Block const& block, int32_t key)
{
    return isLocal(block, key) ? positionOf(key, p.dilation, block.lane) : -1;
}

__device__ __forceinline__ int32_t slotPosition(BandedParams const& p, Block const& block, int32_t slot)
{
    if (slot >= p.slots)
    {
        return -1;
    }
    int32_t const at = p.globalIndex[static_cast<size_t>(block.batch) * p.slots + slot];
    return isUsed(at, p.seqlen) ? at : -1;
}

// Offset in (B, S, H·D) of the block's head of a token.
__device__ __forceinline__ size_t offsetOf(BandedParams const& p, Block const& block, int32_t position)
{
    return ((block.row + position) * p.numHeads + block.head) * p.headSize;
}

// Copies to the context what is no result of attention: rows of global tokens, and zeros. `chunk` counts 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 fixedRow(BandedParams const& p, Block const& block, int32_t slot, int32_t chunk)
{
    if (slot < 0)
    {
        return make_uint4(0, 0, 0, 0);
    }
    size_t const row = static_cast<size_t>(block.batch) * p.slots + (slot - 1);
    T const* const source = static_cast<T const*>(p.globalContext)
        + (row * p.numHeads + block.head) * p.headSize + chunk * (16 / static_cast<int>(sizeof(T)));
    return *reinterpret_cast<uint4 const*>(source);
}

// ---- float16 and bfloat16: tensor cores -----------------------------------------------------------------------------

constexpr int kKEYS = 64; // a tile
constexpr int kWARP_QUERIES = 16;

// Offset of the 16-byte chunk of a row in a tile of kD columns, turned so that eight rows of a chunk lie in eight banks.
template <int kD>
LFX_HOST_DEVICE int32_t swizzled(int32_t row, int32_t chunk)
{
    int32_t const turn = kD >= 64 ? row & 7 : (row >> 1) & 3;
    return row * kD + ((chunk ^ turn) << 3);
}

// What a thread copies of a tile of 64 rows: one chunk of 16 bytes of every kROWS-th row.
template <int kD>
struct Chunk
{
    static constexpr int kCHUNKS = kD / 8; // of a row
    static constexpr int kROWS = kTHREADS / kCHUNKS;
    static constexpr int kSTEPS = kKEYS / kROWS;
    static_assert(kROWS % 8 == 0 && kWORD % kROWS == 0, "all its rows are turned alike, and words end with a step");

    __device__ __forceinline__ explicit Chunk(BandedParams const& p)
        : row(threadIdx.x / kCHUNKS)
        , column(threadIdx.x % kCHUNKS * 8)
        , bit(column < p.headSize ? 1U << row : 0U)
        , stride(kROWS * p.dilation * p.numHeads * p.headSize)
        , place(swizzled<kD>(row, column / 8))
    {
    }

    int32_t row;
    int32_t column;
    uint32_t bit;   // of the row in a word; none where the column is behind the head
    int32_t stride; // from a row to the next in a tensor; below 2^26, as kROWS · D and dilation · H are limited
    int32_t place;  // of the first row's chunk in a tile
};

// A row of keys and the same of values, where a thread's chunk begins.
template <typename T>
struct Source
{
    __device__ __forceinline__ Source(BandedParams const& p, Block const& block, int32_t position, int32_t column)
        : key(static_cast<T const*>(p.key) + offsetOf(p, block, position) + column)
        , value(static_cast<T const*>(p.value) + offsetOf(p, block, position) + column)
    {
    }

    T const* key;
    T const* value;
};

// Each starts the copies of a tile, where rows that nobody may read become zeros: their addresses may be anywhere.
template <typename T, int kD>
__device__ __forceinline__ void copyQueries(BandedParams const& p, Block const& block, Chunk<kD> const& mine, T* tile)
{
    int32_t const query = block.firstQuery + mine.row;
    T const* const from = static_cast<T const*>(p.query)
        + offsetOf(p, block, positionOf(query, p.dilation, block.lane)) + mine.column;
#pragma unroll
    for (int step = 0; step < Chunk<kD>::kSTEPS; ++step)
    {
        int const row = step * Chunk<kD>::kROWS;
        copyAsync(tile + mine.place + row * kD, from + step * mine.stride, mine.bit != 0 && query + row < block.length);
    }
}

// Of the band.
template <typename T, int kD>
__device__ __forceinline__ void copyKeys(
    BandedParams const& p, Block const& block, Chunk<kD> const& mine, T* keys, T* values, int32_t firstKey)
{
    Source<T> from(p, block, positionOf(firstKey + mine.row, p.dilation, block.lane), mine.column);
    uint32_t const* const local = block.local + (firstKey - block.keys.begin) / kWORD;
    uint32_t const words[2] = {local[0], local[1]};
#pragma unroll
    for (int step = 0; step < Chunk<kD>::kSTEPS; ++step)
    {
        int const row = step * Chunk<kD>::kROWS;
        bool const valid = (words[row / kWORD] & mine.bit << row % kWORD) != 0;
        copyAsync(keys + mine.place + row * kD, from.key, valid);
        copyAsync(values + mine.place + row * kD, from.value, valid);
        from.key += mine.stride;
        from.value += mine.stride;
    }
}

// Of the global tokens; groups of 16 slots behind the last one in use are left as they are.
template <typename T, int kD>
__device__ __forceinline__ void copyGlobals(BandedParams const& p, Block const& block, Chunk<kD> const& mine, T* keys,
    T* values, int32_t firstSlot, int32_t groups)
{
#pragma unroll
    for (int step = 0; step < Chunk<kD>::kSTEPS; ++step)
    {
        int const row = step * Chunk<kD>::kROWS;
        if (row >= groups * 16)
        {
            break;
        }
        int32_t const position = slotPosition(p, block, firstSlot + row + mine.row);
        bool const valid = mine.bit != 0 && position >= 0;
        Source<T> const from(p, block, position, mine.column);
        copyAsync(keys + mine.place + row * kD, from.key, valid);
        copyAsync(values + mine.place + row * kD, from.value, valid);
    }
}

// What a warp knows of its 16 queries: a lane has rows lane / 4 and lane / 4 + 8.
template <typename T, int kD>
struct WarpState
{
    // Fragments of the queries stay in registers where there is room for them, and are loaded for each tile otherwise.
    static constexpr bool kKEEPS_QUERIES = kD <= 64;

    __device__ __forceinline__ void loadQuery(uint32_t (&fragment)[4], int step) const
    {
        int32_t const lane = threadIdx.x % kWORD;
        int32_t const row = threadIdx.x / kWORD * kWARP_QUERIES + lane % 16;
        loadMatrices(fragment, queries + swizzled<kD>(row, step * 2 + lane / 16));
    }

    T const* queries;
    uint32_t kept[kKEEPS_QUERIES ? kD / 16 : 1][4];
    float sum[kD / 8][4];
    float peak[2];  // of the scores so far, times scale · log2(e)
    float total[2]; // of this lane's weights
};

// What the queries of a warp see of 64 keys.
struct Visible
{
    uint64_t keys;    // one bit each: real and not global
    Range groups;     // of 16 keys: the others are outside the band of every query
    int32_t distance; // from where the first query's band begins to the first key
    uint32_t last;    // key of a query's band, counted from 0
    bool whole;       // all see all

    // The same from a group on.
    __device__ __forceinline__ Visible from(int32_t group) const
    {
        return {keys >> group * 16, groups, distance + group * 16, last, whole};
    }
};

__device__ __forceinline__ Visible visibleGlobals(
    BandedParams const& p, Block const& block, int32_t firstSlot, int32_t groups)
{
    uint32_t used[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        int32_t const slot = firstSlot + i * kWORD + threadIdx.x % kWORD;
        used[i] = __ballot_sync(0xffffffffU, slotPosition(p, block, slot) >= 0);
    }
    uint64_t const keys = used[0] | static_cast<uint64_t>(used[1]) << kWORD;
    return {keys, {0, groups}, 0, UINT32_MAX, false};
}

__device__ __forceinline__ Visible visibleKeys(Block const& block, int32_t firstKey)
{
    int32_t const firstQuery = block.firstQuery + threadIdx.x / kWORD * kWARP_QUERIES;
    uint32_t const* const local = block.local + (firstKey - block.keys.begin) / kWORD;
    uint64_t const keys = local[0] | static_cast<uint64_t>(local[1]) << kWORD;
    int32_t const last = block.window + (block.causal ? 0 : block.window);
    int32_t const distance = firstKey - (firstQuery - block.window);
    int32_t const firstGroup = larger(-distance, 0) / 16;
    int32_t const lastGroup = smaller(ceilDiv(larger(last + kWARP_QUERIES - distance, 0), 16), kKEYS / 16);
    bool const whole = keys == UINT64_MAX && distance >= kWARP_QUERIES - 1 && distance + kKEYS - 1 <= last;
    return {keys, {firstGroup, lastGroup}, distance, static_cast<uint32_t>(last), whole};
}

// kGROUPS times 16 keys for one warp; `visible` is of them, and is asked only if kMASKED.
template <int kGROUPS, bool kMASKED, typename T, int kD>
__device__ __forceinline__ void visitGroups(
    WarpState<T, kD>& state, T const* keys, T const* values, float scaleLog2, Visible const& visible)
{
    int32_t const lane = threadIdx.x % kWORD;
    float score[2 * kGROUPS][4];
#pragma unroll
    for (int i = 0; i < 8 * kGROUPS; ++i)
    {
        score[i / 4][i % 4] = 0.0F;
    }
#pragma unroll
    for (int step = 0; step < kD / 16; ++step)
    {
        uint32_t loaded[4];
        constexpr bool kKEPT = WarpState<T, kD>::kKEEPS_QUERIES;
        if (!kKEPT)
        {
            state.loadQuery(loaded, step);
        }
        uint32_t const(&query)[4] = kKEPT ? state.kept[kKEPT ? step : 0] : loaded;
#pragma unroll
        for (int group = 0; group < kGROUPS; ++group)
        {
            uint32_t b[4];
            loadMatrices(b,
                keys + swizzled<kD>(group * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
            multiplyAdd<T>(score[2 * group], query, b[0], b[1]);
            multiplyAdd<T>(score[2 * group + 1], query, b[2], b[3]);
        }
    }
    uint32_t const mine = static_cast<uint32_t>(visible.keys) >> lane % 4 * 2;
    int32_t const distance = visible.distance + lane % 4 * 2 - lane / 4;
    float highest[2] = {kNEVER, kNEVER};
#pragma unroll
    for (int n = 0; n < 2 * kGROUPS; ++n)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            int const column = n * 8 + i % 2;
            bool const seen = !kMASKED
                || ((mine >> column & 1U) != 0
                    && static_cast<uint32_t>(distance + column - i / 2 * 8) <= visible.last);
            score[n][i] = seen ? score[n][i] : kNEVER;
            highest[i / 2] = fmaxf(highest[i / 2], score[n][i]);
        }
    }
    float keep[2];
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffffU, highest[i], 1));
        highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffffU, highest[i], 2));
        float const peak = fmaxf(state.peak[i], highest[i] * scaleLog2);
        base[i] = peak == kNEVER ? 0.0F : peak; // -inf less -inf would be no number
        keep[i] = exp2Flushed(state.peak[i] - base[i]);
        state.peak[i] = peak;
        state.total[i] *= keep[i];
    }
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            state.sum[n][i] *= keep[i / 2];
        }
    }
#pragma unroll
    for (int group = 0; group < kGROUPS; ++group)
    {
        uint32_t weights[4];
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            float w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                w[i] = exp2Flushed(fmaf(score[2 * group + half][i], scaleLog2, -base[i / 2]));
                state.total[i / 2] += w[i];
            }
            weights[2 * half] = pack<T>(w[0], w[1]);
            weights[2 * half + 1] = pack<T>(w[2], w[3]);
        }
#pragma unroll
        for (int n = 0; n < kD / 16; ++n)
        {
            uint32_t b[4];
            loadMatricesTransposed(
                b, values + swizzled<kD>(group * 16 + lane % 8 + lane / 8 % 2 * 8, n * 2 + lane / 16));
            multiplyAdd<T>(state.sum[2 * n], weights, b[0], b[1]);
            multiplyAdd<T>(state.sum[2 * n + 1], weights, b[2], b[3]);
        }
    }
}

// A tile that is wholly seen goes at once, others by the groups of 16 keys of which something is seen.
template <typename T, int kD>
__device__ __forceinline__ void visitTile(
    WarpState<T, kD>& state, T const* keys, T const* values, float scaleLog2, Visible const& visible)
{
    if (visible.whole)
    {
        visitGroups<kKEYS / 16, false>(state, keys, values, scaleLog2, visible);
        return;
    }
#pragma unroll 1
    for (int32_t group = visible.groups.begin; group < visible.groups.end; ++group)
    {
        Visible const rest = visible.from(group);
        if ((rest.keys & 0xffffU) != 0)
        {
            visitGroups<1, true>(state, keys + group * 16 * kD, values + group * 16 * kD, scaleLog2, rest);
        }
    }
}

// Sums to the context: through the warp's own 16 rows of the query tile, so that whole 16-byte chunks are written.
template <typename T, int kD>
__device__ __forceinline__ void writeContext(
    BandedParams const& p, Block const& block, WarpState<T, kD>& state, T* tile)
{
    constexpr int kCHUNKS = kD / 8;
    int32_t const lane = threadIdx.x % kWORD;
    int32_t const firstRow = threadIdx.x / kWORD * kWARP_QUERIES;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        float total = state.total[i];
        total += __shfl_xor_sync(0xffffffffU, total, 1);
        total += __shfl_xor_sync(0xffffffffU, total, 2);
        inverse[i] = total > 0.0F ? 1.0F / total : 0.0F;
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kCHUNKS; ++n)
    {
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            T* const chunk = tile + swizzled<kD>(firstRow + lane / 4 + i * 8, n);
            reinterpret_cast<uint32_t*>(chunk)[lane % 4]
                = pack<T>(state.sum[n][2 * i] * inverse[i], state.sum[n][2 * i + 1] * inverse[i]);
        }
    }
    __syncwarp();
    for (int32_t i = lane; i < kWARP_QUERIES * kCHUNKS; i += kWORD)
    {
        int32_t const row = firstRow + i / kCHUNKS;
        int32_t const chunk = i % kCHUNKS;
        int32_t const query = block.firstQuery + row;
        if (query < block.length && chunk * 8 < p.headSize)
        {
            int32_t const slot = block.slots[row];
            uint4 const found = slot == 0 ? *reinterpret_cast<uint4 const*>(tile + swizzled<kD>(row, chunk))
                                          : fixedRow<T>(p, block, slot, chunk);
            int32_t const position = positionOf(query, p.dilation, block.lane);
            T* const to = static_cast<T*>(p.context) + offsetOf(p, block, position) + chunk * 8;
            *reinterpret_cast<uint4*>(to) = found;
        }
    }
}

// Blocks of head size 64 that a multiprocessor is to hold. For 4 the compiler spills on sm_80, sm_100 and sm_120; on
// compute capability 8 and 12 there is no shared memory for a fourth.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBLOCKS = 4;
#else
constexpr int kBLOCKS = 3;
#endif

template <typename T, int kD>
__global__ void __launch_bounds__(kTHREADS, kD <= 32 ? 4 : kD <= 64 ? kBLOCKS : 1)
    bandedAttentionTensorCores(BandedParams p)
{
    constexpr int kTILE = kKEYS * kD;
    T* const queries = static_cast<T*>(sharedMemory());
    T* const keys = queries + kTILE;     // two tiles, one in use and one on its way
    T* const values = keys + 2 * kTILE;
    Block const block = findBlock(p, values + 2 * kTILE);
    if (block.firstQuery >= block.length)
    {
        return;
    }
    bool const anyLocal = fillTables(p, block);
    int32_t const usedSlots = *block.usedSlots;
    int32_t const globalTiles = ceilDiv(usedSlots, kKEYS);
    int32_t const tiles
        = anyLocal ? globalTiles + ceilDiv(block.keys.end - block.keys.begin, kKEYS) : 0;
    auto const firstKey = [&](int32_t tile) { return block.keys.begin + (tile - globalTiles) * kKEYS; };
    auto const globalGroups
        = [&](int32_t tile) { return smaller(ceilDiv(usedSlots - tile * kKEYS, 16), kKEYS / 16); };
    Chunk<kD> const mine(p);
    auto const copyKeysAndValues = [&](int32_t tile) {
        T* const k = keys + tile % 2 * kTILE;
        T* const v = values + tile % 2 * kTILE;
        if (tile < globalTiles)
        {
            copyGlobals<T, kD>(p, block, mine, k, v, tile * kKEYS, globalGroups(tile));
        }
        else
        {
            copyKeys<T, kD>(p, block, mine, k, v, firstKey(tile));
        }
        endCopies();
    };
    WarpState<T, kD> state;
    state.queries = queries;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            state.sum[n][i] = 0.0F;
        }
    }
    state.peak[0] = state.peak[1] = kNEVER;
    state.total[0] = state.total[1] = 0.0F;
    float const scaleLog2 = p.scale * kLOG2E;
    if (tiles > 0)
    {
        copyQueries<T, kD>(p, block, mine, queries);
        copyKeysAndValues(0); // one group with the queries
    }
    for (int32_t tile = 0; tile < tiles; ++tile)
    {
        waitForCopies<0>();
        __syncthreads(); // the tile is there, and nobody reads the one before it any more
        if (tile + 1 < tiles)
        {
            copyKeysAndValues(tile + 1);
        }
        if (tile == 0 && WarpState<T, kD>::kKEEPS_QUERIES)
        {
#pragma unroll
            for (int step = 0; step < kD / 16; ++step)
            {
                state.loadQuery(state.kept[WarpState<T, kD>::kKEEPS_QUERIES ? step : 0], step);
            }
        }
        Visible const visible = tile < globalTiles
            ? visibleGlobals(p, block, tile * kKEYS, globalGroups(tile))
            : visibleKeys(block, firstKey(tile));
        visitTile<T, kD>(state, keys + tile % 2 * kTILE, values + tile % 2 * kTILE, scaleLog2, visible);
    }
    writeContext<T, kD>(p, block, state, queries);
}

// ---- float32: the ordinary units --------------------------------------------------------------------------------------

constexpr int kFLOAT_KEYS = 32; // a tile
constexpr int kPAD = 4;         // floats behind each row, so that eight rows lie in eight different banks

template <int kD>
LFX_HOST_DEVICE constexpr int32_t floatTileBytes()
{
    return 4 * ((kQUERIES + 2 * kFLOAT_KEYS) * (kD + kPAD) + kQUERIES * (kFLOAT_KEYS + kPAD));
}

template <int kD, int kROWS, typename Position>
__device__ __forceinline__ void copyFloatTile(
    BandedParams const& p, Block const& block, float* tile, void const* tensor, Position positionOfRow)
{
    constexpr int kCHUNKS = kD / 4;
    float const* const source = static_cast<float const*>(tensor) + static_cast<size_t>(block.head) * p.headSize;
    size_t const width = static_cast<size_t>(p.numHeads) * p.headSize;
    for (int32_t i = threadIdx.x; i < kROWS * kCHUNKS; i += kTHREADS)
    {
        int32_t const row = i / kCHUNKS;
        int32_t const chunk = i % kCHUNKS;
        int32_t const position = positionOfRow(row);
        bool const valid = position >= 0 && chunk * 4 < p.headSize;
        float const* const from = valid ? source + (block.row + position) * width + chunk * 4 : source;
        copyAsync(tile + row * (kD + kPAD) + chunk * 4, from, valid);
    }
}

// A thread has 4 queries (threadIdx.x / 8) and every eighth key, then every eighth group of 4 columns.
template <int kD>
__global__ void __launch_bounds__(kTHREADS) bandedAttentionFloat(BandedParams p)
{
    constexpr int kSTRIDE = kD + kPAD;
    constexpr int kWEIGHTS = kFLOAT_KEYS + kPAD;
    float* const queries = static_cast<float*>(sharedMemory());
    float* const keys = queries + kQUERIES * kSTRIDE;
    float* const values = keys + kFLOAT_KEYS * kSTRIDE;
    float* const weights = values + kFLOAT_KEYS * kSTRIDE;
    Block const block = findBlock(p, weights + kQUERIES * kWEIGHTS);
    if (block.firstQuery >= block.length)
    {
        return;
    }
    bool const anyLocal = fillTables(p, block);
    int32_t const globalTiles = ceilDiv(*block.usedSlots, kFLOAT_KEYS);
    int32_t const tiles
        = anyLocal ? globalTiles + ceilDiv(block.keys.end - block.keys.begin, kFLOAT_KEYS) : 0;
    int32_t const row = threadIdx.x / 8 * 4;
    int32_t const part = threadIdx.x % 8;
    float const scaleLog2 = p.scale * kLOG2E;
    float sum[4][kD / 8] = {};
    float peak[4] = {kNEVER, kNEVER, kNEVER, kNEVER};
    float total[4] = {};
    if (tiles > 0)
    {
        copyFloatTile<kD, kQUERIES>(p, block, queries, p.query, [&](int32_t i) {
            int32_t const query = block.firstQuery + i;
            return query < block.length ? positionOf(query, p.dilation, block.lane) : -1;
        });
    }
    for (int32_t tile = 0; tile < tiles; ++tile)
    {
        bool const isGlobal = tile < globalTiles;
        int32_t const first
            = isGlobal ? tile * kFLOAT_KEYS : block.keys.begin + (tile - globalTiles) * kFLOAT_KEYS;
        auto const at = [&](int32_t i) {
            return isGlobal ? slotPosition(p, block, first + i) : keyPosition(p, block, first + i);
        };
        __syncthreads(); // nobody reads the tile before this one any more
        copyFloatTile<kD, kFLOAT_KEYS>(p, block, keys, p.key, at);
        copyFloatTile<kD, kFLOAT_KEYS>(p, block, values, p.value, at);
        endCopies();
        waitForCopies<0>();
        __syncthreads();
        float score[4][4] = {};
        for (int32_t d = 0; d < kD; d += 4)
        {
            float4 k[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
            {
                k[j] = *reinterpret_cast<float4 const*>(keys + (part + 8 * j) * kSTRIDE + d);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                float4 const q = *reinterpret_cast<float4 const*>(queries + (row + i) * kSTRIDE + d);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                {
                    score[i][j] += q.x * k[j].x + q.y * k[j].y + q.z * k[j].z + q.w * k[j].w;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            int32_t const query = block.firstQuery + row + i;
            float highest = kNEVER;
#pragma unroll
            for (int j = 0; j < 4; ++j)
            {
                int32_t const key = first + part + 8 * j;
                bool const seen = isGlobal
                    ? slotPosition(p, block, key) >= 0
                    : isLocal(block, key) && inBand(query, key, block.window, block.causal);
                score[i][j] = seen ? score[i][j] * scaleLog2 : kNEVER;
                highest = fmaxf(highest, score[i][j]);
            }
#pragma unroll
            for (int other = 1; other < 8; other *= 2)
            {
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffU, highest, other));
            }
            float const next = fmaxf(peak[i], highest);
            float const base = next == kNEVER ? 0.0F : next;
            float const keep = exp2f(peak[i] - base);
            peak[i] = next;
            total[i] *= keep;
#pragma unroll
            for (int c = 0; c < kD / 8; ++c)
            {
                sum[i][c] *= keep;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j)
            {
                float const weight = exp2f(score[i][j] - base);
                total[i] += weight;
                weights[(row + i) * kWEIGHTS + part + 8 * j] = weight;
            }
        }
        __syncwarp(); // the eight threads of a query are in one warp
        for (int32_t key = 0; key < kFLOAT_KEYS; ++key)
        {
#pragma unroll
            for (int c = 0; c < kD / 32; ++c)
            {
                float4 const v = *reinterpret_cast<float4 const*>(values + key * kSTRIDE + part * 4 + 32 * c);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    float const weight = weights[(row + i) * kWEIGHTS + key];
                    sum[i][4 * c] += weight * v.x;
                    sum[i][4 * c + 1] += weight * v.y;
                    sum[i][4 * c + 2] += weight * v.z;
                    sum[i][4 * c + 3] += weight * v.w;
                }
            }
        }
        __syncwarp(); // the weights are read before the next tile writes its own
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
#pragma unroll
        for (int other = 1; other < 8; other *= 2)
        {
            total[i] += __shfl_xor_sync(0xffffffffU, total[i], other);
        }
        float const inverse = total[i] > 0.0F ? 1.0F / total[i] : 0.0F;
        int32_t const query = block.firstQuery + row + i;
        if (query >= block.length)
        {
            continue;
        }
        int32_t const slot = block.slots[row + i];
        float* const to
            = static_cast<float*>(p.context) + offsetOf(p, block, positionOf(query, p.dilation, block.lane));
#pragma unroll
        for (int c = 0; c < kD / 32; ++c)
        {
            int32_t const chunk = part + 8 * c;
            if (chunk * 4 >= p.headSize)
            {
                continue;
            }
            uint4 found;
            if (slot == 0)
            {
                found = make_uint4(__float_as_uint(sum[i][4 * c] * inverse),
                    __float_as_uint(sum[i][4 * c + 1] * inverse), __float_as_uint(sum[i][4 * c + 2] * inverse),
                    __float_as_uint(sum[i][4 * c + 3] * inverse));
            }
            else
            {
                found = fixedRow<float>(p, block, slot, chunk);
            }
            *reinterpret_cast<uint4*>(to + chunk * 4) = found;
        }
    }
}

// ---- launch -----------------------------------------------------------------------------------------------------------

template <int kD>
int32_t launchSized(BandedParams const& p, CUstream_st* stream)
{
    dim3 const grid(ceilDiv(ceilDiv(p.seqlen, p.dilation), kQUERIES), p.numHeads * p.dilation, p.batch);
    size_t const tables = tableBytes(p);
    size_t const tiles = 2 * static_cast<size_t>(kQUERIES + 4 * kKEYS) * kD;
    switch (p.type)
    {
    case Type::kFLOAT:
        return launch(bandedAttentionFloat<kD>, grid, kTHREADS, floatTileBytes<kD>() + tables, p, stream);
    case Type::kHALF:
        return launch(bandedAttentionTensorCores<Half, kD>, grid, kTHREADS, tiles + tables, p, stream);
    default:
        return launch(bandedAttentionTensorCores<Bf16, kD>, grid, kTHREADS, tiles + tables, p, stream);
    }
}

} // namespace

int32_t launchBandedAttention(BandedParams const& p, CUstream_st* stream) noexcept
{
    if (whyNot(p) != nullptr)
    {
        return cudaErrorInvalidValue;
    }
    if (p.headSize <= 32)
    {
        return launchSized<32>(p, stream);
    }
    return p.headSize <= 64 ? launchSized<64>(p, stream) : launchSized<128>(p, stream);
}

} // namespace lfx

// For callers without C++: the same, by pointer.
LFX_EXPORT int32_t lfxBandedAttention(lfx::BandedParams const* params, CUstream_st* stream) noexcept
{
    return lfx::launchBandedAttention(*params, stream);
}
