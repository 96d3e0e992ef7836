// Instructions by which the lanes of a warp exchange values.
//
// Source: PTX ISA, "shfl.sync", "vote.sync", "match.sync", "activemask", "redux.sync".
#include "address.h"

#include <algorithm>

namespace lfx::ptx
{
namespace
{

enum class Shuffle : uint8_t
{
    kUP,
    kDOWN,
    kBUTTERFLY,
    kINDEX,
};

// The lane whose value a lane takes, or -1 if it keeps its own.
template <Shuffle kMODE>
int32_t sourceLane(int32_t lane, uint32_t b, uint32_t c)
{
    int32_t const segment = static_cast<int32_t>(c >> 8 & 0x1fU);
    int32_t const clamp = static_cast<int32_t>(c & 0x1fU);
    int32_t const value = static_cast<int32_t>(b & 0x1fU);
    int32_t const last = (lane & segment) | (clamp & ~segment);
    int32_t const first = lane & segment;
    int32_t source = 0;
    bool inRange = false;
    switch (kMODE)
    {
    case Shuffle::kUP:
        source = lane - value;
        inRange = source >= last;
        break;
    case Shuffle::kDOWN:
        source = lane + value;
        inRange = source <= last;
        break;
    case Shuffle::kBUTTERFLY:
        source = lane ^ value;
        inRange = source <= last;
        break;
    case Shuffle::kINDEX:
        source = first | (value & ~segment);
        inRange = source <= last;
        break;
    }
    return inRange ? source : -1;
}

// shfl.sync.mode.b32 d|p, a, b, c, members. operands: d, a, b, c, p (if count is 1).
template <Shuffle kMODE>
void shuffle(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    auto const& operands = instruction.operands;
    Registers& registers = lanes.registers;
    requireDefined(
        registers.defined<uint32_t>(operands[2]) & registers.defined<uint32_t>(operands[3]), executing, "a lane");
    uint32_t const definedBefore = registers.defined<uint32_t>(operands[1]);
    auto const values = registers.words[operands[1]];
    uint32_t defined = 0;
    forEachLane(executing, [&](int lane) {
        int32_t const source = sourceLane<kMODE>(
            lane, registers.get<uint32_t>(operands[2], lane), registers.get<uint32_t>(operands[3], lane));
        int32_t const from = source < 0 ? lane : source;
        if ((executing >> from & 1U) == 0)
        {
            throw Fault("shfl.sync from a lane that does not execute it", lane);
        }
        defined |= (definedBefore >> from & 1U) << lane;
        registers.set<uint32_t>(operands[0], lane, values[from]);
        if (instruction.count == 1)
        {
            registers.set<bool>(operands[4], lane, source >= 0);
        }
    });
    mergeDefined(registers.defined<uint32_t>(operands[0]), executing, defined);
    if (instruction.count == 1)
    {
        registers.defined<bool>(operands[4]) |= executing;
    }
}

void converge(Decoder& decoder, Instruction& result, Execute execute, size_t membersOperand)
{
    decoder.expectOperands(membersOperand + 1);
    result.flow = Flow::kCONVERGE;
    result.members = static_cast<int32_t>(decoder.source(decoder.operand(membersOperand), Size::k32));
    result.execute = execute;
}

template <Shuffle kMODE>
void decodeShuffle(Decoder& decoder, Instruction& result)
{
    converge(decoder, result, shuffle<kMODE>, 4);
    Operand const& target = decoder.operand(0);
    bool const hasPredicate = target.kind == Operand::Kind::kPAIR;
    result.operands[0] = decoder.destination(hasPredicate ? target.elements[0] : target, Size::k32);
    if (hasPredicate)
    {
        result.count = 1;
        result.operands[4] = decoder.destination(target.elements[1], Size::kPREDICATE);
    }
    for (size_t i = 1; i < 4; ++i)
    {
        result.operands[i] = decoder.source(decoder.operand(i), Size::k32);
    }
}

uint32_t votes(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    requireDefined(lanes.registers.defined<bool>(instruction.operands[1]), executing, "a vote");
    return lanes.registers.predicates[instruction.operands[1]] & executing;
}

template <typename T>
void setAll(Registers& registers, uint32_t target, uint32_t executing, T value)
{
    forEachLane(executing, [&](int lane) { registers.set<T>(target, lane, value); });
    registers.defined<T>(target) |= executing;
}

void ballot(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    setAll(lanes.registers, instruction.operands[0], executing, votes(instruction, lanes, executing));
}

void any(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    setAll(lanes.registers, instruction.operands[0], executing, votes(instruction, lanes, executing) != 0);
}

void all(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    setAll(lanes.registers, instruction.operands[0], executing, votes(instruction, lanes, executing) == executing);
}

template <Execute kEXECUTE, bool kBALLOT>
void decodeVote(Decoder& decoder, Instruction& result)
{
    converge(decoder, result, kEXECUTE, 2);
    result.operands[0] = decoder.destination(decoder.operand(0), kBALLOT ? Size::k32 : Size::kPREDICATE);
    result.operands[1] = decoder.source(decoder.operand(1), Size::kPREDICATE);
}

void matchAny(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    uint32_t const source = instruction.operands[1];
    requireDefined(registers.defined<uint32_t>(source), executing, "a value to match");
    auto const values = registers.words[source];
    forEachLane(executing, [&](int lane) {
        uint32_t same = 0;
        forEachLane(executing, [&](int other) { same |= (values[other] == values[lane] ? 1U : 0U) << other; });
        registers.set<uint32_t>(instruction.operands[0], lane, same);
    });
    registers.defined<uint32_t>(instruction.operands[0]) |= executing;
}

template <typename T, T (*kFUNCTION)(T, T)>
void reduce(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    uint32_t const source = instruction.operands[1];
    requireDefined(registers.defined<T>(source), executing, "a value to reduce");
    T result = registers.get<T>(source, __builtin_ctz(executing));
    forEachLane(
        executing & (executing - 1), [&](int lane) { result = kFUNCTION(result, registers.get<T>(source, lane)); });
    setAll(registers, instruction.operands[0], executing, result);
}

template <typename T>
T sum(T a, T b)
{
    return a + b;
}

template <typename T>
T smaller(T a, T b)
{
    return std::min(a, b);
}

template <typename T>
T larger(T a, T b)
{
    return std::max(a, b);
}

template <Execute kEXECUTE>
void decodeWords(Decoder& decoder, Instruction& result)
{
    converge(decoder, result, kEXECUTE, 2);
    result.operands[0] = decoder.destination(decoder.operand(0), Size::k32);
    result.operands[1] = decoder.source(decoder.operand(1), Size::k32);
}

void activeMask(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    setAll(lanes.registers, instruction.operands[0], executing, executing);
}

void decodeActiveMask(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(1);
    result.execute = activeMask;
    result.operands[0] = decoder.destination(decoder.operand(0), Size::k32);
}

} // namespace

void addExchanges(Opcodes& opcodes)
{
    opcodes["shfl.sync.up.b32"] = decodeShuffle<Shuffle::kUP>;
    opcodes["shfl.sync.down.b32"] = decodeShuffle<Shuffle::kDOWN>;
    opcodes["shfl.sync.bfly.b32"] = decodeShuffle<Shuffle::kBUTTERFLY>;
    opcodes["shfl.sync.idx.b32"] = decodeShuffle<Shuffle::kINDEX>;
    opcodes["vote.sync.ballot.b32"] = decodeVote<ballot, true>;
    opcodes["vote.sync.any.pred"] = decodeVote<any, false>;
    opcodes["vote.sync.all.pred"] = decodeVote<all, false>;
    opcodes["match.any.sync.b32"] = decodeWords<matchAny>;
    opcodes["redux.sync.add.s32"] = decodeWords<reduce<uint32_t, sum<uint32_t>>>;
    opcodes["redux.sync.add.u32"] = decodeWords<reduce<uint32_t, sum<uint32_t>>>;
    opcodes["redux.sync.min.s32"] = decodeWords<reduce<int32_t, smaller<int32_t>>>;
    opcodes["redux.sync.max.s32"] = decodeWords<reduce<int32_t, larger<int32_t>>>;
    opcodes["redux.sync.min.u32"] = decodeWords<reduce<uint32_t, smaller<uint32_t>>>;
    opcodes["redux.sync.max.u32"] = decodeWords<reduce<uint32_t, larger<uint32_t>>>;
    opcodes["activemask.b32"] = decodeActiveMask;
}

} // namespace lfx::ptx
