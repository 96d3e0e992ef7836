// The lfx ops on the host, in float64 over float32 tensors, with the tiles and masks of band.h: it computes what the
// kernels compute. For tests, which compare it with the dense definition in Python.
#include "attention.h"
#include "band.h"

#include <cmath>
#include <limits>
#include <vector>

namespace lfx
{
namespace
{

constexpr int32_t kTILE_QUERIES = 64;

// The attention of one query of one head, with online softmax: keys are added one after another.
class QueryAttention
{
public:
    QueryAttention(float const* query, int32_t headSize, double scale)
        : mQuery(query)
        , mScale(scale)
        , mAcc(headSize, 0.0)
    {
    }

    void add(float const* key, float const* value)
    {
        double score = 0.0;
        for (size_t i = 0; i < mAcc.size(); ++i)
        {
            score += static_cast<double>(mQuery[i]) * key[i];
        }
        score *= mScale;
        double const newMax = score > mRowMax ? score : mRowMax;
        double const factor = std::exp(mRowMax - newMax);
        double const weight = std::exp(score - newMax);
        for (size_t i = 0; i < mAcc.size(); ++i)
        {
            mAcc[i] = mAcc[i] * factor + weight * value[i];
        }
        mRowSum = mRowSum * factor + weight;
        mRowMax = newMax;
    }

    // Logarithm of the sum of the exponentials of the scores; -inf if no key was added.
    double logSumExp() const
    {
        return std::log(mRowSum) + mRowMax;
    }

    // Zeros if no key was added.
    void write(float* context) const
    {
        for (size_t i = 0; i < mAcc.size(); ++i)
        {
            context[i] = mRowSum > 0.0 ? static_cast<float>(mAcc[i] / mRowSum) : 0.0F;
        }
    }

private:
    float const* mQuery;
    double mScale;
    std::vector<double> mAcc;
    double mRowMax = -std::numeric_limits<double>::infinity();
    double mRowSum = 0.0;
};

// BandedAttention of one batch element.
class BandedReference
{
public:
    BandedReference(BandedParams const& params, int32_t batch)
        : mParams(params)
        , mBatch(batch)
        , mWidth(static_cast<size_t>(params.numHeads) * params.headSize)
        , mGlobalIndex(params.globalIndex + static_cast<size_t>(batch) * params.slots)
        , mGlobalContext(
              static_cast<float const*>(params.globalContext) + static_cast<size_t>(batch) * params.slots * mWidth)
    {
        size_t const firstToken = static_cast<size_t>(batch) * params.seqlen;
        mQuery = static_cast<float const*>(params.query) + firstToken * params.queryStride;
        mKey = static_cast<float const*>(params.key) + firstToken * params.keyStride;
        mValue = static_cast<float const*>(params.value) + firstToken * params.valueStride;
        mContext = static_cast<float*>(params.context) + firstToken * params.contextStride;
        for (int32_t i = 0; i < params.seqlen; ++i)
        {
            mTokens.push_back(params.keyMask[firstToken + i] != 0 ? kLOCAL : kPADDING);
        }
        for (int32_t slot = 0; slot < params.slots; ++slot)
        {
            if (isUsedSlot(mGlobalIndex[slot], params.seqlen))
            {
                mTokens[mGlobalIndex[slot]] = kGLOBAL + slot;
            }
        }
    }

    void run() const
    {
        int32_t const window = min(mParams.window, mParams.seqlen);
        bool const causal = mParams.causal != 0;
        for (int32_t subsequence = 0; subsequence < mParams.dilation; ++subsequence)
        {
            int32_t const length = subsequenceLength(mParams.seqlen, mParams.dilation, subsequence);
            for (int32_t query = 0; query < length; ++query)
            {
                int32_t const firstQuery = query / kTILE_QUERIES * kTILE_QUERIES;
                Range const tile = keysOfTile(firstQuery, kTILE_QUERIES, window, causal, length);
                std::vector<int32_t> keys;
                for (int32_t key = tile.begin; key < tile.end; ++key)
                {
                    int32_t const position = positionOf(key, mParams.dilation, subsequence);
                    if (mTokens[position] == kLOCAL && inBand(query, key, window, causal))
                    {
                        keys.push_back(position);
                    }
                }
                writeRow(positionOf(query, mParams.dilation, subsequence), keys);
            }
        }
    }

private:
    // Type of a token; the token of global slot g has kGLOBAL + g.
    static constexpr int32_t kPADDING = -1;
    static constexpr int32_t kLOCAL = 0;
    static constexpr int32_t kGLOBAL = 1;

    // `bandKeys`: positions of the local keys that the token attends.
    void writeRow(int32_t position, std::vector<int32_t> const& bandKeys) const
    {
        int32_t const token = mTokens[position];
        for (int32_t head = 0; head < mParams.numHeads; ++head)
        {
            size_t const column = static_cast<size_t>(head) * mParams.headSize;
            float* const context = mContext + position * mParams.contextStride + column;
            double logSumExp = -std::numeric_limits<double>::infinity();
            if (token >= kGLOBAL)
            {
                float const* const given = mGlobalContext + (token - kGLOBAL) * mWidth + column;
                for (int32_t i = 0; i < mParams.headSize; ++i)
                {
                    context[i] = given[i];
                }
            }
            else
            {
                QueryAttention row(mQuery + position * mParams.queryStride + column, mParams.headSize, mParams.scale);
                if (token == kLOCAL)
                {
                    addKeys(row, column, bandKeys);
                }
                row.write(context);
                logSumExp = row.logSumExp();
            }
            if (mParams.logSumExp != nullptr)
            {
                size_t const row = static_cast<size_t>(mBatch) * mParams.numHeads + head;
                mParams.logSumExp[row * mParams.seqlen + position] = static_cast<float>(logSumExp);
            }
        }
    }

    // Adds the global tokens and the keys of the band to a row.
    void addKeys(QueryAttention& row, size_t column, std::vector<int32_t> const& bandKeys) const
    {
        for (int32_t slot = 0; slot < mParams.slots; ++slot)
        {
            if (isUsedSlot(mGlobalIndex[slot], mParams.seqlen))
            {
                addKey(row, column, mGlobalIndex[slot]);
            }
        }
        for (int32_t key : bandKeys)
        {
            addKey(row, column, key);
        }
    }

    void addKey(QueryAttention& row, size_t column, int32_t position) const
    {
        row.add(mKey + position * mParams.keyStride + column, mValue + position * mParams.valueStride + column);
    }

    BandedParams const& mParams;
    int32_t mBatch;
    size_t mWidth; // of a row: H·D
    int32_t const* mGlobalIndex;
    float const* mGlobalContext;
    float const* mQuery;
    float const* mKey;
    float const* mValue;
    float* mContext;
    std::vector<int32_t> mTokens;
};

// GlobalAttention of one query of one head.
void globalRow(GlobalParams const& params, int32_t batch, int32_t query, int32_t head)
{
    size_t const column = static_cast<size_t>(head) * params.headSize;
    size_t const firstToken = static_cast<size_t>(batch) * params.seqlen;
    size_t const target = static_cast<size_t>(batch) * params.queries + query;
    QueryAttention row(
        static_cast<float const*>(params.query) + target * params.queryStride + column, params.headSize, params.scale);
    for (int32_t key = 0; key < params.seqlen; ++key)
    {
        size_t const token = firstToken + key;
        if (params.keyMask[token] != 0)
        {
            row.add(static_cast<float const*>(params.key) + token * params.keyStride + column,
                static_cast<float const*>(params.value) + token * params.valueStride + column);
        }
    }
    row.write(static_cast<float*>(params.context) + target * params.contextStride + column);
    if (params.logSumExp != nullptr)
    {
        size_t const batchHead = static_cast<size_t>(batch) * params.numHeads + head;
        params.logSumExp[batchHead * params.queries + query] = static_cast<float>(row.logSumExp());
    }
}

} // namespace
} // namespace lfx

// Both return nullptr, or the reason why the parameters are not supported. They compute float32 tensors only.
LFX_EXPORT char const* lfxBandedAttentionReference(lfx::BandedParams const* params) noexcept
{
    if (char const* reason = lfx::unsupportedReason(*params, lfx::Target::kCUDA))
    {
        return reason;
    }
    if (char const* reason = lfx::inaccessibleReason(*params, alignof(float)))
    {
        return reason;
    }
    for (int32_t batch = 0; batch < params->batch; ++batch)
    {
        lfx::BandedReference(*params, batch).run();
    }
    return nullptr;
}

LFX_EXPORT char const* lfxGlobalAttentionReference(lfx::GlobalParams const* params) noexcept
{
    if (char const* reason = lfx::unsupportedReason(*params, lfx::Target::kCUDA))
    {
        return reason;
    }
    if (char const* reason = lfx::inaccessibleReason(*params, alignof(float)))
    {
        return reason;
    }
    for (int32_t batch = 0; batch < params->batch; ++batch)
    {
        for (int32_t query = 0; query < params->queries; ++query)
        {
            for (int32_t head = 0; head < params->numHeads; ++head)
            {
                lfx::globalRow(*params, batch, query, head);
            }
        }
    }
    return nullptr;
}
