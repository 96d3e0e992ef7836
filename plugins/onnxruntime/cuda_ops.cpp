// liblfx_onnxruntime_cuda.so: the custom ops on the CUDA provider, in float32, float16 and bfloat16. Each type is an op of its
// own, and ONNX Runtime chooses by the inputs of a node.
#include "attention.h"
#include "onnxruntime/cuda_device.h"
#include "onnxruntime/registration.h"

namespace lfx::ort
{
namespace
{

Ops makeOps(Function const* api)
{
    Ops ops;
    for (Type type : {Type::kFLOAT, Type::kHALF, Type::kBF16})
    {
        ops.push_back(std::make_shared<AttentionOp<BandedOp, CudaDevice>>(api, type));
        ops.push_back(std::make_shared<AttentionOp<GlobalOp, CudaDevice>>(api, type));
        ops.push_back(std::make_shared<AttentionOp<BandedOp, NoCpuDevice>>(api, type));
        ops.push_back(std::make_shared<AttentionOp<GlobalOp, NoCpuDevice>>(api, type));
    }
    return ops;
}

} // namespace
} // namespace lfx::ort

// By which ONNX Runtime registers the custom ops of a library.
LFX_EXPORT lfx::ort::Status* RegisterCustomOps(
    lfx::ort::SessionOptions* options, lfx::ort::ApiBase const* base) noexcept
{
    return lfx::ort::registerOps(options, base, lfx::ort::kCUDA_API_VERSION,
        "lfx's custom ops on CUDA need ONNX Runtime 1.18 or later", lfx::ort::makeOps);
}
