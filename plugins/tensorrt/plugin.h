// The TensorRT plugin of an op: it implements TensorRT's plugin interface and launches the kernels.
#pragma once

#include "op_traits.h"
#include "tensorrt/attributes.h"
#include "tensorrt/inputs.h"
#include "tensorrt/logger.h"

#include <NvInfer.h>

#include <exception>
#include <string>
#include <vector>

namespace lfx
{

inline constexpr char const* kPLUGIN_NAMESPACE = "lfx";
inline constexpr char const* kPLUGIN_VERSION = "1";

// `Op` is BandedOp or GlobalOp. Methods return kSUCCESS or, after they logged the error, kFAILURE.
template <typename Op>
class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime
{
public:
    using Attributes = typename Op::Attributes;
    using Shapes = typename Op::Shapes;
    using Params = typename Op::Params;

    explicit AttentionPlugin(Attributes const& attributes)
        : mAttributes(attributes)
    {
    }

    AttentionPlugin(AttentionPlugin const& other)
        : AttentionPlugin(other.mAttributes)
    {
    }

    AttentionPlugin& operator=(AttentionPlugin const&) = delete;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        try
        {
            return new AttentionPlugin(*this);
        }
        catch (std::exception const& error)
        {
            logError(Op::kNAME, error.what());
            return nullptr;
        }
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return Op::kNAME;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPLUGIN_VERSION;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPLUGIN_NAMESPACE;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override
    {
        if (!hasTensors(nbInputs, nbOutputs))
        {
            return kFAILURE;
        }
        outputTypes[0] = inputTypes[Op::kQUERY];
        return kSUCCESS;
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder&) noexcept override
    {
        if (!hasTensors(nbInputs, nbOutputs))
        {
            return kFAILURE;
        }
        outputs[0] = inputs[Op::kQUERY];
        return kSUCCESS;
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override
    {
        if (!hasTensors(nbInputs, nbOutputs))
        {
            return false;
        }
        nvinfer1::PluginTensorDesc const& tensor = inOut[pos].desc;
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR)
        {
            return false;
        }
        if (pos < Op::kNUM_INPUTS && Op::kINPUTS[pos].isInteger)
        {
            return tensor.type == nvinfer1::DataType::kINT32;
        }
        Type type;
        return toType(tensor.type, type) && tensor.type == inOut[Op::kQUERY].desc.type;
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        return hasTensors(nbInputs, nbOutputs) ? check(maxShapes(in), in[Op::kQUERY].desc.type) : kFAILURE;
    }

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const*,
        int32_t nbOutputs) noexcept override
    {
        return hasTensors(nbInputs, nbOutputs) ? check(shapes(in), in[Op::kQUERY].type) : kFAILURE;
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t,
        nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        // The type does not matter: partial results are float32.
        Params params;
        Op::setSizes(params, mAttributes, maxShapes(inputs), Type::kFLOAT);
        return Op::workspaceBytes(params);
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        Type type = Type::kFLOAT;
        toType(inputDesc[Op::kQUERY].type, type);
        Params params;
        Op::setSizes(params, mAttributes, shapes(inputDesc), type);
        Op::setTensors(params, inputs, outputs[0]);
        Op::setWorkspace(params, workspace);
        int32_t const error = Op::launch(params, stream);
        if (error != 0)
        {
            logError(Op::kNAME, "the kernel was not launched: CUDA error " + std::to_string(error));
        }
        return error;
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override
    {
        // Before any capture of a CUDA graph. On a device that cannot load the kernels, the launch reports the error.
        static_cast<void>(Op::preload());
        return clone();
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        mFields.clear();
        for (AttributeField const& field : fieldsOf(mAttributes))
        {
            mFields.emplace_back(field.name, field.value, field.type, 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    static constexpr int32_t kSUCCESS = 0;
    static constexpr int32_t kFAILURE = -1;

    bool hasTensors(int32_t nbInputs, int32_t nbOutputs) const noexcept
    {
        if (nbInputs == Op::kNUM_INPUTS && nbOutputs == 1)
        {
            return true;
        }
        logError(Op::kNAME,
            std::to_string(nbInputs) + " inputs and " + std::to_string(nbOutputs) + " outputs were given; it has "
                + std::to_string(Op::kNUM_INPUTS) + " inputs and 1 output");
        return false;
    }

    static Shapes shapes(nvinfer1::PluginTensorDesc const* inputs) noexcept
    {
        Shapes result;
        for (int32_t i = 0; i < Op::kNUM_INPUTS; ++i)
        {
            result[i] = toShape(inputs[i].dims);
        }
        return result;
    }

    // The largest shapes of the optimization profile.
    static Shapes maxShapes(nvinfer1::DynamicPluginTensorDesc const* inputs) noexcept
    {
        Shapes result;
        for (int32_t i = 0; i < Op::kNUM_INPUTS; ++i)
        {
            result[i] = toShape(inputs[i].max);
        }
        return result;
    }

    // Logs the reason if the kernels do not support the inputs.
    int32_t check(Shapes const& shapes, nvinfer1::DataType dataType) const noexcept
    {
        try
        {
            Type type;
            Params params;
            std::string const reason = toType(dataType, type)
                ? setCheckedSizes<Op>(params, mAttributes, shapes, type, Target::kCUDA)
                : "the type must be float32, float16 or bfloat16";
            if (reason.empty())
            {
                return kSUCCESS;
            }
            logError(Op::kNAME, reason);
        }
        catch (std::exception const& error)
        {
            logError(Op::kNAME, error.what());
        }
        return kFAILURE;
    }

    Attributes mAttributes;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace lfx
