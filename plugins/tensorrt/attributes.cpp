#include "tensorrt/attributes.h"

#include <cmath>
#include <cstring>

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

namespace lfx
{
namespace
{

std::string copyFields(PluginFieldCollection const* collection, std::vector<AttributeField> const& attributes)
{
    for (int32_t i = 0; collection != nullptr && i < collection->nbFields; ++i)
    {
        PluginField const& field = collection->fields[i];
        for (AttributeField const& attribute : attributes)
        {
            if (std::strcmp(field.name, attribute.name) != 0)
            {
                continue;
            }
            if (field.type != attribute.type || field.data == nullptr || field.length != 1)
            {
                return std::string(attribute.name) + " must be one "
                    + (attribute.type == PluginFieldType::kINT32 ? "32-bit integer" : "32-bit float");
            }
            std::memcpy(attribute.value, field.data, 4);
        }
    }
    return "";
}

template <typename Number>
std::string outOfRange(char const* name, Number value, char const* range)
{
    return std::string(name) + " " + std::to_string(value) + " is out of range; it must be " + range;
}

std::string rangeError(GlobalAttributes const& attributes)
{
    if (attributes.numHeads < 1 || attributes.numHeads > 1024)
    {
        return outOfRange("num_heads", attributes.numHeads, "1 to 1024");
    }
    if (!std::isfinite(attributes.scale) || attributes.scale < 0.0F)
    {
        return outOfRange("scale", attributes.scale, "above 0, or 0 for 1/sqrt(head size)");
    }
    return "";
}

std::string rangeError(BandedAttributes const& attributes)
{
    std::string const error = rangeError(static_cast<GlobalAttributes const&>(attributes));
    if (!error.empty())
    {
        return error;
    }
    if (attributes.window < 0)
    {
        return outOfRange("window", attributes.window, "0 or more");
    }
    if (attributes.dilation < 1)
    {
        return outOfRange("dilation", attributes.dilation, "1 or more");
    }
    if (attributes.causal != 0 && attributes.causal != 1)
    {
        return outOfRange("causal", attributes.causal, "0 or 1");
    }
    return "";
}

template <typename Attributes>
std::string readAndCheck(PluginFieldCollection const* collection, Attributes& attributes)
{
    std::string const error = copyFields(collection, fieldsOf(attributes));
    return error.empty() ? rangeError(attributes) : error;
}

} // namespace

std::vector<AttributeField> fieldsOf(GlobalAttributes& attributes)
{
    return {
        {"num_heads", PluginFieldType::kINT32, &attributes.numHeads},
        {"scale", PluginFieldType::kFLOAT32, &attributes.scale},
    };
}

std::vector<AttributeField> fieldsOf(BandedAttributes& attributes)
{
    return {
        {"num_heads", PluginFieldType::kINT32, &attributes.numHeads},
        {"window", PluginFieldType::kINT32, &attributes.window},
        {"dilation", PluginFieldType::kINT32, &attributes.dilation},
        {"causal", PluginFieldType::kINT32, &attributes.causal},
        {"scale", PluginFieldType::kFLOAT32, &attributes.scale},
    };
}

std::string readAttributes(PluginFieldCollection const* collection, GlobalAttributes& attributes)
{
    return readAndCheck(collection, attributes);
}

std::string readAttributes(PluginFieldCollection const* collection, BandedAttributes& attributes)
{
    return readAndCheck(collection, attributes);
}

} // namespace lfx
