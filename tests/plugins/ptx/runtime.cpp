// The part of the CUDA runtime that the launch code, compiled by nvcc, calls; launches go to the interpreter. And the C
// interface by which tests load PTX and name the buffers.
#include "machine.h"

#include <cstdlib>
#include <map>
#include <utility>

namespace
{

using namespace lfx::ptx;

constexpr int kINVALID_VALUE = 1; // cudaError_t
constexpr int kLAUNCH_FAILURE = 719;
constexpr size_t kDEFAULT_SHARED_BYTES = 48 * 1024; // that a block has without cudaFuncSetAttribute
constexpr int kMAX_DYNAMIC_SHARED_ATTRIBUTE = 8;    // cudaFuncAttribute
constexpr int kMULTIPROCESSOR_COUNT = 16;           // cudaDeviceAttr
constexpr int kCOMPUTE_CAPABILITY_MAJOR = 75;
constexpr int kCOMPUTE_CAPABILITY_MINOR = 76;

struct State
{
    std::map<std::string, Kernel> kernels;                // as loaded
    std::map<std::string, std::unique_ptr<Code>> decoded; // those that have been launched
    std::map<void const*, std::string> names;             // of host functions
    std::map<void const*, size_t> sharedLimits;
    GlobalMemory global;
    Launch configured;
    std::string error; // of the first failure
    int status = 0;    // of the last call
};

State& state()
{
    static State instance;
    return instance;
}

int fail(std::string const& reason, int status)
{
    State& s = state();
    s.error = s.error.empty() ? reason : s.error;
    s.status = status;
    return status;
}

int launch(std::string const& name, Launch const& launch)
{
    State& s = state();
    try
    {
        auto const kernel = s.kernels.find(name);
        if (kernel == s.kernels.end())
        {
            throw Error("no kernel " + name + " is loaded");
        }
        std::unique_ptr<Code>& code = s.decoded[name];
        if (code == nullptr)
        {
            code = decode(kernel->second);
        }
        run(*code, launch, s.global);
        return s.status;
    }
    catch (Error const& error)
    {
        return fail(error.what(), kLAUNCH_FAILURE);
    }
}

} // namespace

extern "C"
{

    // The C interface. Functions that may fail return whether they did not; lfxPtxError() has the reason.

    char const* lfxPtxError()
    {
        return state().error.c_str();
    }

    // Adds the kernels of a module; those of the same name are replaced.
    bool lfxPtxLoad(char const* text)
    {
        State& s = state();
        s.error.clear();
        try
        {
            for (Kernel& kernel : parse(text))
            {
                s.decoded.erase(kernel.name);
                s.kernels[kernel.name] = std::move(kernel);
            }
            return true;
        }
        catch (std::exception const& error)
        {
            return fail(error.what(), kINVALID_VALUE), false;
        }
    }

    // The only memory that the next launches may access. Writable buffers start undefined.
    void lfxPtxSetBuffers(int32_t count, uint64_t const* addresses, uint64_t const* bytes, int32_t const* isWritable)
    {
        State& s = state();
        s.error.clear();
        s.status = 0;
        s.global.buffers.clear();
        for (int32_t i = 0; i < count; ++i)
        {
            bool const writable = isWritable[i] != 0;
            s.global.buffers.push_back(
                {addresses[i], bytes[i], writable, std::vector<uint8_t>(writable ? bytes[i] : 0)});
        }
    }

    // Launches a kernel by name.
    bool lfxPtxLaunch(char const* name, Dimensions const* grid, Dimensions const* block, uint64_t sharedBytes,
        void const* const* arguments)
    {
        state().error.clear();
        state().status = 0;
        return launch(name, {*grid, *block, sharedBytes, arguments}) == 0;
    }

    // The names of the loaded kernels, one a line.
    char const* lfxPtxKernels()
    {
        static std::string names;
        names.clear();
        for (auto const& entry : state().kernels)
        {
            names += entry.first + "\n";
        }
        return names.c_str();
    }

    // The CUDA runtime, as nvcc's host code calls it.

    void** __cudaRegisterFatBinary(void*)
    {
        static void* handle = nullptr;
        return &handle;
    }

    void __cudaRegisterFatBinaryEnd(void**)
    {
    }
    void __cudaUnregisterFatBinary(void**)
    {
    }

    char __cudaInitModule(void**)
    {
        return 1;
    }

    void __cudaRegisterFunction(
        void**, char const* hostFunction, char*, char const* name, int, void*, void*, void*, void*, int*)
    {
        state().names[hostFunction] = name;
    }

    int __cudaGetKernel(void const** kernel, void const* hostFunction)
    {
        *kernel = hostFunction;
        return 0;
    }

    unsigned __cudaPushCallConfiguration(Dimensions grid, Dimensions block, size_t sharedBytes, void*)
    {
        state().configured = {grid, block, sharedBytes, nullptr};
        return 0;
    }

    int __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, size_t* sharedBytes, void** stream)
    {
        Launch const& configured = state().configured;
        *grid = configured.grid;
        *block = configured.block;
        *sharedBytes = configured.sharedBytes;
        *stream = nullptr;
        return 0;
    }

    int cudaLaunchKernel(
        void const* hostFunction, Dimensions grid, Dimensions block, void** arguments, size_t sharedBytes, void*)
    {
        State& s = state();
        auto const name = s.names.find(hostFunction);
        if (name == s.names.end())
        {
            return fail("a launch of a function that is not registered as a kernel", kINVALID_VALUE);
        }
        auto const limit = s.sharedLimits.find(hostFunction);
        if (sharedBytes > (limit == s.sharedLimits.end() ? kDEFAULT_SHARED_BYTES : limit->second))
        {
            return fail("a launch asks for more shared memory than cudaFuncSetAttribute allowed", kINVALID_VALUE);
        }
        return launch(name->second, {grid, block, sharedBytes, arguments});
    }

    int __cudaLaunchKernel(
        void const* kernel, Dimensions grid, Dimensions block, void** arguments, size_t sharedBytes, void* stream)
    {
        return cudaLaunchKernel(kernel, grid, block, arguments, sharedBytes, stream);
    }

    int cudaFuncSetAttribute(void const* hostFunction, int attribute, int value)
    {
        if (attribute != kMAX_DYNAMIC_SHARED_ATTRIBUTE)
        {
            return fail("cudaFuncSetAttribute of an attribute that the interpreter does not know", kINVALID_VALUE);
        }
        state().sharedLimits[hostFunction] = static_cast<size_t>(value);
        return 0;
    }

    int cudaGetDevice(int* device)
    {
        *device = 0;
        return 0;
    }

    int cudaFuncGetAttributes(void*, void const*)
    {
        return fail("cudaFuncGetAttributes is not known to the interpreter", kINVALID_VALUE);
    }

    // The number of multiprocessors is LFX_MULTIPROCESSORS, or that of an H100, as on the emulated device. The compute
    // capability is 8.0, which has no products of a warpgroup: the interpreter does not know them.
    int cudaDeviceGetAttribute(int* value, int attribute, int)
    {
        if (attribute == kCOMPUTE_CAPABILITY_MAJOR || attribute == kCOMPUTE_CAPABILITY_MINOR)
        {
            *value = attribute == kCOMPUTE_CAPABILITY_MAJOR ? 8 : 0;
            return 0;
        }
        if (attribute != kMULTIPROCESSOR_COUNT)
        {
            return fail("cudaDeviceGetAttribute of an attribute that the interpreter does not know", kINVALID_VALUE);
        }
        char const* const count = std::getenv("LFX_MULTIPROCESSORS");
        *value = count != nullptr ? std::atoi(count) : 132;
        return 0;
    }

    int cudaGetLastError()
    {
        return std::exchange(state().status, 0);
    }

} // extern "C"
