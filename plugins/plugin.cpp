// The TensorRT plugins lfx::BandedAttention and lfx::GlobalAttention: what TensorRT asks, answered from the ONNX node's
// attributes, and the kernels called. One class for both ops, since they differ in inputs and launch only.
#include "attention.h"

#include <NvInfer.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace lfx
{
namespace
{

constexpr char const* kNAMESPACE = "lfx";
constexpr char const* kVERSION = "1";
constexpr int32_t kFAILED = -1;

nvinfer1::ILoggerFinder* gLoggerFinder = nullptr;

enum class Op
{
    kBANDED,
    kGLOBAL,
};

char const* nameOf(Op op)
{
    return op == Op::kBANDED ? "BandedAttention" : "GlobalAttention";
}

void logError(Op op, std::string const& message) noexcept
{
    nvinfer1::ILogger* const logger = gLoggerFinder != nullptr ? gLoggerFinder->findLogger() : nullptr;
    std::string const line = std::string("lfx::") + nameOf(op) + ": " + message;
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

// The attributes of the ONNX nodes; GlobalAttention has the first and the last.
struct Attributes
{
    int32_t numHeads = 0; // required
    int32_t window = -1;  // required
    int32_t dilation = 1;
    int32_t causal = 0;
    float scale = 0.0F;   // 0 stands for 1/√D
};

struct AttributeName
{
    char const* name;
    PluginFieldType type;
    bool bandedOnly;
};

constexpr std::array<AttributeName, 5> kATTRIBUTES{{
    {"num_heads", PluginFieldType::kINT32, false},
    {"window", PluginFieldType::kINT32, true},
    {"dilation", PluginFieldType::kINT32, true},
    {"causal", PluginFieldType::kINT32, true},
    {"scale", PluginFieldType::kFLOAT32, false},
}};

// Where the attribute `name` is kept; an int32_t, or a float for scale.
void* placeOf(Attributes& attributes, char const* name)
{
    std::string const wanted(name);
    return wanted == "num_heads" ? static_cast<void*>(&attributes.numHeads)
        : wanted == "window"     ? &attributes.window
        : wanted == "dilation"   ? &attributes.dilation
        : wanted == "causal"     ? &attributes.causal
                                 : static_cast<void*>(&attributes.scale);
}

std::vector<PluginField> fieldsOf(Op op, Attributes* values)
{
    std::vector<PluginField> fields;
    for (AttributeName const& attribute : kATTRIBUTES)
    {
        if (op == Op::kBANDED || !attribute.bandedOnly)
        {
            void const* const value = values != nullptr ? placeOf(*values, attribute.name) : nullptr;
            fields.emplace_back(attribute.name, value, attribute.type, values != nullptr ? 1 : 0);
        }
    }
    return fields;
}

// An empty string, or what is wrong.
std::string readAttributes(Op op, PluginFieldCollection const* collection, Attributes& attributes)
{
    for (int32_t i = 0; collection != nullptr && i < collection->nbFields; ++i)
    {
        PluginField const& field = collection->fields[i];
        for (AttributeName const& known : kATTRIBUTES)
        {
            if (std::strcmp(field.name, known.name) != 0 || (known.bandedOnly && op != Op::kBANDED))
            {
                continue;
            }
            if (field.type != known.type || field.data == nullptr || field.length != 1)
            {
                return std::string(known.name) + " must be one "
                    + (known.type == PluginFieldType::kINT32 ? "32-bit integer" : "32-bit float");
            }
            std::memcpy(placeOf(attributes, known.name), field.data, 4);
        }
    }
    if (attributes.numHeads < 1 || attributes.numHeads > 1024)
    {
        return "num_heads " + std::to_string(attributes.numHeads) + " is out of range; it must be 1 to 1024";
    }
    if (op == Op::kBANDED && attributes.window < 0)
    {
        return "window " + std::to_string(attributes.window) + " is out of range; it must be 0 or more";
    }
    if (attributes.dilation < 1)
    {
        return "dilation " + std::to_string(attributes.dilation) + " is out of range; it must be 1 or more";
    }
    if (attributes.causal != 0 && attributes.causal != 1)
    {
        return "causal " + std::to_string(attributes.causal) + " is out of range; it must be 0 or 1";
    }
    if (!std::isfinite(attributes.scale) || attributes.scale < 0.0F)
    {
        return "scale " + std::to_string(attributes.scale)
            + " is out of range; it must be above 0, or 0 for 1/sqrt(head size)";
    }
    return "";
}

bool toType(DataType type, Type& found)
{
    switch (type)
    {
    case DataType::kFLOAT: found = Type::kFLOAT; return true;
    case DataType::kHALF: found = Type::kHALF; return true;
    case DataType::kBF16: found = Type::kBF16; return true;
    default: return false;
    }
}

std::string text(Dims const& dims)
{
    std::string found = "(";
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        found += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    }
    return found + ")";
}

class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime
{
public:
    AttentionPlugin(Op op, Attributes const& attributes)
        : mOp(op)
        , mAttributes(attributes)
    {
    }

    AttentionPlugin(AttentionPlugin const& other)
        : AttentionPlugin(other.mOp, other.mAttributes)
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
            logError(mOp, error.what());
            return nullptr;
        }
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return nameOf(mOp);
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

    int32_t getOutputDataTypes(
        DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept override
    {
        if (nbInputs != numInputs() || nbOutputs != 1)
        {
            return wrongCount(nbInputs);
        }
        outputTypes[0] = inputTypes[0];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t nbOutputs, nvinfer1::IExprBuilder&) noexcept override
    {
        if (nbInputs != numInputs() || nbOutputs != 1)
        {
            return wrongCount(nbInputs);
        }
        outputs[0] = inputs[0];
        return 0;
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        if (nbInputs != numInputs() || nbOutputs != 1)
        {
            wrongCount(nbInputs);
            return false;
        }
        PluginTensorDesc const& tensor = inOut[pos].desc;
        bool const isInteger = pos == 3 || (mOp == Op::kBANDED && pos == 4);
        Type type;
        bool const fits = isInteger ? tensor.type == DataType::kINT32
                                    : toType(tensor.type, type) && tensor.type == inOut[0].desc.type;
        return fits && tensor.format == nvinfer1::TensorFormat::kLINEAR;
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t nbOutputs) noexcept override
    {
        if (nbInputs != numInputs() || nbOutputs != 1)
        {
            return wrongCount(nbInputs);
        }
        std::vector<Dims> largest;
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            largest.push_back(in[i].max);
        }
        return check(largest.data(), in[0].desc.type);
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs)
        noexcept override
    {
        if (nbInputs != numInputs() || nbOutputs != 1)
        {
            return wrongCount(nbInputs);
        }
        std::vector<Dims> dims;
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            dims.push_back(in[i].dims);
        }
        return check(dims.data(), in[0].type);
    }

    size_t getWorkspaceSize(
        DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        if (mOp == Op::kBANDED)
        {
            return 0;
        }
        Dims const& query = inputs[0].max;
        return globalWorkspaceBytes(static_cast<int32_t>(query.d[0]), static_cast<int32_t>(query.d[1]),
            mAttributes.numHeads, static_cast<int32_t>(query.d[2]) / mAttributes.numHeads);
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        Type type = Type::kFLOAT;
        toType(inputDesc[0].type, type);
        int32_t const error = mOp == Op::kBANDED
            ? launchBandedAttention(
                banded(inputDesc[0].dims, inputDesc[4].dims, type, inputs, outputs[0]), stream)
            : launchGlobalAttention(
                global(inputDesc[0].dims, inputDesc[1].dims, type, inputs, outputs[0], workspace), stream);
        if (error != 0)
        {
            logError(mOp, "the kernel was not launched: CUDA error " + std::to_string(error));
        }
        return error;
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        mFields = fieldsOf(mOp, &mAttributes);
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    int32_t numInputs() const
    {
        return mOp == Op::kBANDED ? 6 : 4;
    }

    int32_t wrongCount(int32_t nbInputs) const noexcept
    {
        logError(mOp,
            std::to_string(nbInputs) + " inputs came; it takes " + std::to_string(numInputs()) + ", and gives one output");
        return kFAILED;
    }

    int32_t headSize(Dims const& dims) const
    {
        return static_cast<int32_t>(dims.d[2]) / mAttributes.numHeads;
    }

    float scale(Dims const& dims) const
    {
        return mAttributes.scale != 0.0F ? mAttributes.scale : 1.0F / std::sqrt(static_cast<float>(headSize(dims)));
    }

    BandedParams banded(
        Dims const& query, Dims const& index, Type type, void const* const* inputs, void* output) const
    {
        BandedParams params{};
        if (inputs != nullptr)
        {
            params.query = inputs[0];
            params.key = inputs[1];
            params.value = inputs[2];
            params.keyMask = static_cast<int32_t const*>(inputs[3]);
            params.globalIndex = static_cast<int32_t const*>(inputs[4]);
            params.globalContext = inputs[5];
        }
        params.context = output;
        params.batch = static_cast<int32_t>(query.d[0]);
        params.seqlen = static_cast<int32_t>(query.d[1]);
        params.slots = static_cast<int32_t>(index.d[1]);
        params.numHeads = mAttributes.numHeads;
        params.headSize = headSize(query);
        params.window = mAttributes.window;
        params.dilation = mAttributes.dilation;
        params.causal = mAttributes.causal;
        params.scale = scale(query);
        params.type = type;
        return params;
    }

    GlobalParams global(Dims const& query, Dims const& key, Type type, void const* const* inputs, void* output,
        void* workspace) const
    {
        GlobalParams params{};
        if (inputs != nullptr)
        {
            params.query = inputs[0];
            params.key = inputs[1];
            params.value = inputs[2];
            params.keyMask = static_cast<int32_t const*>(inputs[3]);
        }
        params.context = output;
        params.workspace = static_cast<float*>(workspace);
        params.batch = static_cast<int32_t>(query.d[0]);
        params.seqlen = static_cast<int32_t>(key.d[1]);
        params.queries = static_cast<int32_t>(query.d[1]);
        params.numHeads = mAttributes.numHeads;
        params.headSize = headSize(query);
        params.scale = scale(query);
        params.type = type;
        return params;
    }

    // Whether the kernels take these shapes; reports the reason why not.
    int32_t check(Dims const* dims, DataType dataType) const noexcept
    {
        try
        {
            std::string const reason = whyNotShapes(dims, dataType);
            if (!reason.empty())
            {
                logError(mOp, reason);
                return kFAILED;
            }
            return 0;
        }
        catch (std::exception const& error)
        {
            logError(mOp, error.what());
            return kFAILED;
        }
    }

    std::string whyNotShapes(Dims const* dims, DataType dataType) const
    {
        static constexpr std::array<char const*, 6> kINPUTS{
            "query", "key", "value", "key_mask", "global_index", "global_context"};
        for (int32_t i = 0; i < numInputs(); ++i)
        {
            int32_t const axes = i == 3 || i == 4 ? 2 : 3;
            if (dims[i].nbDims != axes)
            {
                return std::string(kINPUTS[i]) + " has shape " + text(dims[i]) + "; it must have " + std::to_string(axes)
                    + " axes";
            }
        }
        Dims const& query = dims[0];
        Dims const& key = dims[1];
        int64_t const width = query.d[2];
        if (width < 1 || width % mAttributes.numHeads != 0)
        {
            return "query has width " + std::to_string(width) + "; it must be a multiple of num_heads "
                + std::to_string(mAttributes.numHeads);
        }
        bool agree = key.d[0] == query.d[0] && key.d[2] == width && dims[3].d[0] == key.d[0] && dims[3].d[1] == key.d[1];
        for (int32_t i = 0; i < 3; ++i)
        {
            agree = agree && dims[2].d[i] == key.d[i];
        }
        if (mOp == Op::kBANDED)
        {
            agree = agree && key.d[1] == query.d[1] && dims[4].d[0] == query.d[0] && dims[5].d[0] == query.d[0]
                && dims[5].d[1] == dims[4].d[1] && dims[5].d[2] == width;
        }
        if (!agree)
        {
            std::string all;
            for (int32_t i = 0; i < numInputs(); ++i)
            {
                all += (i > 0 ? ", " : "") + std::string(kINPUTS[i]) + " " + text(dims[i]);
            }
            return "the shapes do not fit together: " + all;
        }
        Type type;
        if (!toType(dataType, type))
        {
            return "the type must be float32, float16 or bfloat16";
        }
        char const* const reason = mOp == Op::kBANDED
            ? whyNot(banded(query, dims[4], type, nullptr, nullptr))
            : whyNot(global(query, key, type, nullptr, nullptr, nullptr));
        return reason != nullptr ? std::string(reason) + "; query has shape " + text(query) : "";
    }

    Op mOp;
    Attributes mAttributes;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit AttentionCreator(Op op)
        : mOp(op)
        , mFields(fieldsOf(op, nullptr))
        , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
    {
    }

    nvinfer1::IPluginV3* createPlugin(
        nvinfer1::AsciiChar const*, PluginFieldCollection const* fc, nvinfer1::TensorRTPhase) noexcept override
    {
        try
        {
            Attributes attributes;
            std::string const reason = readAttributes(mOp, fc, attributes);
            if (!reason.empty())
            {
                logError(mOp, reason);
                return nullptr;
            }
            return new AttentionPlugin(mOp, attributes);
        }
        catch (std::exception const& error)
        {
            logError(mOp, error.what());
            return nullptr;
        }
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return nameOf(mOp);
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

private:
    Op mOp;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection;
};

} // namespace
} // namespace lfx

// What IPluginRegistry::loadLibrary looks for.
LFX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    lfx::gLoggerFinder = finder;
}

LFX_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static lfx::AttentionCreator banded(lfx::Op::kBANDED);
    static lfx::AttentionCreator global(lfx::Op::kGLOBAL);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&banded, &global};
    nbCreators = 2;
    return creators;
}
