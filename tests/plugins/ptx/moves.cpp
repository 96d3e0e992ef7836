// mov and cvta.
#include "address.h"
#include "lanewise.h"

namespace lfx::ptx
{
namespace
{

template <typename T>
T copy(T a)
{
    return a;
}

template <uint64_t kDISTANCE>
uint64_t moveAddress(uint64_t address)
{
    return address + kDISTANCE;
}

// mov.b32 d, {low, high}: halves of 16 or 32 bits.
template <typename Whole, typename Part>
void packParts(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    auto const& operands = instruction.operands;
    Registers& registers = lanes.registers;
    uint32_t const defined = registers.defined<Part>(operands[1]) & registers.defined<Part>(operands[2]);
    forEachLane(executing, [&](int lane) {
        Whole const low = registers.get<Part>(operands[1], lane);
        Whole const high = registers.get<Part>(operands[2], lane);
        registers.set<Whole>(operands[0], lane, low | high << (8 * sizeof(Part)));
    });
    mergeDefined(registers.defined<Whole>(operands[0]), executing, defined);
}

// mov.b32 {low, high}, a.
template <typename Whole, typename Part>
void unpackParts(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    auto const& operands = instruction.operands;
    Registers& registers = lanes.registers;
    uint32_t const defined = registers.defined<Whole>(operands[2]);
    forEachLane(executing, [&](int lane) {
        Whole const whole = registers.get<Whole>(operands[2], lane);
        registers.set<Part>(operands[0], lane, static_cast<Part>(whole));
        registers.set<Part>(operands[1], lane, static_cast<Part>(whole >> (8 * sizeof(Part))));
    });
    mergeDefined(registers.defined<Part>(operands[0]), executing, defined);
    mergeDefined(registers.defined<Part>(operands[1]), executing, defined);
}

template <typename Whole, typename Part>
void decodeParts(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(2);
    Operand const& target = decoder.operand(0);
    Operand const& source = decoder.operand(1);
    if (target.kind == Operand::Kind::kVECTOR)
    {
        result.execute = unpackParts<Whole, Part>;
        auto const parts = decoder.elements(target, 2);
        result.operands[0] = decoder.destination(parts[0], sizeOf<Part>());
        result.operands[1] = decoder.destination(parts[1], sizeOf<Part>());
        result.operands[2] = decoder.source(source, sizeOf<Whole>());
    }
    else if (source.kind == Operand::Kind::kVECTOR)
    {
        result.execute = packParts<Whole, Part>;
        auto const parts = decoder.elements(source, 2);
        result.operands[0] = decoder.destination(target, sizeOf<Whole>());
        result.operands[1] = decoder.source(parts[0], sizeOf<Part>());
        result.operands[2] = decoder.source(parts[1], sizeOf<Part>());
    }
    else
    {
        Lanewise<&copy<Whole>>::decode(decoder, result);
    }
}

void requireGlobal(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    forEachLane(executing, [&](int lane) {
        uint64_t const address = registers.get<uint64_t>(instruction.operands[1], lane);
        if (isSharedWindow(address))
        {
            throw Fault("cvta.to.global of an address in shared memory", lane);
        }
        registers.set<uint64_t>(instruction.operands[0], lane, address);
    });
    mergeDefined(registers.defined<uint64_t>(instruction.operands[0]), executing,
        registers.defined<uint64_t>(instruction.operands[1]));
}

void decodeToGlobal(Decoder& decoder, Instruction& result)
{
    Lanewise<&copy<uint64_t>>::decode(decoder, result);
    result.execute = requireGlobal;
}

} // namespace

void addMoves(Opcodes& opcodes)
{
    opcodes["mov.pred"] = lanewise<copy<bool>>;
    for (char const* const type : {"b16", "u16", "s16"})
    {
        opcodes[std::string("mov.") + type] = lanewise<copy<uint16_t>>;
    }
    for (char const* const type : {"u32", "s32", "f32"})
    {
        opcodes[std::string("mov.") + type] = lanewise<copy<uint32_t>>;
    }
    for (char const* const type : {"u64", "s64"})
    {
        opcodes[std::string("mov.") + type] = lanewise<copy<uint64_t>>;
    }
    opcodes["mov.b32"] = decodeParts<uint32_t, uint16_t>;
    opcodes["mov.b64"] = decodeParts<uint64_t, uint32_t>;
    opcodes["cvta.global.u64"] = lanewise<copy<uint64_t>>;
    opcodes["cvta.to.global.u64"] = decodeToGlobal;
    opcodes["cvta.shared.u64"] = lanewise<moveAddress<kSHARED_WINDOW>>;
    opcodes["cvta.to.shared.u64"] = lanewise<moveAddress<0 - kSHARED_WINDOW>>;
}

} // namespace lfx::ptx
