// The lfx ops on the host, in float64 over float32 tensors, by the tiles and masks of band.h: what the kernels compute,
// without a GPU. For tests: they compare it with the dense definition in Python.
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

// Online softmax of one query: keys come one after the other.
struct Row
{
    explicit Row(int32_t headSize)
        : sum(headSize, 0.0)
    {
    }

    void add(float const* query, float const* key, float const* value, double scale)
    {
        double score = 0.0;
        for (size_t i = 0; i < sum.size(); ++i)
        {
            score += static_cast<double>(query[i]) * key[i];
        }
        score *= scale;
        double const highest = score > peak ? score : peak;
        double const keep = std::exp(peak - highest);
        double const weight = std::exp(score - highest);
        for (size_t i = 0; i < sum.size(); ++i)
        {
            sum[i] = sum[i] * keep + weight * value[i];
        }
        total = total * keep + weight;
        peak = highest;
    }

    void write(float* out) const
    {
        for (size_t i = 0; i < sum.size(); ++i)
        {
            out[i] = total > 0.0 ? static_cast<float>(sum[i] / total) : 0.0F;
        }
    }

    std::vector<double> sum;
    double peak = -std::numeric_limits<double>::infinity();
    double total = 0.0;
};

// What stands at each position of a batch row: -1 padding, 0 a local token, g + 1 the token of global slot g.
std::vector<int32_t> slotsOf(int32_t const* mask, int32_t const* index, int32_t seqlen, int32_t slots)
{
    std::vector<int32_t> found(seqlen);
    for (int32_t i = 0; i < seqlen; ++i)
    {
        found[i] = mask[i] != 0 ? 0 : -1;
    }
    for (int32_t g = 0; g < slots; ++g)
    {
        if (isUsed(index[g], seqlen))
        {
            found[index[g]] = g + 1;
        }
    }
    return found;
}

void bandedRow(BandedParams const& p, int32_t b, std::vector<int32_t> const& slots)
{
    size_t const width = static_cast<size_t>(p.numHeads) * p.headSize;
    size_t const start = static_cast<size_t>(b) * p.seqlen * width;
    float const* const query = static_cast<float const*>(p.query) + start;
    float const* const key = static_cast<float const*>(p.key) + start;
    float const* const value = static_cast<float const*>(p.value) + start;
    float const* const rows = static_cast<float const*>(p.globalContext) + static_cast<size_t>(b) * p.slots * width;
    float* const context = static_cast<float*>(p.context) + start;
    int32_t const* const index = p.globalIndex + static_cast<size_t>(b) * p.slots;
    int32_t const window = smaller(p.window, p.seqlen);
    for (int32_t lane = 0; lane < p.dilation; ++lane)
    {
        int32_t const length = laneLength(p.seqlen, p.dilation, lane);
        for (int32_t first = 0; first < length; first += kTILE_QUERIES)
        {
            Range const keys = keysOfTile(first, kTILE_QUERIES, window, p.causal != 0, length);
            for (int32_t q = first; q < smaller(first + kTILE_QUERIES, length); ++q)
            {
                int32_t const at = positionOf(q, p.dilation, lane);
                for (int32_t h = 0; h < p.numHeads; ++h)
                {
                    size_t const head = static_cast<size_t>(h) * p.headSize;
                    float* const out = context + at * width + head;
                    Row row(p.headSize);
                    for (int32_t g = 0; slots[at] == 0 && g < p.slots; ++g)
                    {
                        if (isUsed(index[g], p.seqlen))
                        {
                            size_t const k = index[g] * width + head;
                            row.add(query + at * width + head, key + k, value + k, p.scale);
                        }
                    }
                    for (int32_t k = keys.begin; slots[at] == 0 && k < keys.end; ++k)
                    {
                        int32_t const from = positionOf(k, p.dilation, lane);
                        if (slots[from] == 0 && inBand(q, k, window, p.causal != 0))
                        {
                            size_t const offset = from * width + head;
                            row.add(query + at * width + head, key + offset, value + offset, p.scale);
                        }
                    }
                    row.write(out);
                    for (int32_t i = 0; slots[at] > 0 && i < p.headSize; ++i)
                    {
                        out[i] = rows[(slots[at] - 1) * width + head + i];
                    }
                }
            }
        }
    }
}

} // namespace
} // namespace lfx

// Both return nullptr, or the reason why the parameters are refused; only float32 is taken.
LFX_EXPORT char const* lfxBandedAttentionReference(lfx::BandedParams const* p) noexcept
{
    if (char const* reason = lfx::whyNot(*p))
    {
        return reason;
    }
    for (int32_t b = 0; b < p->batch; ++b)
    {
        lfx::bandedRow(*p, b,
            lfx::slotsOf(p->keyMask + static_cast<size_t>(b) * p->seqlen,
                p->globalIndex + static_cast<size_t>(b) * p->slots, p->seqlen, p->slots));
    }
    return nullptr;
}

LFX_EXPORT char const* lfxGlobalAttentionReference(lfx::GlobalParams const* p) noexcept
{
    if (char const* reason = lfx::whyNot(*p))
    {
        return reason;
    }
    size_t const width = static_cast<size_t>(p->numHeads) * p->headSize;
    for (int32_t b = 0; b < p->batch; ++b)
    {
        size_t const start = static_cast<size_t>(b) * p->seqlen;
        for (int32_t g = 0; g < p->queries; ++g)
        {
            for (int32_t h = 0; h < p->numHeads; ++h)
            {
                size_t const head = static_cast<size_t>(h) * p->headSize;
                size_t const at = (static_cast<size_t>(b) * p->queries + g) * width + head;
                lfx::Row row(p->headSize);
                for (int32_t k = 0; k < p->seqlen; ++k)
                {
                    if (p->keyMask[start + k] != 0)
                    {
                        size_t const from = (start + k) * width + head;
                        row.add(static_cast<float const*>(p->query) + at, static_cast<float const*>(p->key) + from,
                            static_cast<float const*>(p->value) + from, p->scale);
                    }
                }
                row.write(static_cast<float*>(p->context) + at);
            }
        }
    }
    return nullptr;
}
