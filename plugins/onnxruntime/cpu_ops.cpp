// liblfx_onnxruntime.so: the custom ops on the CPU provider, in float32.
#include "attention.h"
#include "onnxruntime/cpu_device.h"
#include "onnxruntime/registration.h"

namespace lfx::ort
{
namespace
{

Ops makeOps(Function const* api)
{
    return {
        std::make_shared<AttentionOp<BandedOp, CpuDevice>>(api, Type::kFLOAT),
        std::make_shared<AttentionOp<GlobalOp, CpuDevice>>(api, Type::kFLOAT),
    };
}

} // namespace
} // namespace lfx::ort

// By which ONNX Runtime registers the custom ops of a library.
LFX_EXPORT lfx::ort::Status* RegisterCustomOps(
    lfx::ort::SessionOptions* options, lfx::ort::ApiBase const* base) noexcept
{
    return lfx::ort::registerOps(
        options, base, lfx::ort::kAPI_VERSION, "lfx's custom ops need ONNX Runtime 1.17 or later", lfx::ort::makeOps);
}
