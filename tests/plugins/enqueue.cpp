// Runs a plugin of the library as TensorRT does: from its creator, with the calls that TensorRT makes, in their order.
// Tests and the GPU check load it with ctypes. It needs TensorRT's headers, but not TensorRT.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <vector>

using namespace nvinfer1;

namespace
{

class StderrLogger final : public ILogger
{
    void log(Severity, char const* message) noexcept override
    {
        std::fprintf(stderr, "%s\n", message);
    }
};

class Finder final : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        return &mLogger;
    }

private:
    StderrLogger mLogger;
};

} // namespace

// dims: for each input and then the output, the number of axes and three sizes. Returns 0, or the step that failed.
extern "C" int32_t enqueueThroughCreator(char const* library, char const* op, int32_t const* integers, float scale,
    int32_t type, int32_t numInputs, int32_t const* dims, void const* const* inputs, void* output, void* workspace,
    size_t workspaceBytes, cudaStream_t stream)
{
    void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
    {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    static Finder finder;
    auto const setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
    auto const getCreators
        = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    if (setFinder == nullptr || getCreators == nullptr)
    {
        return 2;
    }
    setFinder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(creator->getPluginName(), op) != 0)
        {
            continue;
        }
        std::vector<PluginField> fields{
            {"num_heads", &integers[0], PluginFieldType::kINT32, 1}, {"scale", &scale, PluginFieldType::kFLOAT32, 1}};
        if (numInputs == 6)
        {
            fields.emplace_back("window", &integers[1], PluginFieldType::kINT32, 1);
            fields.emplace_back("dilation", &integers[2], PluginFieldType::kINT32, 1);
            fields.emplace_back("causal", &integers[3], PluginFieldType::kINT32, 1);
        }
        PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
        IPluginV3* const built = creator->createPlugin("built", &collection, TensorRTPhase::kBUILD);
        if (built == nullptr)
        {
            return 3;
        }
        std::vector<DynamicPluginTensorDesc> dynamic(numInputs + 1);
        std::vector<PluginTensorDesc> fixed(numInputs + 1);
        for (int32_t j = 0; j <= numInputs; ++j)
        {
            PluginTensorDesc& desc = fixed[j];
            desc.dims.nbDims = dims[4 * j];
            for (int32_t axis = 0; axis < desc.dims.nbDims; ++axis)
            {
                desc.dims.d[axis] = dims[4 * j + 1 + axis];
            }
            bool const isInteger = j == 3 || (numInputs == 6 && j == 4);
            desc.type = isInteger ? DataType::kINT32 : static_cast<DataType>(type);
            desc.format = TensorFormat::kLINEAR;
            desc.scale = 1.0F;
            dynamic[j].desc = desc;
            dynamic[j].min = dynamic[j].max = dynamic[j].opt = desc.dims;
        }
        auto* const build
            = static_cast<IPluginV3OneBuild*>(built->getCapabilityInterface(PluginCapabilityType::kBUILD));
        for (int32_t j = 0; j <= numInputs; ++j)
        {
            if (!build->supportsFormatCombination(j, dynamic.data(), numInputs, 1))
            {
                return 4;
            }
        }
        if (build->configurePlugin(dynamic.data(), numInputs, &dynamic[numInputs], 1) != 0)
        {
            return 5;
        }
        if (build->getWorkspaceSize(dynamic.data(), numInputs, &dynamic[numInputs], 1) > workspaceBytes)
        {
            return 6;
        }
        // The fields that are serialized at build time create the plugin that runs.
        auto* const runtime
            = static_cast<IPluginV3OneRuntime*>(built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        IPluginV3* const loaded
            = creator->createPlugin("loaded", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
        if (loaded == nullptr)
        {
            return 7;
        }
        auto* const core
            = static_cast<IPluginV3OneRuntime*>(loaded->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        IPluginV3* const attached = core->attachToContext(nullptr);
        auto* const running
            = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        int32_t error = running->onShapeChange(fixed.data(), numInputs, &fixed[numInputs], 1);
        if (error == 0)
        {
            void* outputs[] = {output};
            error = running->enqueue(fixed.data(), &fixed[numInputs], inputs, outputs, workspace, stream);
        }
        delete attached;
        delete loaded;
        delete built;
        return error == 0 ? 0 : 8;
    }
    return 9;
}
