// The functions that are compiled once per instruction set, and their arguments.
#pragma once

#include "attention.h"
#include "band.h"

#include <cstddef>
#include <cstdint>

namespace lfx::cpu
{

constexpr int32_t kTILE_QUERIES = 64;      // that a task computes, for heads of up to kMAX_BANDED_HEAD_SIZE
constexpr int32_t kWIDE_TILE_QUERIES = 16; // for larger heads

// Content of a row of the context: zeros, the result of attention, or slot g of global_context, as kGLOBAL_ROW + g.
constexpr int32_t kZERO_ROW = -1;
constexpr int32_t kLOCAL_ROW = 0;
constexpr int32_t kGLOBAL_ROW = 1;

// A call of BandedAttention. A task is a tile of queries of a head.
struct BandedCall
{
    BandedParams const& params;
    int32_t const* rowContent;      // (B, S)
    int32_t const* globalPositions; // (B, G), the used slots first
    int32_t const* numGlobal;       // (B), used slots

    // Tiles of the longest subsequence.
    LFX_HOST_DEVICE int32_t tiles() const
    {
        return ceilDiv(ceilDiv(params.seqlen, params.dilation), kTILE_QUERIES);
    }

    LFX_HOST_DEVICE size_t tasks() const
    {
        return static_cast<size_t>(params.batch) * params.numHeads * params.dilation * tiles();
    }
};

// A call of GlobalAttention. A task is a tile of queries of a head over a part of the keys. If there is more than one part,
// their results are partial, and a second set of tasks combines them, one for each query of each head.
//
// The size of the parts depends neither on the batch nor on the number of threads.
struct GlobalCall
{
    GlobalParams const& params;
    float* partial; // (parts, B, H, G, headSize + 2), or nullptr if there is one part

    LFX_HOST_DEVICE static int32_t tileQueries(GlobalParams const& p)
    {
        return p.headSize <= kMAX_BANDED_HEAD_SIZE ? kTILE_QUERIES : kWIDE_TILE_QUERIES;
    }

    LFX_HOST_DEVICE static int32_t tiles(GlobalParams const& p)
    {
        return ceilDiv(p.queries, tileQueries(p));
    }

    // Number of keys in each part but the last: all of them if there are enough tiles for many threads.
    LFX_HOST_DEVICE static int32_t partKeys(GlobalParams const& p)
    {
        constexpr int32_t kENOUGH_TILES = 16;
        constexpr int32_t kMIN_PART_KEYS = 512;
        constexpr int32_t kMAX_PARTS = 32;
        if (static_cast<int64_t>(tiles(p)) * p.numHeads >= kENOUGH_TILES)
        {
            return p.seqlen;
        }
        return kMIN_PART_KEYS * ceilDiv(ceilDiv(p.seqlen, kMIN_PART_KEYS), kMAX_PARTS);
    }

    LFX_HOST_DEVICE static int32_t parts(GlobalParams const& p)
    {
        return ceilDiv(p.seqlen, partKeys(p));
    }

    LFX_HOST_DEVICE static size_t rows(GlobalParams const& p)
    {
        return static_cast<size_t>(p.batch) * p.numHeads * p.queries;
    }

    LFX_HOST_DEVICE size_t tasks() const
    {
        return static_cast<size_t>(params.batch) * params.numHeads * tiles(params) * parts(params);
    }

    // The partial result of a row: headSize accumulated values, rowMax, rowSum.
    LFX_HOST_DEVICE float* partialRow(int32_t part, size_t row) const
    {
        return partial + (part * rows(params) + row) * (static_cast<size_t>(params.headSize) + 2);
    }
};

struct Kernels
{
    void (*bandedTile)(BandedCall const& call, size_t task);
    void (*globalTile)(GlobalCall const& call, size_t task);
    void (*combineParts)(GlobalCall const& call, size_t row);
    void (*exp2)(float const* from, float* to, size_t count); // for tests; count is a multiple of 16
};

namespace baseline
{
extern Kernels const kKERNELS;
}

#if defined(__x86_64__)
namespace avx2
{
extern Kernels const kKERNELS;
}

namespace avx512
{
extern Kernels const kKERNELS;
}
#endif

} // namespace lfx::cpu
