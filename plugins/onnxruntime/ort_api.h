// The part of ONNX Runtime's C interface that the custom ops use, declared by the position of each function in the table
// that OrtApiBase::GetApi returns. The table and OrtCustomOp only grow at their ends: this is version 17, of ONNX Runtime
// 1.17, which every later one returns, and two functions of version 18.
//
// Source: include/onnxruntime/core/session/onnxruntime_c_api.h of ONNX Runtime, https://github.com/microsoft/onnxruntime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lfx::ort
{

constexpr uint32_t kAPI_VERSION = 17;
constexpr uint32_t kCUDA_API_VERSION = 18; // of the functions that the CUDA ops use beyond kAPI_VERSION

// Objects of ONNX Runtime.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct TypeInfo;
struct TensorInfo; // OrtTensorTypeAndShapeInfo
struct Value;
struct Allocator;
struct MemoryInfo;

enum ErrorCode : int32_t
{
    kFAIL = 1,
    kINVALID_ARGUMENT = 2,
    kNOT_IMPLEMENTED = 9,
};

enum ElementType : int32_t
{
    kFLOAT = 1,
    kINT32 = 6,
    kFLOAT16 = 10,
    kBFLOAT16 = 16,
};

enum Characteristic : int32_t
{
    kREQUIRED = 0,
};

enum MemoryType : int32_t
{
    kDEFAULT_MEMORY = 0,
};

using Function = void (*)();

struct ApiBase
{
    Function const* (*getApi)(uint32_t version); // nullptr if the runtime is older
    char const* (*getVersionString)();
};

// Calls a function of the table by its position: call<Position, R(Arguments)>(table, arguments...).
template <typename Signature>
struct Entry;

template <typename Result, typename... Arguments>
struct Entry<Result(Arguments...)>
{
    size_t position;

    Result operator()(Function const* api, Arguments... arguments) const
    {
        return reinterpret_cast<Result (*)(Arguments...)>(api[position])(arguments...);
    }
};

// Functions that return a Status return nullptr on success.
constexpr Entry<Status*(ErrorCode, char const*)> createStatus{0};
constexpr Entry<char const*(Status const*)> getErrorMessage{2};
constexpr Entry<Status*(char const*, CustomOpDomain**)> createCustomOpDomain{26};
constexpr Entry<Status*(CustomOpDomain*, struct CustomOp const*)> addCustomOp{27};
constexpr Entry<Status*(SessionOptions*, CustomOpDomain*)> addCustomOpDomain{28};
constexpr Entry<Status*(Value*, void**)> getTensorMutableData{51};
constexpr Entry<Status*(TypeInfo const*, TensorInfo const**)> castTypeInfoToTensorInfo{55};
constexpr Entry<Status*(TensorInfo const*, ElementType*)> getTensorElementType{60};
constexpr Entry<Status*(TensorInfo const*, size_t*)> getDimensionsCount{61};
constexpr Entry<Status*(TensorInfo const*, int64_t*, size_t)> getDimensions{62};
constexpr Entry<Status*(TensorInfo const*, char const**, size_t)> getSymbolicDimensions{63};
constexpr Entry<Status*(Value const*, TensorInfo**)> getTensorTypeAndShape{65};
constexpr Entry<Status*(Allocator*, void*)> allocatorFree{76};
constexpr Entry<Status*(Allocator const*, MemoryInfo const**)> allocatorGetInfo{77};
constexpr Entry<Status*(KernelInfo const*, char const*, float*)> getFloatAttribute{85};
constexpr Entry<Status*(KernelInfo const*, char const*, int64_t*)> getIntAttribute{86};
constexpr Entry<Status*(KernelInfo const*, char const*, char*, size_t*)> getStringAttribute{87};
constexpr Entry<Status*(KernelContext const*, size_t, Value const**)> getInput{90};
constexpr Entry<Status*(KernelContext*, size_t, int64_t const*, size_t, Value**)> getOutput{91};
constexpr Entry<void(Status*)> releaseStatus{93};
constexpr Entry<void(TypeInfo*)> releaseTypeInfo{98};
constexpr Entry<void(TensorInfo*)> releaseTensorInfo{99};
constexpr Entry<Status*(char***, int*)> getAvailableProviders{125};
constexpr Entry<Status*(char**, int)> releaseAvailableProviders{126};
constexpr Entry<void(Allocator*)> releaseAllocator{132};
constexpr Entry<Status*(KernelContext const*, void**)> getGpuComputeStream{193};
constexpr Entry<Status*(KernelInfo const*, size_t, TypeInfo**)> getInputTypeInfo{234};
constexpr Entry<Status*(ShapeInferContext const*, size_t, TensorInfo**)> getShapeInferInput{268};
constexpr Entry<Status*(ShapeInferContext const*, size_t, TensorInfo const*)> setShapeInferOutput{270};
constexpr Entry<Status*(KernelContext const*, void (*)(void*, size_t), size_t, size_t, void*)> parallelFor{274};
constexpr Entry<Status*(KernelContext const*, MemoryInfo const*, size_t, void**)> getScratchBuffer{277}; // version 18
constexpr Entry<Status*(KernelInfo const*, MemoryType, Allocator**)> getKernelAllocator{278};            // version 18

// OrtCustomOp: what ONNX Runtime calls. The functions up to getVariadicOutputHomogeneity must be there; those of the first
// version that return no status are not called if their later forms are.
struct CustomOp
{
    uint32_t version = kAPI_VERSION;
    void* (*createKernel)(CustomOp const*, Function const* api, KernelInfo const*) = nullptr;
    char const* (*getName)(CustomOp const*) = nullptr;
    char const* (*getExecutionProviderType)(CustomOp const*) = nullptr;
    ElementType (*getInputType)(CustomOp const*, size_t) = nullptr;
    size_t (*getInputTypeCount)(CustomOp const*) = nullptr;
    ElementType (*getOutputType)(CustomOp const*, size_t) = nullptr;
    size_t (*getOutputTypeCount)(CustomOp const*) = nullptr;
    void (*kernelCompute)(void* kernel, KernelContext*) = nullptr;
    void (*kernelDestroy)(void* kernel) = nullptr;
    Characteristic (*getInputCharacteristic)(CustomOp const*, size_t) = nullptr;
    Characteristic (*getOutputCharacteristic)(CustomOp const*, size_t) = nullptr;
    MemoryType (*getInputMemoryType)(CustomOp const*, size_t) = nullptr;
    int (*getVariadicInputMinArity)(CustomOp const*) = nullptr;
    int (*getVariadicInputHomogeneity)(CustomOp const*) = nullptr;
    int (*getVariadicOutputMinArity)(CustomOp const*) = nullptr;
    int (*getVariadicOutputHomogeneity)(CustomOp const*) = nullptr;
    Status* (*createKernelV2)(CustomOp const*, Function const* api, KernelInfo const*, void** kernel) = nullptr;
    Status* (*kernelComputeV2)(void* kernel, KernelContext*) = nullptr;
    Status* (*inferOutputShape)(CustomOp const*, ShapeInferContext*) = nullptr;
    int (*getStartVersion)(CustomOp const*) = nullptr; // nullptr: version 1 of the op
    int (*getEndVersion)(CustomOp const*) = nullptr;
};

} // namespace lfx::ort
