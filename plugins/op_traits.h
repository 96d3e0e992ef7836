// The two ops as all hosts see them: name, inputs by name, attributes, shapes, and how these become the params of
// attention.h.
#pragma once

#include "attention.h"

#include <array>
#include <cstdint>
#include <string>

namespace lfx
{

struct InputTraits
{
    char const* name;
    int32_t numAxes;
    bool isInteger; // int32; the others are of the type of the query
};

// The sizes of a tensor; -1 while one is not known.
struct Shape
{
    static constexpr int32_t kMAX_AXES = 8;

    int32_t numAxes = 0;
    std::array<int64_t, kMAX_AXES> sizes{}; // zeros if there are more axes
};

struct GlobalAttributes
{
    int32_t numHeads = 0; // required
    float scale = 0.0F;   // 0 stands for 1/√D
};

struct BandedAttributes : GlobalAttributes
{
    int32_t window = -1; // required
    int32_t dilation = 1;
    int32_t causal = 0;
};

struct GlobalOp
{
    static constexpr char const* kNAME = "GlobalAttention";
    static constexpr bool kIS_BANDED = false;

    enum Input : int32_t
    {
        kQUERY,
        kKEY,
        kVALUE,
        kKEY_MASK,
        kNUM_INPUTS,
    };

    static constexpr std::array<InputTraits, kNUM_INPUTS> kINPUTS{{
        {"query", 3, false},
        {"key", 3, false},
        {"value", 3, false},
        {"key_mask", 2, true},
    }};

    using Attributes = GlobalAttributes;
    using Params = GlobalParams;
    using Shapes = std::array<Shape, kNUM_INPUTS>;

    // Whether the shapes of an op with query width H·D fit together.
    static bool shapesAgree(Shapes const& shapes);

    // Sets sizes, strides, attributes and the type; the sizes that are not known are those of a small problem.
    static void setSizes(Params& params, Attributes const& attributes, Shapes const& shapes, Type type);
    static void setTensors(Params& params, void const* const* inputs, void* context);

    static size_t workspaceBytes(Params const& sizes)
    {
        return globalWorkspaceBytes(sizes.batch, sizes.queries, sizes.numHeads, sizes.headSize);
    }

    static void setWorkspace(Params& params, void* workspace)
    {
        params.workspace = static_cast<float*>(workspace);
    }

    static int32_t preload()
    {
        return preloadGlobalAttention();
    }

    static int32_t launch(Params const& params, CUstream_st* stream)
    {
        return launchGlobalAttention(params, stream);
    }
};

struct BandedOp
{
    static constexpr char const* kNAME = "BandedAttention";
    static constexpr bool kIS_BANDED = true;

    enum Input : int32_t
    {
        kQUERY,
        kKEY,
        kVALUE,
        kKEY_MASK,
        kGLOBAL_INDEX,
        kGLOBAL_CONTEXT,
        kNUM_INPUTS,
    };

    static constexpr std::array<InputTraits, kNUM_INPUTS> kINPUTS{{
        {"query", 3, false},
        {"key", 3, false},
        {"value", 3, false},
        {"key_mask", 2, true},
        {"global_index", 2, true},
        {"global_context", 3, false},
    }};

    using Attributes = BandedAttributes;
    using Params = BandedParams;
    using Shapes = std::array<Shape, kNUM_INPUTS>;

    static bool shapesAgree(Shapes const& shapes);
    static void setSizes(Params& params, Attributes const& attributes, Shapes const& shapes, Type type);
    static void setTensors(Params& params, void const* const* inputs, void* context);

    static size_t workspaceBytes(Params const&)
    {
        return 0;
    }

    static void setWorkspace(Params&, void*)
    {
    }

    static int32_t preload()
    {
        return preloadBandedAttention();
    }

    static int32_t launch(Params const& params, CUstream_st* stream)
    {
        return launchBandedAttention(params, stream);
    }
};

// Op::setSizes() after its checks: returns why the kernels of a target do not support the inputs, or an empty string. Sizes that are not
// known yet are taken to be supported.
template <typename Op>
std::string setCheckedSizes(typename Op::Params& params, typename Op::Attributes const& attributes,
    typename Op::Shapes const& shapes, Type type, Target target);

} // namespace lfx
