// Registers the plugins with the TensorRT of the process when the library is loaded by plain dlopen(), as Triton's
// TensorRT backend does. IPluginRegistry::loadLibrary() registers them itself. TensorRT is not linked: it is looked up.
#include "tensorrt/plugin.h"

#include "attention.h"
#include "op_traits.h"

#include <NvInfer.h>
#include <dlfcn.h>
#include <link.h>
#include <unwind.h>

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

using nvinfer1::AsciiChar;
using nvinfer1::IPluginCreatorInterface;

LFX_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);

namespace lfx
{

// Not in the anonymous namespace: the compiler would conclude that no class implements them.
//
// The virtual table of IPluginRegistry in TensorRT 11 and TensorRT-RTX 1.7, up to the last method that is called here.
class Registry11
{
public:
    virtual ~Registry11() = default;
    virtual void setErrorRecorder(void*) noexcept = 0;
    virtual void* getErrorRecorder() const noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool) = 0;
    virtual void* loadLibrary(AsciiChar const*) noexcept = 0;
    virtual void deregisterLibrary(void*) noexcept = 0;
    virtual bool registerCreator(IPluginCreatorInterface&, AsciiChar const*) noexcept = 0;
    virtual IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept = 0;
    virtual IPluginCreatorInterface* getCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept = 0;
};

// The one of TensorRT 10, with the methods for plugins before IPluginV3, which TensorRT 11 has removed.
class Registry10
{
public:
    virtual bool registerOldCreator(void*, AsciiChar const*) noexcept = 0;
    virtual void* getOldCreators(int32_t*) const noexcept = 0;
    virtual void* getOldCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept = 0;
    virtual ~Registry10() = default;
    virtual void setErrorRecorder(void*) noexcept = 0;
    virtual void* getErrorRecorder() const noexcept = 0;
    virtual bool deregisterOldCreator(void const*) noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool) = 0;
    virtual void* loadLibrary(AsciiChar const*) noexcept = 0;
    virtual void deregisterLibrary(void*) noexcept = 0;
    virtual bool registerCreator(IPluginCreatorInterface&, AsciiChar const*) noexcept = 0;
    virtual IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept = 0;
    virtual IPluginCreatorInterface* getCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept = 0;
};

namespace
{

struct TensorRt
{
    int32_t version; // of getInferLibVersion(): 10000 * major + 100 * minor + patch
    void* registry;
    void const* base; // where its library is mapped
};

void const* baseOf(void const* address)
{
    Dl_info info;
    return dladdr(address, &info) != 0 ? info.dli_fbase : nullptr;
}

// Every TensorRT that is loaded. dlsym(RTLD_DEFAULT) does not find one that was loaded with RTLD_LOCAL.
std::vector<TensorRt> loadedTensorRts()
{
    std::vector<std::string> names;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            static_cast<std::vector<std::string>*>(data)->emplace_back(info->dlpi_name);
            return 0;
        },
        &names);
    std::vector<TensorRt> result;
    for (std::string const& name : names)
    {
        void* const handle = dlopen(name.empty() ? nullptr : name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        if (handle == nullptr)
        {
            continue;
        }
        void* const version = dlsym(handle, "getInferLibVersion");
        void* const registry = dlsym(handle, "getPluginRegistry");
        bool isNew = version != nullptr && registry != nullptr;
        for (TensorRt const& other : result)
        {
            isNew = isNew && other.base != baseOf(registry); // a library that links TensorRT finds it too
        }
        if (isNew)
        {
            result.push_back({reinterpret_cast<int32_t (*)()>(version)(), reinterpret_cast<void* (*)()>(registry)(),
                baseOf(registry)});
        }
        dlclose(handle);
    }
    return result;
}

// Whether a function of the library that is mapped at `base` is among the callers: loadLibrary().
bool isCalledFrom(void const* base)
{
    struct Search
    {
        void const* base;
        bool isFound;
    } search{base, false};
    _Unwind_Backtrace(
        [](_Unwind_Context* context, void* data) {
            Search& searched = *static_cast<Search*>(data);
            searched.isFound = baseOf(reinterpret_cast<void const*>(_Unwind_GetIP(context))) == searched.base;
            return searched.isFound ? _URC_END_OF_STACK : _URC_NO_REASON;
        },
        &search);
    return search.isFound;
}

template <typename Registry>
void registerWith(Registry& registry)
{
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    for (char const* name : {BandedOp::kNAME, GlobalOp::kNAME})
    {
        if (registry.getCreator(name, kPLUGIN_VERSION, kPLUGIN_NAMESPACE) != nullptr)
        {
            return; // those of another copy of this library
        }
    }
    // The registry keeps pointers into this library, so it stays loaded.
    Dl_info self;
    if (dladdr(reinterpret_cast<void const*>(&getCreators), &self) == 0
        || dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE) == nullptr)
    {
        std::fprintf(stderr, "lfx: the plugins are not registered: %s\n", dlerror());
        return;
    }
    for (int32_t i = 0; i < count; ++i)
    {
        if (!registry.registerCreator(*creators[i], kPLUGIN_NAMESPACE))
        {
            std::fprintf(stderr, "lfx: TensorRT did not register a plugin\n");
        }
    }
}

__attribute__((constructor)) void registerOnLoad()
{
    try
    {
        for (TensorRt const& tensorRt : loadedTensorRts())
        {
            bool const isRtx = tensorRt.version >= 10700 && tensorRt.version < 20000;
            if (isCalledFrom(tensorRt.base))
            {
                continue;
            }
            if (isRtx || tensorRt.version / 10000 == 11)
            {
                registerWith(*static_cast<Registry11*>(tensorRt.registry));
            }
            else if (tensorRt.version / 10000 == 10)
            {
                registerWith(*static_cast<Registry10*>(tensorRt.registry));
            }
            else
            {
                std::fprintf(stderr,
                    "lfx: the plugins are not registered: TensorRT's version is %d, and 10, 11 and TensorRT-RTX from "
                    "1.7 "
                    "are supported\n",
                    tensorRt.version);
            }
        }
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "lfx: the plugins are not registered: %s\n", error.what());
    }
}

} // namespace
} // namespace lfx
