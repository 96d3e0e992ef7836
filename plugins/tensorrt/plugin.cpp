// The creators of the plugins lfx::BandedAttention and lfx::GlobalAttention, and the functions by which TensorRT finds them.
#include "tensorrt/plugin.h"

#include "attention.h"
#include "op_traits.h"
#include "tensorrt/logger.h"

#include <NvInfer.h>

#include <exception>
#include <string>
#include <vector>

using nvinfer1::AsciiChar;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;

namespace lfx
{
namespace
{

template <typename Op>
class AttentionCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    AttentionCreator()
    {
        typename Op::Attributes attributes;
        for (AttributeField const& field : fieldsOf(attributes))
        {
            mFields.emplace_back(field.name, nullptr, field.type, 0); // names and types, no values
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    nvinfer1::IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const* fc, nvinfer1::TensorRTPhase) noexcept override
    {
        try
        {
            typename Op::Attributes attributes;
            std::string const error = readAttributes(fc, attributes);
            if (error.empty())
            {
                return new AttentionPlugin<Op>(attributes);
            }
            logError(Op::kNAME, error);
        }
        catch (std::exception const& error)
        {
            logError(Op::kNAME, error.what());
        }
        return nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return Op::kNAME;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPLUGIN_VERSION;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPLUGIN_NAMESPACE;
    }

private:
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

} // namespace
} // namespace lfx

// The two functions that IPluginRegistry::loadLibrary() looks up.
LFX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    lfx::setLogger(finder);
}

LFX_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static lfx::AttentionCreator<lfx::BandedOp> banded;
    static lfx::AttentionCreator<lfx::GlobalOp> global;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&banded, &global};
    nbCreators = 2;
    return creators;
}
