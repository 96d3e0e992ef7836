// The custom op that ONNX Runtime sees: it reads the attributes, checks the inputs and runs the kernels on a device.
#pragma once

#include "onnxruntime/ort_api.h"
#include "op_traits.h"

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <memory>
#include <string>

namespace lfx::ort
{

// An error with the name of the op. Status objects belong to the caller.
template <typename Op>
Status* failure(Function const* api, std::string const& message, ErrorCode code = kINVALID_ARGUMENT)
{
    return createStatus(api, code, ("lfx::" + (Op::kNAME + (": " + message))).c_str());
}

constexpr ElementType elementType(Type type)
{
    return type == Type::kFLOAT ? kFLOAT : type == Type::kHALF ? kFLOAT16 : kBFLOAT16;
}

// The shape of a tensor.
inline Status* readShape(Function const* api, TensorInfo const* info, Shape& shape)
{
    size_t numAxes = 0;
    if (Status* status = getDimensionsCount(api, info, &numAxes))
    {
        return status;
    }
    shape.numAxes = static_cast<int32_t>(numAxes);
    return numAxes <= shape.sizes.size() ? getDimensions(api, info, shape.sizes.data(), numAxes) : nullptr;
}

// A node of the graph. ONNX Runtime may run it on several threads at a time.
//
// `Device` is a class template over the op that has kPROVIDER, the execution provider, kTARGET, and
//   Status* initialize(Function const* api, KernelInfo const* info)
//   Status* run(Function const* api, KernelContext* context, Params& params) const, which computes the op
template <typename Op, template <typename> class Device>
class Kernel
{
public:
    using Params = typename Op::Params;
    using Shapes = typename Op::Shapes;

    Kernel(Function const* api, Type type)
        : mApi(api)
        , mType(type)
    {
    }

    Status* initialize(KernelInfo const* info)
    {
        std::string const unread = readAttributes(info);
        if (!unread.empty())
        {
            return failure<Op>(mApi, unread + "the node has another type");
        }
        if (Status* status = mDevice.initialize(mApi, info))
        {
            return status;
        }
        Shapes shapes;
        for (int32_t i = 0; i < Op::kNUM_INPUTS; ++i)
        {
            if (Status* status = staticShape(info, i, shapes[i]))
            {
                return status;
            }
        }
        Params params;
        std::string const reason = setCheckedSizes<Op>(params, mAttributes, shapes, mType, Device<Op>::kTARGET);
        return reason.empty() ? nullptr : failure<Op>(mApi, reason, kNOT_IMPLEMENTED);
    }

    Status* compute(KernelContext* context) const noexcept
    {
        try
        {
            return tryToCompute(context);
        }
        catch (std::exception const& error) // of the texts of an error
        {
            return createStatus(mApi, kFAIL, error.what());
        }
    }

private:
    Status* tryToCompute(KernelContext* context) const
    {
        Shapes shapes;
        void const* inputs[Op::kNUM_INPUTS];
        for (int32_t i = 0; i < Op::kNUM_INPUTS; ++i)
        {
            if (Status* status = readInput(context, i, shapes[i], inputs[i]))
            {
                return status;
            }
        }
        Params params;
        std::string const reason = setCheckedSizes<Op>(params, mAttributes, shapes, mType, Device<Op>::kTARGET);
        if (!reason.empty())
        {
            return failure<Op>(mApi, reason);
        }
        Value* output = nullptr;
        void* result = nullptr;
        Shape const& query = shapes[Op::kQUERY];
        if (Status* status = getOutput(mApi, context, 0, query.sizes.data(), query.numAxes, &output))
        {
            return status;
        }
        if (Status* status = getTensorMutableData(mApi, output, &result))
        {
            return status;
        }
        Op::setTensors(params, inputs, result);
        return mDevice.run(mApi, context, params);
    }

    // Returns why an attribute cannot be read; empty if all can.
    std::string readAttributes(KernelInfo const* info)
    {
        std::string reason = readInteger(info, "num_heads", mAttributes.numHeads);
        bool const hasScale = succeeded(getFloatAttribute(mApi, info, "scale", &mAttributes.scale));
        reason += otherType(info, "scale", "a float", hasScale);
        if constexpr (Op::kIS_BANDED)
        {
            reason += readInteger(info, "window", mAttributes.window);
            reason += readInteger(info, "dilation", mAttributes.dilation);
            reason += readInteger(info, "causal", mAttributes.causal);
        }
        return reason;
    }

    // One that does not fit stays out of range.
    std::string readInteger(KernelInfo const* info, char const* name, int32_t& attribute) const
    {
        constexpr int64_t kLARGEST = std::numeric_limits<int32_t>::max();
        int64_t value = attribute;
        bool const isRead = succeeded(getIntAttribute(mApi, info, name, &value));
        attribute = static_cast<int32_t>(std::clamp<int64_t>(value, -1, kLARGEST));
        return otherType(info, name, "an integer", isRead);
    }

    // An attribute that was not read keeps its default if the node does not have it; ONNX Runtime says the same of one of
    // another type, which is refused.
    std::string otherType(KernelInfo const* info, char const* name, char const* type, bool isRead) const
    {
        int64_t integer = 0;
        float number = 0.0F;
        size_t size = 0;
        bool const isOther = !isRead
            && (succeeded(getIntAttribute(mApi, info, name, &integer))
                || succeeded(getFloatAttribute(mApi, info, name, &number))
                || succeeded(getStringAttribute(mApi, info, name, nullptr, &size)));
        return isOther ? std::string(name) + " must be " + type + "; " : "";
    }

    bool succeeded(Status* status) const
    {
        if (status != nullptr)
        {
            releaseStatus(mApi, status);
        }
        return status == nullptr;
    }

    // The shape that the graph gives an input; if it gives none, no size is known.
    Status* staticShape(KernelInfo const* info, int32_t input, Shape& shape) const
    {
        TypeInfo* type = nullptr;
        TensorInfo const* tensor = nullptr;
        Status* status = getInputTypeInfo(mApi, info, input, &type);
        if (status == nullptr)
        {
            status = castTypeInfoToTensorInfo(mApi, type, &tensor);
            if (status == nullptr && tensor != nullptr)
            {
                status = readShape(mApi, tensor, shape);
            }
            releaseTypeInfo(mApi, type);
        }
        if (shape.numAxes == 0)
        {
            shape = {Op::kINPUTS[input].numAxes, {-1, -1, -1}}; // kINPUTS have at most three axes
        }
        return status;
    }

    Status* readInput(KernelContext* context, int32_t input, Shape& shape, void const*& data) const
    {
        Value const* value = nullptr;
        TensorInfo* info = nullptr;
        if (Status* status = getInput(mApi, context, input, &value))
        {
            return status;
        }
        if (Status* status = getTensorTypeAndShape(mApi, value, &info))
        {
            return status;
        }
        Status* const status = readShape(mApi, info, shape);
        releaseTensorInfo(mApi, info);
        if (status != nullptr)
        {
            return status;
        }
        void* pointer = nullptr;
        Status* const noData = getTensorMutableData(mApi, const_cast<Value*>(value), &pointer);
        data = pointer;
        return noData;
    }

    Function const* mApi;
    Type mType;
    typename Op::Attributes mAttributes;
    Device<Op> mDevice;
};

// What ONNX Runtime calls for an op with tensors of a type on a device. `api` is that of the runtime that the op is
// registered in.
template <typename Op, template <typename> class Device>
struct AttentionOp : CustomOp
{
    AttentionOp(Function const* api, Type type)
        : api(api)
        , type(type)
    {
        getName = [](CustomOp const*) { return Op::kNAME; };
        getExecutionProviderType = [](CustomOp const*) { return Device<Op>::kPROVIDER; };
        getInputType = [](CustomOp const* op, size_t i) {
            return Op::kINPUTS[i].isInteger ? kINT32 : elementType(self(op).type);
        };
        getInputTypeCount = [](CustomOp const*) -> size_t { return Op::kNUM_INPUTS; };
        getOutputType = [](CustomOp const* op, size_t) { return elementType(self(op).type); };
        getOutputTypeCount = [](CustomOp const*) -> size_t { return 1; };
        kernelDestroy = [](void* kernel) { delete static_cast<Kernel<Op, Device>*>(kernel); };
        getInputCharacteristic = [](CustomOp const*, size_t) { return kREQUIRED; };
        getOutputCharacteristic = [](CustomOp const*, size_t) { return kREQUIRED; };
        getInputMemoryType = [](CustomOp const*, size_t) { return kDEFAULT_MEMORY; };
        getVariadicInputMinArity = getVariadicOutputMinArity = [](CustomOp const*) { return 1; };
        getVariadicInputHomogeneity = getVariadicOutputHomogeneity = [](CustomOp const*) { return 1; };
        createKernelV2 = create;
        kernelComputeV2 = compute;
        inferOutputShape = inferShape;
    }

    static AttentionOp const& self(CustomOp const* op)
    {
        return *static_cast<AttentionOp const*>(op);
    }

    static Status* create(CustomOp const* op, Function const*, KernelInfo const* info, void** result)
    {
        Function const* const api = self(op).api;
        try
        {
            auto kernel = std::make_unique<Kernel<Op, Device>>(api, self(op).type);
            Status* const status = kernel->initialize(info);
            *result = status == nullptr ? kernel.release() : nullptr;
            return status;
        }
        catch (std::exception const& error)
        {
            return failure<Op>(api, error.what(), kFAIL);
        }
    }

    static Status* compute(void* kernel, KernelContext* context)
    {
        return static_cast<Kernel<Op, Device> const*>(kernel)->compute(context);
    }

    // The context has the shape and the type of the query. If a size is not known and has no name either, no shape is set:
    // ONNX Runtime would take the size to be -1.
    static Status* inferShape(CustomOp const* op, ShapeInferContext* context)
    {
        Function const* const api = self(op).api;
        TensorInfo* query = nullptr;
        Shape shape;
        if (Status* status = getShapeInferInput(api, context, Op::kQUERY, &query))
        {
            return status;
        }
        if (Status* status = readShape(api, query, shape))
        {
            return status;
        }
        if (shape.numAxes != Op::kINPUTS[Op::kQUERY].numAxes)
        {
            return nullptr; // not known, or refused when the kernel is created
        }
        std::array<char const*, 3> names{};
        if (Status* status = getSymbolicDimensions(api, query, names.data(), names.size()))
        {
            return status;
        }
        for (size_t i = 0; i < names.size(); ++i)
        {
            if (shape.sizes[i] < 0 && (names[i] == nullptr || *names[i] == '\0'))
            {
                return nullptr;
            }
        }
        return setShapeInferOutput(api, context, 0, query);
    }

    Function const* api;
    Type type;
};

} // namespace lfx::ort
