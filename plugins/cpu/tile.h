// Attention of a tile of queries of one head, with online softmax. Keys are added a few at a time.
//
// Vectors run along the queries: a key's scores are products of its elements, broadcast, with vectors of the queries'
// elements. So queries are transposed once, keys and values are read where they are, and the maxima and sums of the
// softmax need no reduction within a vector.
//
// Source: Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3; Dao 2023, arXiv:2307.08691, section 3.1.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace lfx::cpu::LFX_CPU_SET
{

constexpr int32_t kMAX_KEYS = 64;       // added at a time
constexpr int32_t kBLOCK_ROWS = 6;      // keys, or columns of the values, of a block of products
constexpr int32_t kVALUE_COLUMNS = 128; // of the values, that are copied to the scratch memory at a time

// A key that the queries [firstQuery, endQuery) of the tile see.
struct Key
{
    int32_t position;
    int32_t firstQuery;
    int32_t endQuery;
};

// Scratch memory of a tile, small enough for the stack and for a core's L2 cache.
template <int32_t kQUERIES, int32_t kHEAD_SIZE>
struct Scratch
{
    alignas(64) float queries[kQUERIES * kHEAD_SIZE];
    alignas(64) float acc[kQUERIES * kHEAD_SIZE];
    alignas(64) float weights[kQUERIES * kMAX_KEYS];
    alignas(64) float values[kMAX_KEYS * kVALUE_COLUMNS];
};

// Rows of a head: those of neighbouring tokens are `stride` floats apart.
struct Rows
{
    float const* first;
    int64_t stride;

    LFX_INLINE float const* row(int32_t position) const
    {
        return first + position * stride;
    }
};

class Tile
{
public:
    // Uses the first part of `scratch` that `numQueries` and `headSize` need.
    template <int32_t kQUERIES, int32_t kHEAD_SIZE>
    Tile(Scratch<kQUERIES, kHEAD_SIZE>& scratch, int32_t numQueries, int32_t headSize, float scale)
        : mHeadSize(headSize)
        , mVectors(ceilDiv(numQueries, kLANES))
        , mScaleLog2(scale * kLOG2E)
        , mQueries(scratch.queries)
        , mAcc(scratch.acc)
        , mWeights(scratch.weights)
        , mValues(scratch.values)
    {
        static_assert(kQUERIES <= kTILE_QUERIES && kQUERIES % kLANES == 0, "queries fill whole vectors");
        for (int32_t i = 0; i < headSize * mVectors; ++i)
        {
            store(mAcc + i * kLANES, Vector{});
        }
        for (int32_t v = 0; v < mVectors; ++v)
        {
            mRowMax[v] = broadcast(kNEG_INF);
            mRowSum[v] = Vector{};
        }
    }

    // Transposes the queries: row(query) is a query's row, or nullptr for zeros, as for those past the end of the tile.
    template <typename Row>
    LFX_INLINE void setQueries(Row const& row)
    {
        alignas(64) static constexpr float kZEROS[kHEAD_SIZE_MULTIPLE] = {};
        for (int32_t v = 0; v < mVectors; ++v)
        {
            float const* rows[kLANES];
            int32_t steps[kLANES]; // 0 to read the same zeros again
            for (int32_t i = 0; i < kLANES; ++i)
            {
                float const* const from = row(v * kLANES + i);
                rows[i] = from != nullptr ? from : kZEROS;
                steps[i] = from != nullptr ? kHEAD_SIZE_MULTIPLE : 0;
            }
            transposeRows(rows, steps, mQueries + v * kLANES);
        }
    }

    // Adds at most kMAX_KEYS keys.
    void add(Key const* keys, int32_t numKeys, Rows const& keyRows, Rows const& valueRows)
    {
        for (int32_t v = 0; v < mVectors; ++v)
        {
            mTileMax[v] = broadcast(kNEG_INF);
        }
        for (int32_t first = 0; first < numKeys; first += kBLOCK_ROWS)
        {
            scoreRows<kBLOCK_ROWS>(keys + first, min(kBLOCK_ROWS, numKeys - first), first, keyRows);
        }
        updateSoftmax(numKeys);
        for (int32_t column = 0; column < mHeadSize; column += kVALUE_COLUMNS)
        {
            int32_t const columns = min(kVALUE_COLUMNS, mHeadSize - column);
            copyValues(keys, numKeys, valueRows, column, columns);
            for (int32_t first = 0; first < columns; first += kBLOCK_ROWS)
            {
                int32_t const rows = min(kBLOCK_ROWS, columns - first);
                accumulateRows<kBLOCK_ROWS>(rows, column + first, mValues + first, columns, numKeys);
            }
        }
    }

    // Writes the context of a query; zeros if it saw no key.
    void write(int32_t query, float* row) const
    {
        float const sum = rowSum(query);
        float const inverse = sum == 0.0F ? 0.0F : 1.0F / sum; // NaN stays NaN
        float const* const column = mAcc + query;
        for (int32_t d = 0; d < mHeadSize; ++d)
        {
            row[d] = column[d * mVectors * kLANES] * inverse;
        }
    }

    // Writes the accumulated values of a query, its rowMax and its rowSum.
    void writePartial(int32_t query, float* row) const
    {
        float const* const column = mAcc + query;
        for (int32_t d = 0; d < mHeadSize; ++d)
        {
            row[d] = column[d * mVectors * kLANES];
        }
        row[mHeadSize] = mRowMax[query / kLANES][query % kLANES];
        row[mHeadSize + 1] = rowSum(query);
    }

    float logSumExp(int32_t query) const
    {
        float const sum = rowSum(query);
        return sum == 0.0F ? kNEG_INF : __builtin_logf(sum) + mRowMax[query / kLANES][query % kLANES] * kLN2;
    }

private:
    float rowSum(int32_t query) const
    {
        return mRowSum[query / kLANES][query % kLANES];
    }

    void transposeRows(float const* (&rows)[kLANES], int32_t const (&steps)[kLANES], float* to)
    {
        for (int32_t first = 0; first < mHeadSize; first += kHEAD_SIZE_MULTIPLE)
        {
            for (int32_t d = 0; d < kHEAD_SIZE_MULTIPLE; ++d, to += mVectors * kLANES)
            {
                Vector column;
                LFX_UNROLL
                for (int32_t i = 0; i < kLANES; ++i)
                {
                    column[i] = rows[i][d];
                }
                store(to, column);
            }
            for (int32_t i = 0; i < kLANES; ++i)
            {
                rows[i] += steps[i];
            }
        }
    }

    // Scores of up to kROWS keys; `firstKey` is their index in the tile.
    template <int32_t kROWS>
    LFX_INLINE void scoreRows(Key const* keys, int32_t rows, int32_t firstKey, Rows const& keyRows)
    {
        if constexpr (kROWS > 1)
        {
            if (rows < kROWS)
            {
                scoreRows<kROWS - 1>(keys, rows, firstKey, keyRows);
                return;
            }
        }
        float const* pointers[kROWS];
        LFX_UNROLL
        for (int32_t r = 0; r < kROWS; ++r)
        {
            pointers[r] = keyRows.row(keys[r].position);
        }
        forEachGroup([&](auto vectors, int32_t v) {
            scoreBlock<kROWS, decltype(vectors)::kCOUNT>(keys, pointers, v, firstKey);
        });
    }

    template <int32_t kROWS, int32_t kCOUNT>
    void scoreBlock(Key const* keys, float const* const (&pointers)[kROWS], int32_t vector, int32_t firstKey)
    {
        Vector acc[kROWS][kCOUNT] = {};
        float const* queries = mQueries + vector * kLANES;
        int64_t const stride = static_cast<int64_t>(mVectors) * kLANES;
        for (int32_t d = 0; d < mHeadSize; ++d, queries += stride)
        {
            Vector q[kCOUNT];
            LFX_UNROLL
            for (int32_t v = 0; v < kCOUNT; ++v)
            {
                q[v] = load(queries + v * kLANES);
            }
            LFX_UNROLL
            for (int32_t r = 0; r < kROWS; ++r)
            {
                Vector const k = broadcast(pointers[r][d]);
                LFX_UNROLL
                for (int32_t v = 0; v < kCOUNT; ++v)
                {
                    acc[r][v] += k * q[v];
                }
            }
        }
        float* weights = mWeights + firstKey * stride + vector * kLANES;
        LFX_UNROLL
        for (int32_t r = 0; r < kROWS; ++r, weights += stride)
        {
            bool const all = keys[r].firstQuery <= 0 && keys[r].endQuery >= mVectors * kLANES;
            LFX_UNROLL
            for (int32_t v = 0; v < kCOUNT; ++v)
            {
                Vector const scaled = acc[r][v] * mScaleLog2;
                Vector const score = all ? scaled : visible(scaled, keys[r], (vector + v) * kLANES);
                store(weights + v * kLANES, score);
                mTileMax[vector + v] = max(mTileMax[vector + v], score);
            }
        }
    }

    // Masks the queries that do not see the key; `firstQuery` is the first lane's.
    LFX_INLINE static Vector visible(Vector score, Key const& key, int32_t firstQuery)
    {
        Integers const query = laneIndices() + firstQuery;
        return ((query >= key.firstQuery) & (query < key.endQuery)) ? score : broadcast(kNEG_INF);
    }

    // Replaces the scores by weights, and sets the factors of what was accumulated before.
    void updateSoftmax(int32_t numKeys)
    {
        for (int32_t v = 0; v < mVectors; ++v)
        {
            Vector const newMax = max(mRowMax[v], mTileMax[v]);
            Vector const offset = newMax == kNEG_INF ? Vector{} : newMax; // -inf - -inf would be NaN
            mFactor[v] = exp2(mRowMax[v] - offset);
            Vector sum = mRowSum[v] * mFactor[v];
            float* weights = mWeights + v * kLANES;
            for (int32_t key = 0; key < numKeys; ++key, weights += mVectors * kLANES)
            {
                Vector const weight = exp2(load(weights) - offset);
                store(weights, weight);
                sum += weight;
            }
            mRowSum[v] = sum;
            mRowMax[v] = newMax;
        }
    }

    // Copies columns of the values to the scratch memory: rows that lie a power of two apart would evict one another
    // from the L1 cache.
    void copyValues(Key const* keys, int32_t numKeys, Rows const& valueRows, int32_t column, int32_t columns)
    {
        float* to = mValues;
        for (int32_t key = 0; key < numKeys; ++key, to += columns)
        {
            float const* const from = valueRows.row(keys[key].position) + column;
            for (int32_t i = 0; i < columns; i += kHEAD_SIZE_MULTIPLE)
            {
                __builtin_memcpy(to + i, from + i, kHEAD_SIZE_MULTIPLE * sizeof(float));
            }
        }
    }

    // Adds the weighted values to up to kROWS columns of the context, from `column` on.
    template <int32_t kROWS>
    LFX_INLINE void accumulateRows(
        int32_t rows, int32_t column, float const* values, int32_t valueStride, int32_t numKeys)
    {
        if constexpr (kROWS > 1)
        {
            if (rows < kROWS)
            {
                accumulateRows<kROWS - 1>(rows, column, values, valueStride, numKeys);
                return;
            }
        }
        forEachGroup([&](auto vectors, int32_t v) {
            accumulateBlock<kROWS, decltype(vectors)::kCOUNT>(v, column, values, valueStride, numKeys);
        });
    }

    template <int32_t kROWS, int32_t kCOUNT>
    void accumulateBlock(int32_t vector, int32_t column, float const* values, int32_t valueStride, int32_t numKeys)
    {
        int64_t const stride = static_cast<int64_t>(mVectors) * kLANES;
        float* const target = mAcc + column * stride + vector * kLANES;
        Vector acc[kROWS][kCOUNT];
        LFX_UNROLL
        for (int32_t r = 0; r < kROWS; ++r)
        {
            LFX_UNROLL
            for (int32_t v = 0; v < kCOUNT; ++v)
            {
                acc[r][v] = load(target + r * stride + v * kLANES) * mFactor[vector + v];
            }
        }
        float const* weights = mWeights + vector * kLANES;
        for (int32_t key = 0; key < numKeys; ++key, weights += stride, values += valueStride)
        {
            Vector w[kCOUNT];
            LFX_UNROLL
            for (int32_t v = 0; v < kCOUNT; ++v)
            {
                w[v] = load(weights + v * kLANES);
            }
            LFX_UNROLL
            for (int32_t r = 0; r < kROWS; ++r)
            {
                Vector const x = broadcast(values[r]);
                LFX_UNROLL
                for (int32_t v = 0; v < kCOUNT; ++v)
                {
                    acc[r][v] += x * w[v];
                }
            }
        }
        LFX_UNROLL
        for (int32_t r = 0; r < kROWS; ++r)
        {
            LFX_UNROLL
            for (int32_t v = 0; v < kCOUNT; ++v)
            {
                store(target + r * stride + v * kLANES, acc[r][v]);
            }
        }
    }

    template <int32_t kNUMBER>
    struct Count
    {
        static constexpr int32_t kCOUNT = kNUMBER;
    };

    // Calls block(Count<n>{}, vector) for groups of kVECTORS, 2 and 1 vectors.
    template <typename Block>
    LFX_INLINE void forEachGroup(Block const& block) const
    {
        int32_t v = 0;
        for (; v + kVECTORS <= mVectors; v += kVECTORS)
        {
            block(Count<kVECTORS>{}, v);
        }
        if constexpr (kVECTORS > 2)
        {
            if (v + 2 <= mVectors)
            {
                block(Count<2>{}, v);
                v += 2;
            }
        }
        if (v < mVectors)
        {
            block(Count<1>{}, v);
        }
    }

    static constexpr int32_t kMAX_VECTORS = kTILE_QUERIES / kLANES;

    int32_t mHeadSize;
    int32_t mVectors; // of queries
    float mScaleLog2; // scores are multiplied by it once: a product fused into the subtraction of the largest would differ
    float* mQueries;               // (headSize, mVectors * kLANES)
    float* mAcc;                   // (headSize, mVectors * kLANES)
    float* mWeights;               // (kMAX_KEYS, mVectors * kLANES): scores, then weights
    float* mValues;                // (kMAX_KEYS, columns)
    Vector mRowMax[kMAX_VECTORS];  // largest score so far
    Vector mRowSum[kMAX_VECTORS];  // of the weights
    Vector mTileMax[kMAX_VECTORS]; // largest score of the keys that are being added
    Vector mFactor[kMAX_VECTORS];  // by which the sums so far are multiplied
};

} // namespace lfx::cpu::LFX_CPU_SET
