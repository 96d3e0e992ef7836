// Checks of the inputs that TensorRT passes: their types and shapes.
#pragma once

#include "tensorrt/ops.h"

#include <NvInfer.h>

#include <string>

namespace lfx
{

// Returns whether the kernels support the type.
inline bool toType(nvinfer1::DataType dataType, Type& type)
{
    switch (dataType)
    {
    case nvinfer1::DataType::kFLOAT: type = Type::kFLOAT; return true;
    case nvinfer1::DataType::kHALF: type = Type::kHALF; return true;
    case nvinfer1::DataType::kBF16: type = Type::kBF16; return true;
    default: return false;
    }
}

inline std::string toString(nvinfer1::Dims const& shape)
{
    std::string text = "(";
    for (int32_t i = 0; i < shape.nbDims; ++i)
    {
        text += (i > 0 ? ", " : "") + std::to_string(shape.d[i]);
    }
    return text + ")";
}

template <typename Op>
std::string allShapes(typename Op::Shapes const& shapes)
{
    std::string text;
    for (int32_t i = 0; i < Op::kNUM_INPUTS; ++i)
    {
        text += (i > 0 ? ", " : "") + std::string(Op::kINPUTS[i].name) + " " + toString(shapes[i]);
    }
    return text;
}

// Returns the reason why the kernels do not support the inputs, or an empty string if they do.
template <typename Op>
std::string inputError(
    typename Op::Attributes const& attributes, typename Op::Shapes const& shapes, nvinfer1::DataType dataType)
{
    for (int32_t i = 0; i < Op::kNUM_INPUTS; ++i)
    {
        if (shapes[i].nbDims != Op::kINPUTS[i].numAxes)
        {
            return std::string(Op::kINPUTS[i].name) + " has shape " + toString(shapes[i]) + "; it must have "
                + std::to_string(Op::kINPUTS[i].numAxes) + " axes";
        }
    }
    nvinfer1::Dims const& query = shapes[Op::kQUERY];
    int64_t const width = query.d[2];
    if (width < 1 || width % attributes.numHeads != 0)
    {
        return "query has width " + std::to_string(width) + "; it must be a multiple of num_heads "
            + std::to_string(attributes.numHeads);
    }
    if (!Op::shapesAgree(shapes))
    {
        return "the shapes do not fit together: " + allShapes<Op>(shapes);
    }
    Type type;
    if (!toType(dataType, type))
    {
        return "the type must be float32, float16 or bfloat16";
    }
    char const* const reason = unsupportedReason(Op::sizes(attributes, shapes, type));
    return reason != nullptr ? std::string(reason) + "; query has shape " + toString(query) : "";
}

} // namespace lfx
