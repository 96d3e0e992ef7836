// The differences of the two ops for the plugin: name, attributes, inputs, shapes, and the launch of the kernels.
#pragma once

#include "attention.h"
#include "tensorrt/attributes.h"

#include <NvInfer.h>

#include <array>

namespace lfx
{

struct InputTraits
{
    char const* name;
    int32_t numAxes;
    bool isInteger; // int32; the others are of the type of the query
};

struct GlobalOp
{
    static constexpr char const* kNAME = "GlobalAttention";

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
    using Shapes = std::array<nvinfer1::Dims, kNUM_INPUTS>;

    // Whether the shapes of an op with query width H·D fit together.
    static bool shapesAgree(Shapes const& shapes);
    static Params sizes(Attributes const& attributes, Shapes const& shapes, Type type);
    static void setTensors(Params& params, void const* const* inputs, void* context, void* workspace);
    static size_t workspaceBytes(Params const& maxSizes);
    static int32_t preload();
    static int32_t launch(Params const& params, cudaStream_t stream);
};

struct BandedOp
{
    static constexpr char const* kNAME = "BandedAttention";

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
    using Shapes = std::array<nvinfer1::Dims, kNUM_INPUTS>;

    static bool shapesAgree(Shapes const& shapes);
    static Params sizes(Attributes const& attributes, Shapes const& shapes, Type type);
    static void setTensors(Params& params, void const* const* inputs, void* context, void* workspace);
    static size_t workspaceBytes(Params const& maxSizes);
    static int32_t preload();
    static int32_t launch(Params const& params, cudaStream_t stream);
};

} // namespace lfx
