// cp.async.
//
// Source: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy".
#include "address.h"

namespace lfx::ptx
{
namespace
{

constexpr uint32_t kBYTES = 16;

// cp.async.cg.shared.global [to], [from], 16, sourceBytes. The bytes past sourceBytes become zeros, and if it is 0, the
// source is not read. operands: address of the target and its size, of the source, sourceBytes.
void startCopies(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    auto const& operands = instruction.operands;
    bool const isLong = operands[1] == static_cast<uint32_t>(Size::k64);
    Address const to{operands[0], isLong, instruction.offset};
    Address const from{operands[2], true, static_cast<int32_t>(instruction.count)};
    requireDefined(to.defined(registers), executing, "an address");
    requireDefined(from.defined(registers), executing, "an address");
    requireDefined(registers.defined<uint32_t>(operands[3]), executing, "a number of bytes");
    forEachLane(executing, [&](int lane) {
        uint32_t const sourceBytes = registers.get<uint32_t>(operands[3], lane);
        if (sourceBytes > kBYTES)
        {
            throw Fault("cp.async of more than 16 bytes", lane);
        }
        Copy copy{sharedAddress(to.of(registers, lane)), {}};
        uint64_t const source = from.of(registers, lane);
        if (source % kBYTES != 0)
        {
            throw Fault("cp.async from an address that is no multiple of 16", lane);
        }
        for (uint32_t i = 0; i < sourceBytes; ++i)
        {
            copy.data[i] = *lanes.block.global.read(source + i, 1, lane);
        }
        lanes.block.shared.startCopy(copy.address, kBYTES, accessor(lanes, lane));
        lanes.copies[lane].open.push_back(copy);
    });
}

void decodeCopy(Decoder& decoder, Instruction& result)
{
    bool const hasSourceBytes = decoder.operandCount() == 4;
    decoder.expectOperands(hasSourceBytes ? 4 : 3);
    result.execute = startCopies;
    Size size{};
    result.operands[2] = decoder.address(decoder.operand(1), result, size);
    if (size != Size::k64)
    {
        decoder.failOperand(decoder.operand(1));
    }
    result.count = static_cast<uint32_t>(result.offset); // of the source
    result.operands[0] = decoder.address(decoder.operand(0), result, size);
    result.operands[1] = static_cast<uint32_t>(size);
    if (decoder.immediate(decoder.operand(2)) != kBYTES)
    {
        decoder.fail("cp.async.cg copies 16 bytes");
    }
    result.operands[3]
        = hasSourceBytes ? decoder.source(decoder.operand(3), Size::k32) : decoder.constant(Size::k32, kBYTES);
}

void commit(Instruction const&, Lanes& lanes, uint32_t executing)
{
    forEachLane(executing, [&](int lane) {
        Copies& copies = lanes.copies[lane];
        copies.groups.push_back(std::move(copies.open));
        copies.open.clear();
    });
}

// Waits until at most `count` groups, the newest, are pending.
void waitForGroups(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    forEachLane(executing, [&](int lane) {
        auto& groups = lanes.copies[lane].groups;
        for (; groups.size() > instruction.count; groups.pop_front())
        {
            for (Copy const& copy : groups.front())
            {
                lanes.block.shared.finishCopy(copy.address, copy.data, kBYTES, accessor(lanes, lane));
            }
        }
    });
}

void decodeCommit(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(0);
    result.execute = commit;
}

void decodeWait(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(1);
    result.count = static_cast<uint32_t>(decoder.immediate(decoder.operand(0)));
    result.execute = waitForGroups;
}

// Also waits for copies that were not committed.
void waitForAll(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    commit(instruction, lanes, executing);
    waitForGroups(instruction, lanes, executing);
}

void decodeWaitAll(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(0);
    result.execute = waitForAll;
}

} // namespace

void addCopies(Opcodes& opcodes)
{
    opcodes["cp.async.cg.shared.global"] = decodeCopy;
    opcodes["cp.async.commit_group"] = decodeCommit;
    opcodes["cp.async.wait_group"] = decodeWait;
    opcodes["cp.async.wait_all"] = decodeWaitAll;
}

} // namespace lfx::ptx
