// The attributes of the ONNX nodes, as TensorRT passes and stores them: a collection of named fields.
#pragma once

#include "op_traits.h"

#include <NvInfer.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lfx
{

struct AttributeField
{
    char const* name;
    nvinfer1::PluginFieldType type; // kINT32 or kFLOAT32
    void* value;                    // in the struct of attributes
};

std::vector<AttributeField> fieldsOf(GlobalAttributes& attributes);
std::vector<AttributeField> fieldsOf(BandedAttributes& attributes);

// Copies the fields that have an attribute's name. Returns the error of a field, or an empty string.
std::string readAttributes(nvinfer1::PluginFieldCollection const* collection, GlobalAttributes& attributes);
std::string readAttributes(nvinfer1::PluginFieldCollection const* collection, BandedAttributes& attributes);

} // namespace lfx
