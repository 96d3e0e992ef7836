// GlobalAttention, second kernel: combines the partial results of the parts of the keys.
#pragma once

#include "global/block.cuh"

namespace lfx::global
{

struct CombineTraits
{
    static constexpr int kTHREADS = BlockTraits::kTHREADS;
    static constexpr int kWARPS = BlockTraits::kWARPS;
    static constexpr int kCOLUMNS = kWARP_SIZE; // of the context, for a block
    static constexpr size_t kSHARED_BYTES = sizeof(float) * kWARPS * (kCOLUMNS + 1);
};

// A block computes 32 columns of a query, one per lane; each warp adds up every eighth part.
template <typename T>
__global__ void __launch_bounds__(CombineTraits::kTHREADS) combineParts(GlobalParams p)
{
    using Traits = CombineTraits;
    float* const warpAcc = static_cast<float*>(sharedMemory());            // (kWARPS, kCOLUMNS)
    float* const warpRowSum = warpAcc + Traits::kWARPS * Traits::kCOLUMNS; // (kWARPS)
    int32_t const lane = threadIdx.x % kWARP_SIZE;
    int32_t const warp = threadIdx.x / kWARP_SIZE;
    int32_t const query = blockIdx.x;
    int32_t const column = blockIdx.y * Traits::kCOLUMNS + lane;
    int32_t const batchHead = blockIdx.z;
    int32_t const parts = Split(p).parts;
    float const* const firstPart = partialRow(p, 0, batchHead, query);
    size_t const partStride = partialRow(p, 1, 0, 0) - p.workspace;

    float lanePartsMax = kNEG_INF;
    for (int32_t part = lane; part < parts; part += kWARP_SIZE)
    {
        lanePartsMax = fmaxf(lanePartsMax, firstPart[part * partStride + p.headSize]);
    }
    OnlineSoftmax softmax;
    softmax.rescale(warpMax<kWARP_SIZE>(lanePartsMax), 1.0F);
    float acc = 0.0F;
    float rowSum = 0.0F;
#pragma unroll 8
    for (int32_t part = warp; part < parts; part += Traits::kWARPS)
    {
        float const* const row = firstPart + part * partStride;
        float const weight = softmax.weight(row[p.headSize], 1.0F);
        acc += weight * (column < p.headSize ? row[column] : 0.0F);
        rowSum += weight * row[p.headSize + 1];
    }
    warpAcc[warp * Traits::kCOLUMNS + lane] = acc;
    if (lane == 0)
    {
        warpRowSum[warp] = rowSum;
    }
    __syncthreads();
    if (warp != 0 || column >= p.headSize)
    {
        return;
    }
#pragma unroll
    for (int other = 1; other < Traits::kWARPS; ++other)
    {
        acc += warpAcc[other * Traits::kCOLUMNS + lane];
        rowSum += warpRowSum[other];
    }
    if (p.logSumExp != nullptr && column == 0)
    {
        p.logSumExp[static_cast<size_t>(batchHead) * p.queries + query] = naturalLogSumExp(rowSum, softmax.offset);
    }
    int32_t const batch = batchHead / p.numHeads;
    int32_t const head = batchHead % p.numHeads;
    T* const row = static_cast<T*>(p.context) + (static_cast<size_t>(batch) * p.queries + query) * p.contextStride
        + static_cast<size_t>(head) * p.headSize;
    row[column] = fromFloat<T>(rowSum > 0.0F ? acc / rowSum : 0.0F);
}

} // namespace lfx::global
