// Online softmax of rows whose scores arrive tile by tile, and the reductions over lanes of a warp that it needs.
//
// Weights are computed as powers of 2: 2^(score · scaleLog2 - rowMax), with scaleLog2 = scale · log2(e).
//
// Source: Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3; Dao 2023, arXiv:2307.08691, section 3.1.
#pragma once

#include "device.cuh"

namespace lfx
{

constexpr float kLOG2E = 1.4426950408889634F;
constexpr float kLN2 = 0.6931471805599453F;
constexpr float kNEG_INF = -INFINITY; // the score of a masked key

// Maximum over kLANES neighbouring lanes (a power of 2), in each of them. All lanes of the warp call it.
template <int kLANES>
__device__ __forceinline__ float warpMax(float x)
{
#pragma unroll
    for (int distance = 1; distance < kLANES; distance *= 2)
    {
        x = fmaxf(x, __shfl_xor_sync(kFULL_WARP, x, distance));
    }
    return x;
}

// Sum over kLANES neighbouring lanes (a power of 2), in each of them. All lanes of the warp call it.
template <int kLANES>
__device__ __forceinline__ float warpSum(float x)
{
#pragma unroll
    for (int distance = 1; distance < kLANES; distance *= 2)
    {
        x += __shfl_xor_sync(kFULL_WARP, x, distance);
    }
    return x;
}

// The sum of a row's weights, of which each lane that shares the row has a part.
struct RowSum
{
    // 1 / sum of the row's weights, over the kLANES lanes that share the row; 0 if every key is masked.
    template <int kLANES>
    __device__ __forceinline__ float inverseSum() const
    {
        float const sum = warpSum<kLANES>(rowSum);
        return sum > 0.0F ? 1.0F / sum : 0.0F;
    }

    float rowSum = 0.0F; // of this lane's weights
};

// The natural log-sum-exp of a row's scores, from the sum of its weights and the logarithm of what they are relative to, in
// powers of 2; -inf if every key is masked.
__device__ __forceinline__ float naturalLogSumExp(float sum, float reference)
{
    return kLN2 * (log2Flushed(sum) + reference);
}

// The state of one row. Lanes that share a row hold the same rowMax; each adds up the weights of its own columns.
struct OnlineSoftmax : RowSum
{
    // Takes the maximum score of the next tile and rescales rowSum to it. Returns the factor for the caller's accumulator.
    __device__ __forceinline__ float rescale(float tileMax, float scaleLog2)
    {
        float const previousMax = rowMax;
        rowMax = fmaxf(rowMax, tileMax * scaleLog2);
        offset = rowMax == kNEG_INF ? 0.0F : rowMax;
        float const factor = exp2Flushed(previousMax - offset);
        rowSum *= factor;
        return factor;
    }

    // The weight of a score of the tile that rescale() took; the caller adds it to rowSum.
    __device__ __forceinline__ float weight(float score, float scaleLog2) const
    {
        return exp2Flushed(fmaf(score, scaleLog2, -offset));
    }

    // See attention.h, for the kLANES lanes that share the row.
    template <int kLANES>
    __device__ __forceinline__ float logSumExp() const
    {
        return naturalLogSumExp(warpSum<kLANES>(rowSum), offset);
    }

    float rowMax = kNEG_INF; // largest score so far, times scaleLog2
    float offset = 0.0F;     // rowMax, or 0 while every key of the row is masked: -inf - -inf would be NaN
};

// OnlineSoftmax that rescales seldom. Weights are relative to a reference, an earlier maximum of the row, until a score
// exceeds it by more than a factor of 2^kSLACK; float16 holds weights up to 2^16. Each row decides for itself, so that its
// result does not depend on other rows.
struct LazySoftmax : RowSum
{
    static constexpr float kSLACK = 8.0F;
    static constexpr float kLOWEST = -1e30F; // finite, so that kLOWEST - kLOWEST is 0

    // Whether a score, a maximum of some of the row's columns, asks for rescale().
    __device__ __forceinline__ bool isExceeded(float score, float scaleLog2) const
    {
        return fmaf(score, scaleLog2, offset) > kSLACK;
    }

    // Takes the maximum score of the next keys. Returns the factor for the caller's accumulator, 1 if it may stay.
    __device__ __forceinline__ float rescale(float max, float scaleLog2)
    {
        float const next = isExceeded(max, scaleLog2) ? -max * scaleLog2 : offset;
        float const factor = exp2Flushed(next - offset);
        offset = next;
        rowSum *= factor;
        return factor;
    }

    // The weight of a score; the caller adds it to rowSum.
    __device__ __forceinline__ float weight(float score, float scaleLog2) const
    {
        return exp2Flushed(fmaf(score, scaleLog2, offset));
    }

    // See attention.h, for the kLANES lanes that share the row.
    template <int kLANES>
    __device__ __forceinline__ float logSumExp() const
    {
        return naturalLogSumExp(warpSum<kLANES>(rowSum), -offset);
    }

    float offset = -kLOWEST; // minus the reference, in the unit of score · scaleLog2
};

} // namespace lfx
