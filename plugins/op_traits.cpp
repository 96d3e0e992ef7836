#include "op_traits.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

namespace lfx
{
namespace
{

bool equal(Shape const& shape, std::initializer_list<int64_t> sizes)
{
    bool same = shape.numAxes == static_cast<int32_t>(sizes.size());
    for (int32_t i = 0; same && i < shape.numAxes; ++i)
    {
        int64_t const size = sizes.begin()[i];
        same = shape.sizes[i] == size || shape.sizes[i] < 0 || size < 0;
    }
    return same;
}

// A size as the kernels have it. One that is not known is 1, and one that is too large stays too large.
int32_t toInt32(int64_t size)
{
    constexpr int64_t kLARGEST = std::numeric_limits<int32_t>::max();
    return static_cast<int32_t>(size < 0 ? 1 : std::min(size, kLARGEST));
}

template <typename Params>
void setCommonSizes(
    Params& params, GlobalAttributes const& attributes, int64_t batch, int64_t seqlen, int64_t width, Type type)
{
    params.batch = toInt32(batch);
    params.seqlen = toInt32(seqlen);
    params.numHeads = attributes.numHeads;
    int64_t const headSize = width < 0 ? kHEAD_SIZE_MULTIPLE : width / attributes.numHeads;
    params.headSize = toInt32(headSize);
    params.scale = attributes.scale != 0.0F ? attributes.scale : 1.0F / std::sqrt(static_cast<float>(params.headSize));
    params.type = type;
    setContiguous(params);
}

// The width that query, key and value have in common; less than 0 if none of the three shapes gives it. A graph that
// reshapes the query often leaves its width unknown.
template <typename Op>
int64_t width(typename Op::Shapes const& shapes)
{
    int64_t const query = shapes[Op::kQUERY].sizes[2];
    return query >= 0 ? query : std::max(shapes[Op::kKEY].sizes[2], shapes[Op::kVALUE].sizes[2]);
}

std::string toString(Shape const& shape)
{
    if (shape.numAxes > Shape::kMAX_AXES)
    {
        return "of " + std::to_string(shape.numAxes) + " axes";
    }
    std::string text = "(";
    for (int32_t i = 0; i < shape.numAxes; ++i)
    {
        text += (i > 0 ? ", " : "") + (shape.sizes[i] < 0 ? "?" : std::to_string(shape.sizes[i]));
    }
    return text + ")";
}

} // namespace

bool GlobalOp::shapesAgree(Shapes const& shapes)
{
    int64_t const batch = shapes[kQUERY].sizes[0];
    int64_t const width = shapes[kQUERY].sizes[2];
    int64_t const seqlen = shapes[kKEY].sizes[1];
    return equal(shapes[kKEY], {batch, seqlen, width}) && equal(shapes[kVALUE], {batch, seqlen, width})
        && equal(shapes[kKEY_MASK], {batch, seqlen});
}

void GlobalOp::setSizes(Params& params, Attributes const& attributes, Shapes const& shapes, Type type)
{
    setCommonSizes(params, attributes, shapes[kQUERY].sizes[0], shapes[kKEY].sizes[1], width<GlobalOp>(shapes), type);
    params.queries = toInt32(shapes[kQUERY].sizes[1]);
}

void GlobalOp::setTensors(Params& params, void const* const* inputs, void* context)
{
    params.query = inputs[kQUERY];
    params.key = inputs[kKEY];
    params.value = inputs[kVALUE];
    params.keyMask = static_cast<int32_t const*>(inputs[kKEY_MASK]);
    params.context = context;
}

bool BandedOp::shapesAgree(Shapes const& shapes)
{
    int64_t const batch = shapes[kQUERY].sizes[0];
    int64_t const seqlen = shapes[kQUERY].sizes[1];
    int64_t const width = shapes[kQUERY].sizes[2];
    int64_t const slots = shapes[kGLOBAL_INDEX].sizes[1];
    return equal(shapes[kKEY], {batch, seqlen, width}) && equal(shapes[kVALUE], {batch, seqlen, width})
        && equal(shapes[kKEY_MASK], {batch, seqlen}) && equal(shapes[kGLOBAL_INDEX], {batch, slots})
        && equal(shapes[kGLOBAL_CONTEXT], {batch, slots, width});
}

void BandedOp::setSizes(Params& params, Attributes const& attributes, Shapes const& shapes, Type type)
{
    setCommonSizes(params, attributes, shapes[kQUERY].sizes[0], shapes[kKEY].sizes[1], width<BandedOp>(shapes), type);
    params.slots = toInt32(shapes[kGLOBAL_INDEX].sizes[1]);
    params.window = attributes.window;
    params.dilation = attributes.dilation;
    params.causal = attributes.causal;
}

void BandedOp::setTensors(Params& params, void const* const* inputs, void* context)
{
    params.query = inputs[kQUERY];
    params.key = inputs[kKEY];
    params.value = inputs[kVALUE];
    params.keyMask = static_cast<int32_t const*>(inputs[kKEY_MASK]);
    params.globalIndex = static_cast<int32_t const*>(inputs[kGLOBAL_INDEX]);
    params.globalContext = inputs[kGLOBAL_CONTEXT];
    params.context = context;
}

template <typename Op>
std::string setCheckedSizes(typename Op::Params& params, typename Op::Attributes const& attributes,
    typename Op::Shapes const& shapes, Type type, Target target)
{
    std::string text;
    for (int32_t i = 0; i < Op::kNUM_INPUTS; ++i)
    {
        std::string const input = std::string(Op::kINPUTS[i].name) + " " + toString(shapes[i]);
        if (shapes[i].numAxes != Op::kINPUTS[i].numAxes)
        {
            return input + " must have " + std::to_string(Op::kINPUTS[i].numAxes) + " axes";
        }
        text += (i > 0 ? ", " : "") + input;
    }
    if (attributes.numHeads < 1)
    {
        return "num_heads is " + std::to_string(attributes.numHeads) + "; it must be 1 or more";
    }
    int64_t const queryWidth = width<Op>(shapes);
    if (queryWidth >= 0 && (queryWidth == 0 || queryWidth % attributes.numHeads != 0))
    {
        return "query has width " + std::to_string(queryWidth) + "; it must be a multiple of num_heads "
            + std::to_string(attributes.numHeads);
    }
    if (!Op::shapesAgree(shapes))
    {
        return "the shapes do not fit together: " + text;
    }
    Op::setSizes(params, attributes, shapes, type);
    char const* const reason = unsupportedReason(params, target);
    return reason != nullptr ? std::string(reason) + "; given: " + text : "";
}

template std::string setCheckedSizes<BandedOp>(
    BandedParams&, BandedAttributes const&, BandedOp::Shapes const&, Type, Target);
template std::string setCheckedSizes<GlobalOp>(
    GlobalParams&, GlobalAttributes const&, GlobalOp::Shapes const&, Type, Target);

} // namespace lfx
