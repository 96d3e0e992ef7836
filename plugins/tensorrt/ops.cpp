#include "tensorrt/ops.h"

#include <cmath>
#include <initializer_list>

using nvinfer1::Dims;

namespace lfx
{
namespace
{

bool equal(Dims const& shape, std::initializer_list<int64_t> sizes)
{
    bool same = shape.nbDims == static_cast<int32_t>(sizes.size());
    for (int32_t i = 0; same && i < shape.nbDims; ++i)
    {
        same = shape.d[i] == sizes.begin()[i];
    }
    return same;
}

int32_t size(Dims const& shape, int32_t axis)
{
    return static_cast<int32_t>(shape.d[axis]);
}

// The sizes and attributes that both ops have.
template <typename Params>
Params commonSizes(GlobalAttributes const& attributes, Dims const& query, Dims const& key, Type type)
{
    Params params{};
    params.batch = size(query, 0);
    params.seqlen = size(key, 1);
    params.numHeads = attributes.numHeads;
    params.headSize = size(query, 2) / attributes.numHeads;
    params.scale = attributes.scale != 0.0F ? attributes.scale : 1.0F / std::sqrt(static_cast<float>(params.headSize));
    params.type = type;
    setContiguous(params);
    return params;
}

} // namespace

bool GlobalOp::shapesAgree(Shapes const& shapes)
{
    int64_t const batch = shapes[kQUERY].d[0];
    int64_t const width = shapes[kQUERY].d[2];
    int64_t const seqlen = shapes[kKEY].d[1];
    return equal(shapes[kKEY], {batch, seqlen, width}) && equal(shapes[kVALUE], {batch, seqlen, width})
        && equal(shapes[kKEY_MASK], {batch, seqlen});
}

GlobalParams GlobalOp::sizes(Attributes const& attributes, Shapes const& shapes, Type type)
{
    GlobalParams params = commonSizes<GlobalParams>(attributes, shapes[kQUERY], shapes[kKEY], type);
    params.queries = size(shapes[kQUERY], 1);
    return params;
}

void GlobalOp::setTensors(Params& params, void const* const* inputs, void* context, void* workspace)
{
    params.query = inputs[kQUERY];
    params.key = inputs[kKEY];
    params.value = inputs[kVALUE];
    params.keyMask = static_cast<int32_t const*>(inputs[kKEY_MASK]);
    params.context = context;
    params.workspace = static_cast<float*>(workspace);
}

size_t GlobalOp::workspaceBytes(Params const& maxSizes)
{
    return globalWorkspaceBytes(maxSizes.batch, maxSizes.queries, maxSizes.numHeads, maxSizes.headSize);
}

int32_t GlobalOp::preload()
{
    return preloadGlobalAttention();
}

int32_t GlobalOp::launch(Params const& params, cudaStream_t stream)
{
    return launchGlobalAttention(params, stream);
}

bool BandedOp::shapesAgree(Shapes const& shapes)
{
    int64_t const batch = shapes[kQUERY].d[0];
    int64_t const seqlen = shapes[kQUERY].d[1];
    int64_t const width = shapes[kQUERY].d[2];
    int64_t const slots = shapes[kGLOBAL_INDEX].d[1];
    return equal(shapes[kKEY], {batch, seqlen, width}) && equal(shapes[kVALUE], {batch, seqlen, width})
        && equal(shapes[kKEY_MASK], {batch, seqlen}) && equal(shapes[kGLOBAL_INDEX], {batch, slots})
        && equal(shapes[kGLOBAL_CONTEXT], {batch, slots, width});
}

BandedParams BandedOp::sizes(Attributes const& attributes, Shapes const& shapes, Type type)
{
    BandedParams params = commonSizes<BandedParams>(attributes, shapes[kQUERY], shapes[kKEY], type);
    params.slots = size(shapes[kGLOBAL_INDEX], 1);
    params.window = attributes.window;
    params.dilation = attributes.dilation;
    params.causal = attributes.causal;
    return params;
}

void BandedOp::setTensors(Params& params, void const* const* inputs, void* context, void*)
{
    params.query = inputs[kQUERY];
    params.key = inputs[kKEY];
    params.value = inputs[kVALUE];
    params.keyMask = static_cast<int32_t const*>(inputs[kKEY_MASK]);
    params.globalIndex = static_cast<int32_t const*>(inputs[kGLOBAL_INDEX]);
    params.globalContext = inputs[kGLOBAL_CONTEXT];
    params.context = context;
}

size_t BandedOp::workspaceBytes(Params const&)
{
    return 0;
}

int32_t BandedOp::preload()
{
    return preloadBandedAttention();
}

int32_t BandedOp::launch(Params const& params, cudaStream_t stream)
{
    return launchBandedAttention(params, stream);
}

} // namespace lfx
