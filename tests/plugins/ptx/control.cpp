// Branches, ends of threads, barriers and fences. The machine (machine.cpp) acts on their `flow`.
#include "address.h"

namespace lfx::ptx
{
namespace
{

void nothing(Instruction const&, Lanes&, uint32_t)
{
}

void decodeBranch(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(1);
    auto const label = decoder.code().kernel.labels.find(decoder.operand(0).name);
    if (label == decoder.code().kernel.labels.end())
    {
        decoder.failOperand(decoder.operand(0));
    }
    result.target = static_cast<uint32_t>(label->second);
    result.flow = Flow::kBRANCH;
    result.execute = nothing;
}

void decodeExit(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(0);
    result.flow = Flow::kEXIT;
    result.execute = nothing;
}

// Only barrier 0, for all threads of the block.
void decodeBlockBarrier(Decoder& decoder, Instruction& result, size_t operand)
{
    if (decoder.immediate(decoder.operand(operand)) != 0)
    {
        decoder.fail("only barrier 0 is supported");
    }
    result.flow = Flow::kBLOCK_BARRIER;
    result.members = static_cast<int32_t>(decoder.constant(Size::k32, kALL_LANES));
    result.execute = nothing;
}

void decodeBarrier(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(1);
    decodeBlockBarrier(decoder, result, 0);
}

// bar.red.or.pred p, 0, q. operands: p, q; the block computes p.
void decodeReduction(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(3);
    decodeBlockBarrier(decoder, result, 1);
    result.count = 1;
    result.operands[0] = decoder.destination(decoder.operand(0), Size::kPREDICATE);
    result.operands[1] = decoder.source(decoder.operand(2), Size::kPREDICATE);
}

void decodeWarpBarrier(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(1);
    result.flow = Flow::kWARP_BARRIER;
    result.members = static_cast<int32_t>(decoder.source(decoder.operand(0), Size::k32));
    result.execute = nothing;
}

// Threads run one after another, so memory is always consistent.
void decodeFence(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(0);
    result.execute = nothing;
}

} // namespace

void addControl(Opcodes& opcodes)
{
    opcodes["bra"] = decodeBranch;
    opcodes["bra.uni"] = decodeBranch;
    opcodes["ret"] = decodeExit;
    opcodes["exit"] = decodeExit;
    opcodes["bar.sync"] = decodeBarrier;
    opcodes["bar.red.or.pred"] = decodeReduction;
    opcodes["bar.warp.sync"] = decodeWarpBarrier;
    for (char const* const fence : {"membar.cta", "membar.gl", "fence.acq_rel.cta", "fence.acq_rel.gpu"})
    {
        opcodes[fence] = decodeFence;
    }
}

} // namespace lfx::ptx
