// The types and shapes that TensorRT passes, as those of attention.h and op_traits.h.
#pragma once

#include "op_traits.h"

#include <NvInfer.h>

#include <algorithm>

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

inline Shape toShape(nvinfer1::Dims const& dims)
{
    Shape shape;
    shape.numAxes = dims.nbDims;
    std::copy_n(dims.d, std::clamp(dims.nbDims, 0, Shape::kMAX_AXES), shape.sizes.begin());
    return shape;
}

} // namespace lfx
