// The differences of the two ops for ONNX Runtime: name, inputs, attributes, shapes, and the run of the kernels.
#pragma once

#include "attention.h"
#include "cpu/cpu_attention.h"

#include <array>
#include <cstdint>
#include <string>

namespace lfx::ort
{

struct InputTraits
{
    char const* name;
    int32_t numAxes;
    bool isInteger; // int32; the others are float32
};

// The sizes of a tensor; -1 while one is not known.
struct Shape
{
    int32_t numAxes = 0;
    std::array<int64_t, 3> sizes{};
};

// Attributes of both ops. GlobalAttention has num_heads and scale only.
struct Attributes
{
    int64_t numHeads = 0;
    int64_t window = 0;
    int64_t dilation = 1;
    int64_t causal = 0;
    float scale = 0.0F; // 0 stands for 1/sqrt(head size)
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

    using Params = GlobalParams;
    using Shapes = std::array<Shape, kNUM_INPUTS>;

    // Whether the shapes of an op with query width H·D fit together.
    static bool shapesAgree(Shapes const& shapes);
    static void setSizes(Params& params, Attributes const& attributes, Shapes const& shapes);
    static void setTensors(Params& params, void const* const* inputs, void* context);
    static char const* run(Params const& params, cpu::ThreadPool const& threads, cpu::InstructionSet set);
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

    using Params = BandedParams;
    using Shapes = std::array<Shape, kNUM_INPUTS>;

    static bool shapesAgree(Shapes const& shapes);
    static void setSizes(Params& params, Attributes const& attributes, Shapes const& shapes);
    static void setTensors(Params& params, void const* const* inputs, void* context);
    static char const* run(Params const& params, cpu::ThreadPool const& threads, cpu::InstructionSet set);
};

// Sets the sizes and attributes of `params`; returns why the kernels do not support them, or an empty string. Sizes that
// are not known yet are taken to be supported.
template <typename Op>
std::string setSizes(typename Op::Params& params, Attributes const& attributes, typename Op::Shapes const& shapes);

} // namespace lfx::ort
