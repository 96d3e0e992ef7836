// A TensorRT that has a plugin registry and nothing else, with the virtual table of the headers it is compiled with.
#include <NvInfer.h>

#include <cstring>
#include <vector>

#ifndef VERSION
#define VERSION (10000 * NV_TENSORRT_MAJOR + 100 * NV_TENSORRT_MINOR)
#endif

using namespace nvinfer1;

namespace
{

class Registry final : public IPluginRegistry
{
public:
    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* pluginNamespace) noexcept override
    {
        bool const isLfx = std::strcmp(pluginNamespace, "lfx") == 0;
        mCreators.push_back(static_cast<IPluginCreatorV3One*>(&creator));
        return isLfx;
    }

    IPluginCreatorInterface* getCreator(
        AsciiChar const* name, AsciiChar const* version, AsciiChar const* pluginNamespace) noexcept override
    {
        for (IPluginCreatorV3One* creator : mCreators)
        {
            if (std::strcmp(creator->getPluginName(), name) == 0 && std::strcmp(version, "1") == 0
                && std::strcmp(pluginNamespace, "lfx") == 0)
            {
                return creator;
            }
        }
        return nullptr;
    }

    std::vector<IPluginCreatorV3One*> mCreators;

#if NV_TENSORRT_MAJOR == 10
    bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept override
    {
        return false;
    }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override
    {
        return nullptr;
    }
    IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override
    {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override
    {
        return false;
    }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override
    {
    }
    IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }
    bool isParentSearchEnabled() const override
    {
        return false;
    }
    void setParentSearchEnabled(bool) override
    {
    }
    PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override
    {
        return nullptr;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override
    {
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override
    {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override
    {
        return false;
    }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override
    {
        return nullptr;
    }
    int32_t releasePluginResource(AsciiChar const*) noexcept override
    {
        return 0;
    }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override
    {
        return nullptr;
    }
};

Registry gRegistry;

} // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept
{
    return &gRegistry;
}

extern "C" int32_t getInferLibVersion() noexcept
{
    return VERSION;
}

extern "C" int32_t numCreators()
{
    return static_cast<int32_t>(gRegistry.mCreators.size());
}

extern "C" char const* creatorName(int32_t index)
{
    return gRegistry.mCreators[index]->getPluginName();
}
