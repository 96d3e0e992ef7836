// The kernels of both ops for one instruction set; vector.h says what the including file defines.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace lfx::cpu::LFX_CPU_SET
{
namespace
{

// A head's rows of batch element `batch` in a tensor (B, rows, ·).
LFX_INLINE Rows rowsOf(void const* tensor, int64_t stride, int32_t batch, int32_t rows, int32_t column)
{
    return {static_cast<float const*>(tensor) + batch * (rows * stride) + column, stride};
}

// Keys that are collected until there are enough for Tile::add().
class KeyQueue
{
public:
    KeyQueue(Tile& tile, Rows const& keyRows, Rows const& valueRows)
        : mTile(tile)
        , mKeyRows(keyRows)
        , mValueRows(valueRows)
    {
    }

    LFX_INLINE void push(Key const& key)
    {
        mKeys[mCount++] = key;
        if (mCount == kMAX_KEYS)
        {
            flush();
        }
    }

    void flush()
    {
        if (mCount > 0)
        {
            mTile.add(mKeys, mCount, mKeyRows, mValueRows);
            mCount = 0;
        }
    }

private:
    Tile& mTile;
    Rows mKeyRows;
    Rows mValueRows;
    int32_t mCount = 0;
    Key mKeys[kMAX_KEYS];
};

// A tile of queries of BandedAttention.
struct BandedTile
{
    BandedParams const& params;
    int32_t batch;
    int32_t head;
    int32_t subsequence;
    int32_t firstQuery;
    int32_t numQueries;
    int32_t length; // of the subsequence
    int32_t const* rowContent;
    int32_t const* globalPositions;
    int32_t numGlobal;

    LFX_INLINE int32_t position(int32_t index) const
    {
        return positionOf(index, params.dilation, subsequence);
    }

    LFX_INLINE int32_t content(int32_t query) const
    {
        return rowContent[position(firstQuery + query)];
    }

    LFX_INLINE int32_t column() const
    {
        return head * params.headSize;
    }

    LFX_INLINE float* contextRow(int32_t query) const
    {
        int64_t const row = static_cast<int64_t>(batch) * params.seqlen + position(firstQuery + query);
        return static_cast<float*>(params.context) + row * params.contextStride + column();
    }

    bool hasLocalRow() const
    {
        for (int32_t query = 0; query < numQueries; ++query)
        {
            if (content(query) == kLOCAL_ROW)
            {
                return true;
            }
        }
        return false;
    }

    void setQueries(Tile& tile) const
    {
        Rows const rows = rowsOf(params.query, params.queryStride, batch, params.seqlen, column());
        tile.setQueries([&](int32_t query) -> float const* {
            bool const isLocal = query < numQueries && content(query) == kLOCAL_ROW;
            return isLocal ? rows.row(position(firstQuery + query)) : nullptr;
        });
    }

    // Adds the global tokens, and then the keys of the band that are neither padding nor global.
    void addKeys(Tile& tile) const
    {
        KeyQueue queue(tile, rowsOf(params.key, params.keyStride, batch, params.seqlen, column()),
            rowsOf(params.value, params.valueStride, batch, params.seqlen, column()));
        for (int32_t i = 0; i < numGlobal; ++i)
        {
            queue.push({globalPositions[i], 0, kTILE_QUERIES});
        }
        int32_t const window = min(params.window, params.seqlen);
        int32_t const before = params.causal != 0 ? 0 : window;
        Range const band = keysOfTile(firstQuery, numQueries, window, params.causal != 0, length);
        for (int32_t key = band.begin; key < band.end; ++key)
        {
            int32_t const keyPosition = position(key);
            if (rowContent[keyPosition] == kLOCAL_ROW)
            {
                queue.push({keyPosition, key - before - firstQuery, key + window + 1 - firstQuery});
            }
        }
        queue.flush();
    }

    void writeGivenRow(int32_t query, int32_t rowContent) const
    {
        float* const row = contextRow(query);
        if (rowContent == kZERO_ROW)
        {
            __builtin_memset(row, 0, params.headSize * sizeof(float));
            return;
        }
        int64_t const width = static_cast<int64_t>(params.numHeads) * params.headSize;
        int64_t const given = static_cast<int64_t>(batch) * params.slots + (rowContent - kGLOBAL_ROW);
        float const* const from = static_cast<float const*>(params.globalContext) + given * width + column();
        __builtin_memcpy(row, from, params.headSize * sizeof(float));
    }

    // `tile` is nullptr if no row is local.
    void write(Tile const* tile) const
    {
        for (int32_t query = 0; query < numQueries; ++query)
        {
            int32_t const rowContent = content(query);
            if (rowContent == kLOCAL_ROW)
            {
                tile->write(query, contextRow(query));
            }
            else
            {
                writeGivenRow(query, rowContent);
            }
            if (params.logSumExp != nullptr)
            {
                int64_t const row = static_cast<int64_t>(batch) * params.numHeads + head;
                float const value = rowContent == kLOCAL_ROW ? tile->logSumExp(query) : kNEG_INF;
                params.logSumExp[row * params.seqlen + position(firstQuery + query)] = value;
            }
        }
    }
};

void bandedTile(BandedCall const& call, size_t task)
{
    BandedParams const& p = call.params;
    size_t const tiles = call.tiles();
    int32_t const firstQuery = static_cast<int32_t>(task % tiles) * kTILE_QUERIES;
    int32_t const subsequence = static_cast<int32_t>(task / tiles % p.dilation);
    size_t const batchHead = task / tiles / p.dilation;
    int32_t const batch = static_cast<int32_t>(batchHead / p.numHeads);
    int32_t const length = subsequenceLength(p.seqlen, p.dilation, subsequence);
    if (firstQuery >= length)
    {
        return;
    }
    BandedTile const work{p, batch, static_cast<int32_t>(batchHead % p.numHeads), subsequence, firstQuery,
        min(kTILE_QUERIES, length - firstQuery), length, call.rowContent + static_cast<int64_t>(batch) * p.seqlen,
        call.globalPositions + static_cast<int64_t>(batch) * p.slots, call.numGlobal[batch]};
    if (!work.hasLocalRow())
    {
        work.write(nullptr);
        return;
    }
    Scratch<kTILE_QUERIES, kMAX_BANDED_HEAD_SIZE> scratch;
    Tile tile(scratch, work.numQueries, p.headSize, p.scale);
    work.setQueries(tile);
    work.addKeys(tile);
    work.write(&tile);
}

// A tile of queries of GlobalAttention over a part of the keys.
struct GlobalTile
{
    GlobalCall const& call;
    int32_t batch;
    int32_t head;
    int32_t firstQuery;
    int32_t numQueries;
    int32_t part;

    template <int32_t kQUERIES, int32_t kHEAD_SIZE>
    void run() const
    {
        GlobalParams const& p = call.params;
        int32_t const column = head * p.headSize;
        Scratch<kQUERIES, kHEAD_SIZE> scratch;
        Tile tile(scratch, numQueries, p.headSize, p.scale);
        Rows const queries = rowsOf(p.query, p.queryStride, batch, p.queries, column);
        tile.setQueries([&](int32_t query) -> float const* {
            return query < numQueries ? queries.row(firstQuery + query) : nullptr;
        });
        KeyQueue queue(tile, rowsOf(p.key, p.keyStride, batch, p.seqlen, column),
            rowsOf(p.value, p.valueStride, batch, p.seqlen, column));
        int32_t const* const mask = p.keyMask + static_cast<int64_t>(batch) * p.seqlen;
        int32_t const partKeys = GlobalCall::partKeys(p);
        int32_t const firstKey = part * partKeys;
        int32_t const endKey = min(partKeys, p.seqlen - firstKey) + firstKey;
        for (int32_t key = firstKey; key < endKey; ++key)
        {
            if (mask[key] != 0)
            {
                queue.push({key, 0, kQUERIES});
            }
        }
        queue.flush();
        write(tile, column);
    }

    void write(Tile const& tile, int32_t column) const
    {
        GlobalParams const& p = call.params;
        size_t const firstRow = (static_cast<size_t>(batch) * p.numHeads + head) * p.queries + firstQuery;
        for (int32_t query = 0; query < numQueries; ++query)
        {
            if (call.partial != nullptr)
            {
                tile.writePartial(query, call.partialRow(part, firstRow + query));
                continue;
            }
            int64_t const row = static_cast<int64_t>(batch) * p.queries + firstQuery + query;
            tile.write(query, static_cast<float*>(p.context) + row * p.contextStride + column);
            if (p.logSumExp != nullptr)
            {
                p.logSumExp[firstRow + query] = tile.logSumExp(query);
            }
        }
    }
};

void globalTile(GlobalCall const& call, size_t task)
{
    GlobalParams const& p = call.params;
    size_t const parts = GlobalCall::parts(p);
    size_t const tiles = GlobalCall::tiles(p);
    int32_t const tileQueries = GlobalCall::tileQueries(p);
    int32_t const firstQuery = static_cast<int32_t>(task / parts % tiles) * tileQueries;
    size_t const batchHead = task / parts / tiles;
    GlobalTile const work{call, static_cast<int32_t>(batchHead / p.numHeads),
        static_cast<int32_t>(batchHead % p.numHeads), firstQuery, min(tileQueries, p.queries - firstQuery),
        static_cast<int32_t>(task % parts)};
    if (p.headSize <= kMAX_BANDED_HEAD_SIZE)
    {
        work.run<kTILE_QUERIES, kMAX_BANDED_HEAD_SIZE>();
    }
    else
    {
        work.run<kWIDE_TILE_QUERIES, kMAX_GLOBAL_HEAD_SIZE>();
    }
}

LFX_INLINE float exp2OfOne(float x)
{
    return exp2(broadcast(x))[0];
}

void combineParts(GlobalCall const& call, size_t row)
{
    GlobalParams const& p = call.params;
    int32_t const parts = GlobalCall::parts(p);
    float rowMax = kNEG_INF;
    for (int32_t part = 0; part < parts; ++part)
    {
        float const partMax = call.partialRow(part, row)[p.headSize];
        rowMax = partMax > rowMax ? partMax : rowMax;
    }
    float const offset = rowMax == kNEG_INF ? 0.0F : rowMax;
    size_t const batchHead = row / p.queries;
    int64_t const query = static_cast<int64_t>(batchHead / p.numHeads) * p.queries + row % p.queries;
    float* const context = static_cast<float*>(p.context) + query * p.contextStride
        + static_cast<int64_t>(batchHead % p.numHeads) * p.headSize;
    __builtin_memset(context, 0, p.headSize * sizeof(float));
    float rowSum = 0.0F;
    for (int32_t part = 0; part < parts; ++part)
    {
        float const* const partial = call.partialRow(part, row);
        float const weight = exp2OfOne(partial[p.headSize] - offset);
        rowSum += weight * partial[p.headSize + 1];
        for (int32_t d = 0; d < p.headSize; ++d)
        {
            context[d] += weight * partial[d];
        }
    }
    float const inverse = rowSum == 0.0F ? 0.0F : 1.0F / rowSum; // NaN stays NaN
    for (int32_t d = 0; d < p.headSize; ++d)
    {
        context[d] *= inverse;
    }
    if (p.logSumExp != nullptr)
    {
        p.logSumExp[row] = rowSum == 0.0F ? kNEG_INF : __builtin_logf(rowSum) + rowMax * kLN2;
    }
}

void exp2Of(float const* from, float* to, size_t count)
{
    for (size_t i = 0; i < count; i += kLANES)
    {
        store(to + i, exp2(load(from + i)));
    }
}

} // namespace

Kernels const kKERNELS{bandedTile, globalTile, combineParts, exp2Of};

} // namespace lfx::cpu::LFX_CPU_SET
