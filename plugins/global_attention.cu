// GlobalAttention: a few queries over all real keys of their row.
//
// There are too few queries to fill the machine, so the keys are split over blocks of threads (flash decoding): each
// takes 16 queries of one head and a part of the keys, and leaves its unfinished rows in the workspace; a second kernel
// joins the parts. Heads may be as wide as the hidden size: the folded form of the global rows is one such head.
//
// Source: Beltagy et al. 2020, arXiv:2004.05150, section 3; Dao et al. 2023, "Flash-Decoding".
#include "attention.h"
#include "band.h"
#include "device.cuh"

namespace lfx
{
namespace
{

constexpr int kQUERIES = 16; // a block
constexpr int kTHREADS = 256;
constexpr int kWARPS = kTHREADS / 32;
constexpr int kNARROW = 128; // head sizes up to this take tiles of 64 keys, wider ones of 32
constexpr int kBLOCKS = 264; // enough for two on each of 132 multiprocessors
constexpr float kLOG2E = 1.4426950408889634F;
constexpr float kNEVER = -INFINITY;

// How the keys are cut; the same on the host, for the workspace, and in both kernels.
struct Split
{
    int32_t tileKeys;
    int32_t tiles;    // a part
    int32_t parts;
};

LFX_HOST_DEVICE Split splitKeys(int32_t batch, int32_t queries, int32_t seqlen, int32_t numHeads, int32_t headSize)
{
    int32_t const tileKeys = headSize <= kNARROW ? 64 : 32;
    int32_t const tiles = ceilDiv(seqlen, tileKeys);
    int32_t const rows = smaller(ceilDiv(queries, kQUERIES), kBLOCKS);
    int64_t const others = static_cast<int64_t>(rows) * batch * numHeads;
    int32_t const wanted = others >= kBLOCKS ? 1 : smaller(tiles, kBLOCKS / static_cast<int32_t>(others));
    int32_t const each = ceilDiv(tiles, wanted);
    return {tileKeys, each, ceilDiv(tiles, each)};
}

// Offset in the workspace of the row that one part leaves: headSize sums, the peak and the total.
__device__ __forceinline__ size_t partialRow(GlobalParams const& p, int32_t part, int32_t headRow, int32_t query)
{
    size_t const row = (static_cast<size_t>(part) * p.batch * p.numHeads + headRow) * p.queries + query;
    return row * (p.headSize + 2);
}

// ---- float16 and bfloat16: tensor cores -----------------------------------------------------------------------------

// Shared memory of a block: rows are 16 bytes longer than they need be, so that eight of them lie in eight banks. With a
// head of 1024 it is 99 KiB, which is all that a block has on compute capability 8.6, 8.9 and 12.0.
template <int kKEYS>
struct Layout
{
    LFX_HOST_DEVICE explicit Layout(int32_t headSize)
        : width(ceilDiv(headSize, 32) * 32)
        , stride(width + 8)
    {
    }

    LFX_HOST_DEVICE size_t bytes() const
    {
        return 2 * static_cast<size_t>(kQUERIES + kKEYS) * stride // queries; keys, then values
            + 4 * kQUERIES * kSCORE_STRIDE;                       // scores, then weights in their place
    }

    // Warps that share a group of 8 keys, each with its part of the head.
    static constexpr int kPARTS = kWARPS / (kKEYS / 8);
    static constexpr int kSCORE_STRIDE = kKEYS + 4;
    static constexpr int kWEIGHT_STRIDE = 2 * kSCORE_STRIDE;
    int32_t width;
    int32_t stride;
};

// Starts the copy of rows of a head into shared memory, kLANES threads a row; rows from `valid` on, masked ones, and
// columns behind the head are zeros.
template <int kLANES, typename T>
__device__ __forceinline__ void copyRows(
    T* tile, int32_t stride, int32_t columns, T const* source, size_t sourceStride, int32_t rows, int32_t valid,
    int32_t headSize, int32_t const* mask)
{
    for (int32_t row = threadIdx.x / kLANES; row < rows; row += kTHREADS / kLANES)
    {
        bool const real = row < valid && (mask == nullptr || mask[row] != 0);
        for (int32_t column = threadIdx.x % kLANES * 8; column < columns; column += kLANES * 8)
        {
            copyAsync(tile + row * stride + column, source + row * sourceStride + column, real && column < headSize);
        }
    }
}

// kPAIRS: groups of 16 columns of the context that a warp has at most.
template <typename T, int kKEYS, int kPAIRS>
__global__ void __launch_bounds__(kTHREADS) globalAttentionTensorCores(GlobalParams p)
{
    using Shared = Layout<kKEYS>;
    constexpr int kLANES = kKEYS == 64 ? kNARROW / 8 : 32; // that copy a row: enough for a narrow head
    Shared const shared(p.headSize);
    T* const queries = static_cast<T*>(sharedMemory());
    T* const tile = queries + kQUERIES * shared.stride;
    T* const weights = tile + kKEYS * shared.stride;
    float* const scores = reinterpret_cast<float*>(weights); // a row's last four numbers: [0] what is kept of the sums

    int32_t const lane = threadIdx.x % 32;
    int32_t const warp = threadIdx.x / 32;
    int32_t const batch = blockIdx.z / p.numHeads;
    int32_t const head = blockIdx.z % p.numHeads;
    int32_t const firstQuery = blockIdx.y * kQUERIES;
    Split const split = splitKeys(p.batch, p.queries, p.seqlen, p.numHeads, p.headSize);
    int32_t const firstKey = blockIdx.x * split.tiles * kKEYS;
    int32_t const endKey = smaller(firstKey + split.tiles * kKEYS, p.seqlen);
    size_t const rowStride = static_cast<size_t>(p.numHeads) * p.headSize;
    size_t const start = static_cast<size_t>(batch) * p.seqlen * rowStride + static_cast<size_t>(head) * p.headSize;
    T const* const keys = static_cast<T const*>(p.key) + start;
    T const* const values = static_cast<T const*>(p.value) + start;
    int32_t const* const mask = p.keyMask + static_cast<size_t>(batch) * p.seqlen;
    float const scaleLog2 = p.scale * kLOG2E;

    copyRows<kLANES>(queries, shared.stride, shared.width,
        static_cast<T const*>(p.query)
            + (static_cast<size_t>(batch) * p.queries + firstQuery) * rowStride
            + static_cast<size_t>(head) * p.headSize,
        rowStride, kQUERIES, smaller(p.queries - firstQuery, kQUERIES), p.headSize, nullptr);

    float sum[kPAIRS][2][4];
#pragma unroll
    for (int i = 0; i < kPAIRS * 8; ++i)
    {
        sum[i / 8][i / 4 % 2][i % 4] = 0.0F;
    }
    float peak[2] = {kNEVER, kNEVER}; // of the rows warp and warp + 8, in every lane
    float total[2] = {0.0F, 0.0F};

    for (int32_t first = firstKey; first < endKey; first += kKEYS)
    {
        int32_t const found = smaller(endKey - first, kKEYS);
        __syncthreads(); // the values of the tile before are used up
        copyRows<kLANES>(tile, shared.stride, shared.width, keys + first * rowStride, rowStride, kKEYS, found,
            p.headSize, mask + first);
        endCopies();
        waitForCopies<0>();
        __syncthreads();

        // Scores of 8 keys a warp, over its part of the head.
        int32_t const group = warp % (kKEYS / 8);
        int32_t const part = warp / (kKEYS / 8);
        int32_t const steps = shared.width / 32;
        float score[4] = {0.0F, 0.0F, 0.0F, 0.0F};
        for (int32_t step = steps * part / Shared::kPARTS; step < steps * (part + 1) / Shared::kPARTS; ++step)
        {
            uint32_t b[4];
            loadMatrices(b, tile + (group * 8 + lane % 8) * shared.stride + step * 32 + lane / 8 * 8);
#pragma unroll
            for (int i = 0; i < 2; ++i)
            {
                uint32_t a[4];
                loadMatrices(a, queries + lane % 16 * shared.stride + step * 32 + i * 16 + lane / 16 * 8);
                multiplyAdd<T>(score, a, b[2 * i], b[2 * i + 1]);
            }
        }
#pragma unroll
        for (int turn = Shared::kPARTS - 1; turn >= 0; --turn)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                int32_t const row = lane / 4 + i / 2 * 8;
                float* const s = scores + row * Shared::kSCORE_STRIDE + group * 8 + lane % 4 * 2 + i % 2;
                if (part == turn)
                {
                    *s = turn == Shared::kPARTS - 1 ? score[i] : *s + score[i];
                }
            }
            __syncthreads(); // in the end the scores are there, and the keys used up
        }
        if (keys != values)
        {
            copyRows<kLANES>(
                tile, shared.stride, shared.width, values + first * rowStride, rowStride, kKEYS, found,
                p.headSize, mask + first);
            endCopies();
        }

        // Softmax of two rows a warp.
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            int32_t const row = warp + i * 8;
            float mine[kKEYS / 32];
            float highest = kNEVER;
#pragma unroll
            for (int j = 0; j < kKEYS / 32; ++j)
            {
                int32_t const column = lane + j * 32;
                float const s = scores[row * Shared::kSCORE_STRIDE + column];
                bool const seen = column < found && mask[first + column] != 0;
                mine[j] = seen ? s * scaleLog2 : kNEVER;
                highest = fmaxf(highest, mine[j]);
            }
#pragma unroll
            for (int other = 1; other < 32; other *= 2)
            {
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffU, highest, other));
            }
            float const next = fmaxf(peak[i], highest);
            float const base = next == kNEVER ? 0.0F : next; // -inf less -inf would be no number
            float const keep = exp2f(peak[i] - base);
            float added = 0.0F;
            __syncwarp(); // the row's scores are read by all before weights take their place
#pragma unroll
            for (int j = 0; j < kKEYS / 32; ++j)
            {
                float const weight = exp2f(mine[j] - base);
                added += weight;
                weights[row * Shared::kWEIGHT_STRIDE + lane + j * 32] = fromFloat<T>(weight);
            }
#pragma unroll
            for (int other = 1; other < 32; other *= 2)
            {
                added += __shfl_xor_sync(0xffffffffU, added, other);
            }
            total[i] = total[i] * keep + added;
            peak[i] = next;
            if (lane == 0)
            {
                scores[row * Shared::kSCORE_STRIDE + kKEYS] = keep;
            }
        }
        waitForCopies<0>();
        __syncthreads(); // weights and values are there

        // Context: 16 columns at a time, dealt to the warps in turn.
        float const keep[2] = {scores[lane / 4 * Shared::kSCORE_STRIDE + kKEYS],
            scores[(lane / 4 + 8) * Shared::kSCORE_STRIDE + kKEYS]};
        uint32_t a[kKEYS / 16][4];
#pragma unroll
        for (int step = 0; step < kKEYS / 16; ++step)
        {
            loadMatrices(a[step], weights + lane % 16 * Shared::kWEIGHT_STRIDE + step * 16 + lane / 16 * 8);
        }
#pragma unroll
        for (int pair = 0; pair < kPAIRS; ++pair)
        {
            int32_t const column = (warp + pair * kWARPS) * 16;
            if (column >= shared.width)
            {
                break;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                sum[pair][i / 4][i % 4] *= keep[i % 4 / 2];
            }
#pragma unroll
            for (int step = 0; step < kKEYS / 16; ++step)
            {
                uint32_t b[4];
                loadMatricesTransposed(
                    b, tile + (step * 16 + lane % 8 + lane / 8 % 2 * 8) * shared.stride + column + lane / 16 * 8);
                multiplyAdd<T>(sum[pair][0], a[step], b[0], b[1]);
                multiplyAdd<T>(sum[pair][1], a[step], b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int pair = 0; pair < kPAIRS; ++pair)
    {
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            int32_t const query = firstQuery + lane / 4 + i % 4 / 2 * 8;
            int32_t const column = (warp + pair * kWARPS) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (query < p.queries && column < p.headSize)
            {
                p.workspace[partialRow(p, blockIdx.x, blockIdx.z, query) + column] = sum[pair][i / 4][i % 4];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        int32_t const query = firstQuery + warp + i * 8;
        if (lane == 0 && query < p.queries)
        {
            float* const row = p.workspace + partialRow(p, blockIdx.x, blockIdx.z, query) + p.headSize;
            row[0] = peak[i];
            row[1] = total[i];
        }
    }
}

// ---- float32: the ordinary units --------------------------------------------------------------------------------------

constexpr int kFLOAT_KEYS = 32; // a step; parts are cut as for the tensor cores
constexpr int kCOLUMNS = kMAX_GLOBAL_HEAD_SIZE / kTHREADS;

LFX_HOST_DEVICE size_t floatBytes(int32_t headSize)
{
    return 4 * static_cast<size_t>(kQUERIES * headSize + kQUERIES * kFLOAT_KEYS + kQUERIES);
}

__global__ void __launch_bounds__(kTHREADS, 1) globalAttentionFloat(GlobalParams p)
{
    float* const queries = static_cast<float*>(sharedMemory());
    float* const weights = queries + kQUERIES * p.headSize;
    float* const kept = weights + kQUERIES * kFLOAT_KEYS;

    int32_t const lane = threadIdx.x % 32;
    int32_t const warp = threadIdx.x / 32;
    int32_t const batch = blockIdx.z / p.numHeads;
    int32_t const head = blockIdx.z % p.numHeads;
    int32_t const firstQuery = blockIdx.y * kQUERIES;
    int32_t const rows = smaller(p.queries - firstQuery, kQUERIES);
    Split const split = splitKeys(p.batch, p.queries, p.seqlen, p.numHeads, p.headSize);
    int32_t const firstKey = blockIdx.x * split.tiles * split.tileKeys;
    int32_t const endKey = smaller(firstKey + split.tiles * split.tileKeys, p.seqlen);
    size_t const rowStride = static_cast<size_t>(p.numHeads) * p.headSize;
    size_t const start = static_cast<size_t>(batch) * p.seqlen * rowStride + static_cast<size_t>(head) * p.headSize;
    float const* const keys = static_cast<float const*>(p.key) + start;
    float const* const values = static_cast<float const*>(p.value) + start;
    float const* const query = static_cast<float const*>(p.query)
        + (static_cast<size_t>(batch) * p.queries + firstQuery) * rowStride + static_cast<size_t>(head) * p.headSize;
    int32_t const* const mask = p.keyMask + static_cast<size_t>(batch) * p.seqlen;
    float const scaleLog2 = p.scale * kLOG2E;

    for (int32_t i = threadIdx.x; i < kQUERIES * p.headSize; i += kTHREADS)
    {
        int32_t const row = i / p.headSize;
        queries[i] = row < rows ? query[row * rowStride + i % p.headSize] : 0.0F;
    }
    float sum[kQUERIES][kCOLUMNS] = {};
    float peak[2] = {kNEVER, kNEVER};
    float total[2] = {0.0F, 0.0F};
    for (int32_t first = firstKey; first < endKey; first += kFLOAT_KEYS)
    {
        int32_t const found = smaller(endKey - first, kFLOAT_KEYS);
        __syncthreads(); // the queries are there, and the weights before used up
        for (int32_t key = warp; key < kFLOAT_KEYS; key += kWARPS)
        {
            bool const seen = key < found && mask[first + key] != 0;
            float score[kQUERIES] = {};
            for (int32_t d = lane; seen && d < p.headSize; d += 32)
            {
                float const k = keys[(first + key) * rowStride + d];
#pragma unroll
                for (int i = 0; i < kQUERIES; ++i)
                {
                    score[i] += queries[i * p.headSize + d] * k;
                }
            }
#pragma unroll
            for (int i = 0; i < kQUERIES; ++i)
            {
#pragma unroll
                for (int other = 1; other < 32; other *= 2)
                {
                    score[i] += __shfl_xor_sync(0xffffffffU, score[i], other);
                }
                if (lane == 0)
                {
                    weights[i * kFLOAT_KEYS + key] = seen ? score[i] * scaleLog2 : kNEVER;
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            float* const row = weights + (warp + i * 8) * kFLOAT_KEYS;
            float highest = row[lane];
#pragma unroll
            for (int other = 1; other < 32; other *= 2)
            {
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffU, highest, other));
            }
            float const next = fmaxf(peak[i], highest);
            float const base = next == kNEVER ? 0.0F : next;
            float const keep = exp2f(peak[i] - base);
            float const weight = exp2f(row[lane] - base);
            float added = weight;
#pragma unroll
            for (int other = 1; other < 32; other *= 2)
            {
                added += __shfl_xor_sync(0xffffffffU, added, other);
            }
            row[lane] = weight;
            total[i] = total[i] * keep + added;
            peak[i] = next;
            if (lane == 0)
            {
                kept[warp + i * 8] = keep;
            }
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < kCOLUMNS; ++c)
        {
            int32_t const column = threadIdx.x + c * kTHREADS;
            if (column >= p.headSize)
            {
                break;
            }
#pragma unroll
            for (int i = 0; i < kQUERIES; ++i)
            {
                sum[i][c] *= kept[i];
            }
            for (int32_t key = 0; key < found; ++key)
            {
                float const v = mask[first + key] != 0 ? values[(first + key) * rowStride + column] : 0.0F;
#pragma unroll
                for (int i = 0; i < kQUERIES; ++i)
                {
                    sum[i][c] += weights[i * kFLOAT_KEYS + key] * v;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kQUERIES; ++i)
    {
#pragma unroll
        for (int c = 0; c < kCOLUMNS; ++c)
        {
            int32_t const column = threadIdx.x + c * kTHREADS;
            if (i < rows && column < p.headSize)
            {
                p.workspace[partialRow(p, blockIdx.x, blockIdx.z, firstQuery + i) + column] = sum[i][c];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        if (lane == 0 && warp + i * 8 < rows)
        {
            float* const row
                = p.workspace + partialRow(p, blockIdx.x, blockIdx.z, firstQuery + warp + i * 8) + p.headSize;
            row[0] = peak[i];
            row[1] = total[i];
        }
    }
}

// ---- joining the parts ----------------------------------------------------------------------------------------------

constexpr int kJOINED = 32; // columns of a block: one a lane, while each warp has every eighth part

LFX_HOST_DEVICE constexpr size_t joinBytes()
{
    return sizeof(float) * kWARPS * (kJOINED + 1);
}

// Some columns of a row: the parts' sums, each brought to the highest peak, over their total.
template <typename T>
__global__ void __launch_bounds__(kTHREADS) joinParts(GlobalParams p)
{
    float* const sums = static_cast<float*>(sharedMemory()); // (kWARPS, kJOINED)
    float* const totals = sums + kWARPS * kJOINED;           // (kWARPS)
    int32_t const lane = threadIdx.x % 32;
    int32_t const warp = threadIdx.x / 32;
    int32_t const column = blockIdx.y * kJOINED + lane;
    int32_t const parts = splitKeys(p.batch, p.queries, p.seqlen, p.numHeads, p.headSize).parts;
    float const* const first = p.workspace + partialRow(p, 0, blockIdx.z, blockIdx.x);
    size_t const stride = partialRow(p, 1, 0, 0); // from part to part
    float highest = kNEVER;
    for (int32_t part = lane; part < parts; part += 32)
    {
        highest = fmaxf(highest, first[part * stride + p.headSize]);
    }
#pragma unroll
    for (int other = 1; other < 32; other *= 2)
    {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffU, highest, other));
    }
    float const base = highest == kNEVER ? 0.0F : highest;
    float sum = 0.0F;
    float total = 0.0F;
#pragma unroll 8
    for (int32_t part = warp; part < parts; part += kWARPS)
    {
        float const* const row = first + part * stride;
        float const weight = exp2f(row[p.headSize] - base);
        sum += weight * (column < p.headSize ? row[column] : 0.0F);
        total += weight * row[p.headSize + 1];
    }
    sums[warp * kJOINED + lane] = sum;
    totals[warp] = total; // the same in every lane
    __syncthreads();
    if (warp != 0 || column >= p.headSize)
    {
        return;
    }
#pragma unroll
    for (int other = 1; other < kWARPS; ++other)
    {
        sum += sums[other * kJOINED + lane];
        total += totals[other];
    }
    int32_t const batch = blockIdx.z / p.numHeads;
    int32_t const head = blockIdx.z % p.numHeads;
    size_t const row = (static_cast<size_t>(batch) * p.queries + blockIdx.x) * p.numHeads + head;
    static_cast<T*>(p.context)[row * p.headSize + column] = fromFloat<T>(total > 0.0F ? sum / total : 0.0F);
}

// ---- launch -----------------------------------------------------------------------------------------------------------

template <typename T>
int32_t launchTyped(GlobalParams const& p, dim3 grid, CUstream_st* stream)
{
    if (p.headSize <= kNARROW)
    {
        return launch(
            globalAttentionTensorCores<T, 64, 1>, grid, kTHREADS, Layout<64>(p.headSize).bytes(), p, stream);
    }
    constexpr int kPAIRS = kMAX_GLOBAL_HEAD_SIZE / 16 / kWARPS;
    return launch(
        globalAttentionTensorCores<T, 32, kPAIRS>, grid, kTHREADS, Layout<32>(p.headSize).bytes(), p, stream);
}

} // namespace

size_t globalWorkspaceBytes(int32_t batch, int32_t queries, int32_t numHeads, int32_t headSize) noexcept
{
    // Keys are cut into more than one part only while all parts together are at most kBLOCKS blocks of 16 rows.
    size_t const whole = static_cast<size_t>(batch) * numHeads * queries;
    size_t const cut = static_cast<size_t>(kBLOCKS) * kQUERIES;
    return sizeof(float) * (whole > cut ? whole : cut) * (headSize + 2);
}

int32_t launchGlobalAttention(GlobalParams const& p, CUstream_st* stream) noexcept
{
    if (whyNot(p) != nullptr)
    {
        return cudaErrorInvalidValue;
    }
    Split const split = splitKeys(p.batch, p.queries, p.seqlen, p.numHeads, p.headSize);
    dim3 const grid(split.parts, ceilDiv(p.queries, kQUERIES), p.batch * p.numHeads);
    dim3 const rows(p.queries, ceilDiv(p.headSize, kJOINED), p.batch * p.numHeads);
    int32_t error = 0;
    switch (p.type)
    {
    case Type::kFLOAT: error = launch(globalAttentionFloat, grid, kTHREADS, floatBytes(p.headSize), p, stream); break;
    case Type::kHALF: error = launchTyped<Half>(p, grid, stream); break;
    default: error = launchTyped<Bf16>(p, grid, stream); break;
    }
    if (error != 0)
    {
        return error;
    }
    switch (p.type)
    {
    case Type::kFLOAT: return launch(joinParts<float>, rows, kTHREADS, joinBytes(), p, stream);
    case Type::kHALF: return launch(joinParts<Half>, rows, kTHREADS, joinBytes(), p, stream);
    default: return launch(joinParts<Bf16>, rows, kTHREADS, joinBytes(), p, stream);
    }
}

} // namespace lfx

// For callers without C++: the same, by pointer.
LFX_EXPORT int32_t lfxGlobalAttention(lfx::GlobalParams const* params, CUstream_st* stream) noexcept
{
    return lfx::launchGlobalAttention(*params, stream);
}

LFX_EXPORT size_t lfxGlobalWorkspaceBytes(
    int32_t batch, int32_t queries, int32_t numHeads, int32_t headSize) noexcept
{
    return lfx::globalWorkspaceBytes(batch, queries, numHeads, headSize);
}
