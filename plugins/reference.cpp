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
        , mWidth(static_cast<size_t>(params.numHeads) * params.headSize)
        , mGlobalIndex(params.globalIndex + static_cast<size_t>(batch) * params.slots)
        , mGlobalContext(
              static_cast<float const*>(params.globalContext) + static_cast<size_t>(batch) * params.slots * mWidth)
    {
        size_t const firstToken = static_cast<size_t>(batch) * params.seqlen;
        mQuery = static_cast<float const*>(params.query) + firstToken * mWidth;
        mKey = static_cast<float const*>(params.key) + firstToken * mWidth;
        mValue = static_cast<float const*>(params.value) + firstToken * mWidth;
        mContext = static_cast<float*>(params.context) + firstToken * mWidth;
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
            float* const context = mContext + position * mWidth + column;
            if (token >= kGLOBAL)
            {
                float const* const given = mGlobalContext + (token - kGLOBAL) * mWidth + column;
                for (int32_t i = 0; i < mParams.headSize; ++i)
                {
                    context[i] = given[i];
                }
                continue;
            }
            QueryAttention row(mQuery + position * mWidth + column, mParams.headSize, mParams.scale);
            for (int32_t slot = 0; token == kLOCAL && slot < mParams.slots; ++slot)
            {
                if (isUsedSlot(mGlobalIndex[slot], mParams.seqlen))
                {
                    size_t const offset = mGlobalIndex[slot] * mWidth + column;
                    row.add(mKey + offset, mValue + offset);
                }
            }
            for (size_t i = 0; token == kLOCAL && i < bandKeys.size(); ++i)
            {
                size_t const offset = bandKeys[i] * mWidth + column;
                row.add(mKey + offset, mValue + offset);
            }
            row.write(context);
        }
    }

    BandedParams const& mParams;
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
    size_t const width = static_cast<size_t>(params.numHeads) * params.headSize;
    size_t const column = static_cast<size_t>(head) * params.headSize;
    size_t const firstToken = static_cast<size_t>(batch) * params.seqlen;
    size_t const target = (static_cast<size_t>(batch) * params.queries + query) * width + column;
    QueryAttention row(static_cast<float const*>(params.query) + target, params.headSize, params.scale);
    for (int32_t key = 0; key < params.seqlen; ++key)
    {
        if (params.keyMask[firstToken + key] != 0)
        {
            size_t const source = (firstToken + key) * width + column;
            row.add(static_cast<float const*>(params.key) + source, static_cast<float const*>(params.value) + source);
        }
    }
    row.write(static_cast<float*>(params.context) + target);
}

} // namespace
} // namespace lfx

// Both return nullptr, or the reason why the parameters are not supported. They compute float32 tensors only.
LFX_EXPORT char const* lfxBandedAttentionReference(lfx::BandedParams const* params) noexcept
{
    if (char const* reason = lfx::unsupportedReason(*params))
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
    if (char const* reason = lfx::unsupportedReason(*params))
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
