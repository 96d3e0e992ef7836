// GlobalAttention in float32, without tensor cores.
#pragma once

#include "global/block.cuh"

namespace lfx::global
{

struct Fp32Traits : BlockTraits
{
    static constexpr int kKEYS = 32; // of a tile; parts of the keys are the same as for tensor cores
    static constexpr int kTHREAD_COLUMNS = kMAX_GLOBAL_HEAD_SIZE / kTHREADS; // of the context
    using Scores = ScoreTile<float, kKEYS>;

    static size_t sharedBytes(int32_t headSize)
    {
        return sizeof(float) * kQUERIES * headSize + Scores::kBYTES;
    }
};

// A warp computes every eighth key, its lanes every 32nd column of the head. Masked keys are not read.
template <typename IsVisible>
__device__ __forceinline__ void computeScores(Fp32Traits::Scores const& scores, GlobalParams const& p,
    float const* queries, float const* keys, int64_t keyStride, IsVisible isVisible)
{
    using Traits = Fp32Traits;
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    for (int32_t key = threadIdx.x / kWARP_SIZE; key < Traits::kKEYS; key += Traits::kWARPS)
    {
        bool const visible = isVisible(key);
        float products[Traits::kQUERIES] = {};
#pragma unroll 4 // left to itself, nvcc takes a third more registers on sm_100 and sm_120
        for (int32_t d = lane; visible && d < p.headSize; d += kWARP_SIZE)
        {
            float const k = keys[key * keyStride + d];
#pragma unroll
            for (int i = 0; i < Traits::kQUERIES; ++i)
            {
                products[i] += queries[i * p.headSize + d] * k;
            }
        }
#pragma unroll
        for (int i = 0; i < Traits::kQUERIES; ++i)
        {
            float const score = warpSum<kWARP_SIZE>(products[i]);
            if (lane == 0)
            {
                scores.score(i, key) = score;
            }
        }
    }
}

// Rescales the thread's columns of the context and adds the values, weighted. Masked values are not read.
__device__ __forceinline__ void accumulate(float (&acc)[Fp32Traits::kQUERIES][Fp32Traits::kTHREAD_COLUMNS],
    Fp32Traits::Scores const& scores, GlobalParams const& p, float const* values, int64_t valueStride,
    int32_t const* mask, int32_t numKeys)
{
    using Traits = Fp32Traits;
#pragma unroll
    for (int c = 0; c < Traits::kTHREAD_COLUMNS; ++c)
    {
        int32_t const column = threadIdx.x + c * Traits::kTHREADS;
        if (column >= p.headSize)
        {
            break;
        }
#pragma unroll
        for (int i = 0; i < Traits::kQUERIES; ++i)
        {
            acc[i][c] *= scores.factor(i);
        }
        for (int32_t key = 0; key < numKeys; ++key)
        {
            float const v = mask[key] != 0 ? values[key * valueStride + column] : 0.0F;
#pragma unroll
            for (int i = 0; i < Traits::kQUERIES; ++i)
            {
                acc[i][c] += scores.weight(i, key) * v;
            }
        }
    }
}

static __global__ void __launch_bounds__(Fp32Traits::kTHREADS, 1) globalAttentionFp32(GlobalParams p)
{
    using Traits = Fp32Traits;
    float* const queries = static_cast<float*>(sharedMemory());
    Traits::Scores const scores{queries + Traits::kQUERIES * p.headSize};
    Block<float> const block(p);
    float const scaleLog2 = p.scale * kLOG2E;
    for (int32_t i = threadIdx.x; i < Traits::kQUERIES * p.headSize; i += Traits::kTHREADS)
    {
        int32_t const row = i / p.headSize;
        queries[i] = row < block.numQueries ? block.queries[row * p.queryStride + i % p.headSize] : 0.0F;
    }
    float acc[Traits::kQUERIES][Traits::kTHREAD_COLUMNS] = {};
    OnlineSoftmax softmax[Traits::kWARP_ROWS];
    for (int32_t firstKey = block.firstKey; firstKey < block.endKey; firstKey += Traits::kKEYS)
    {
        int32_t const numKeys = min(block.endKey - firstKey, Traits::kKEYS);
        int32_t const* const mask = block.mask + firstKey;
        auto const isVisible = [&](int32_t key) { return key < numKeys && mask[key] != 0; };
        __syncthreads(); // the queries have arrived, and every thread is done with the previous weights
        computeScores(scores, p, queries, block.keys + firstKey * p.keyStride, p.keyStride, isVisible);
        __syncthreads();
        updateSoftmax(softmax, scores, scaleLog2, isVisible);
        __syncthreads();
        accumulate(acc, scores, p, block.values + firstKey * p.valueStride, p.valueStride, mask, numKeys);
    }
#pragma unroll
    for (int i = 0; i < Traits::kQUERIES; ++i)
    {
#pragma unroll
        for (int c = 0; c < Traits::kTHREAD_COLUMNS; ++c)
        {
            int32_t const column = threadIdx.x + c * Traits::kTHREADS;
            if (i < block.numQueries && column < p.headSize)
            {
                partialRow(p, blockIdx.x, blockIdx.z, block.firstQuery + i)[column] = acc[i][c];
            }
        }
    }
    writeStatistics(p, block, softmax);
}

} // namespace lfx::global
