// Compares the CPU kernels with the host reference on random problems; compiled with sanitizers. Every tensor has memory of
// its own size, and the elements that must not be read are NaN. Exit status 0: all agree.
#include "cpu/cpu_attention.h"
#include "cpu/threads.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

LFX_EXPORT char const* lfxBandedAttentionReference(lfx::BandedParams const* params) noexcept;
LFX_EXPORT char const* lfxGlobalAttentionReference(lfx::GlobalParams const* params) noexcept;

namespace
{

using lfx::cpu::InstructionSet;

std::mt19937 random_(1);
constexpr float kNAN = std::numeric_limits<float>::quiet_NaN();

int32_t draw(int32_t low, int32_t high)
{
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
}

std::vector<float> normal(size_t count)
{
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (float& value : values)
    {
        value = distribution(random_);
    }
    return values;
}

std::vector<int32_t> mask(size_t count)
{
    int32_t const realOfTen = draw(0, 10);
    std::vector<int32_t> values(count);
    for (int32_t& value : values)
    {
        value = draw(1, 10) <= realOfTen ? 1 : 0;
    }
    return values;
}

// Largest difference; infinite where only one of them is NaN, or where an infinite value differs.
float difference(std::vector<float> const& a, std::vector<float> const& b)
{
    float largest = 0.0F;
    for (size_t i = 0; i < a.size(); ++i)
    {
        float const error = a[i] == b[i] ? 0.0F : std::fabs(a[i] - b[i]);
        largest = error <= largest ? largest : std::isnan(error) ? std::numeric_limits<float>::infinity() : error;
    }
    return largest;
}

// Runs `compute` on each instruction set with one and three threads; returns whether the results are the reference's, and
// bitwise equal for any number of threads.
template <typename Params, typename Compute>
bool agrees(Params params, char const* (*reference)(Params const*), Compute compute, size_t contextSize, size_t rows)
{
    std::vector<float> expected(contextSize, kNAN);
    std::vector<float> expectedSums(rows, kNAN);
    params.context = expected.data();
    params.logSumExp = expectedSums.data();
    char const* reason = reference(&params);
    for (InstructionSet set : {InstructionSet::kBASELINE, InstructionSet::kAVX2, InstructionSet::kAVX512})
    {
        if (!isSupported(set))
        {
            continue;
        }
        std::vector<float> previous;
        for (int32_t count : {1, 3})
        {
            std::vector<float> context(contextSize, kNAN);
            std::vector<float> sums(rows, kNAN);
            params.context = context.data();
            params.logSumExp = sums.data();
            lfx::cpu::Threads threads{count};
            reason = reason != nullptr ? reason : compute(params, threads.pool(), set);
            float const error = difference(context, expected);
            float const sumError = difference(sums, expectedSums);
            bool const same = previous.empty() || difference(previous, context) == 0.0F;
            previous = context;
            if (reason != nullptr || error > 1e-4F || sumError > 1e-4F || !same)
            {
                std::printf("set %d, %d threads: %s, error %g, log-sum-exp %g%s\n", static_cast<int>(set), count,
                    reason != nullptr ? reason : "", error, sumError, same ? "" : ", other bits");
                return false;
            }
        }
    }
    return true;
}

bool bandedAgrees()
{
    lfx::BandedParams p;
    p.batch = draw(1, 3);
    p.seqlen = draw(1, 300);
    p.slots = draw(1, 70);
    p.numHeads = draw(1, 3);
    p.headSize = 8 * draw(1, 16);
    p.window = draw(0, 1) == 0 ? draw(0, 300) : draw(0, 20);
    p.dilation = draw(0, 1) == 0 ? 1 : draw(1, 5);
    p.causal = draw(0, 1);
    p.scale = 1.0F / std::sqrt(static_cast<float>(p.headSize));
    lfx::setContiguous(p);
    int64_t const width = p.queryStride;
    p.keyStride = p.valueStride = width + draw(0, 9);
    size_t const tokens = static_cast<size_t>(p.batch) * p.seqlen;
    std::vector<float> query = normal(tokens * width);
    std::vector<float> key = normal((tokens - 1) * p.keyStride + width);
    std::vector<float> value = normal((tokens - 1) * p.valueStride + width);
    std::vector<float> const globalContext = normal(static_cast<size_t>(p.batch) * p.slots * width);
    std::vector<int32_t> const keyMask = mask(tokens);
    std::vector<int32_t> globalIndex(static_cast<size_t>(p.batch) * p.slots, -1);
    std::vector<bool> isGlobal(tokens, false);
    for (size_t i = 0; i < globalIndex.size(); ++i)
    {
        int32_t const position = draw(-1, p.seqlen); // the last one is outside
        size_t const token = i / p.slots * p.seqlen + position;
        if (position >= 0 && position < p.seqlen && !isGlobal[token])
        {
            globalIndex[i] = position;
            isGlobal[token] = true;
        }
    }
    for (size_t token = 0; token < tokens; ++token)
    {
        for (int64_t i = 0; keyMask[token] == 0 && !isGlobal[token] && i < width; ++i)
        {
            query[token * p.queryStride + i] = key[token * p.keyStride + i] = value[token * p.valueStride + i] = kNAN;
        }
    }
    p.query = query.data();
    p.key = key.data();
    p.value = value.data();
    p.keyMask = keyMask.data();
    p.globalIndex = globalIndex.data();
    p.globalContext = globalContext.data();
    return agrees(p, lfxBandedAttentionReference, lfx::cpu::runBandedAttention, tokens * width, tokens * p.numHeads);
}

bool globalAgrees()
{
    lfx::GlobalParams p;
    p.batch = draw(1, 3);
    p.seqlen = draw(1, 1300);
    p.queries = draw(1, 40);
    p.numHeads = draw(1, 2);
    p.headSize = 8 * (draw(0, 1) == 0 ? draw(1, 16) : draw(1, 128));
    p.scale = 1.0F / std::sqrt(static_cast<float>(p.headSize));
    lfx::setContiguous(p);
    size_t const tokens = static_cast<size_t>(p.batch) * p.seqlen;
    size_t const rows = static_cast<size_t>(p.batch) * p.queries;
    std::vector<float> const query = normal(rows * p.queryStride);
    std::vector<float> key = normal(tokens * p.keyStride);
    std::vector<int32_t> const keyMask = mask(tokens);
    for (size_t i = 0; i < key.size(); ++i)
    {
        key[i] = keyMask[i / p.keyStride] != 0 ? key[i] : kNAN;
    }
    p.query = query.data();
    p.key = p.value = key.data();
    p.keyMask = keyMask.data();
    return agrees(p, lfxGlobalAttentionReference, lfx::cpu::runGlobalAttention, query.size(), rows * p.numHeads);
}

} // namespace

int main()
{
    for (int32_t i = 0; i < 25; ++i)
    {
        if (!bandedAgrees() || !globalAgrees())
        {
            std::printf("problem %d failed\n", i);
            return 1;
        }
    }
    return 0;
}
