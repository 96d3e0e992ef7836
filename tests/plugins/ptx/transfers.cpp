// ld, st, atom and red.
//
// Source: PTX ISA, "Data Movement and Conversion Instructions", "Parallel Synchronization and Communication Instructions".
#include "address.h"

#include <algorithm>

namespace lfx::ptx
{
namespace
{

// operands[0] is the address, whose size is in operands[1]; the elements follow from operands[2] on.
constexpr size_t kADDRESS = 0;
constexpr size_t kADDRESS_SIZE = 1;
constexpr size_t kELEMENTS = 2;

Address addressOf(Instruction const& instruction)
{
    bool const isLong = instruction.operands[kADDRESS_SIZE] == static_cast<uint32_t>(Size::k64);
    return {instruction.operands[kADDRESS], isLong, instruction.offset};
}

void decodeAddress(Decoder& decoder, Operand const& operand, Space space, Instruction& result)
{
    Size size{};
    result.operands[kADDRESS] = decoder.address(operand, result, size);
    result.operands[kADDRESS_SIZE] = static_cast<uint32_t>(size);
    if (size == Size::k32 && space != Space::kSHARED)
    {
        decoder.failOperand(operand);
    }
}

bool isShared(Space space, uint64_t address)
{
    return space == Space::kSHARED || (space == Space::kGENERIC && isSharedWindow(address));
}

uint32_t inShared(Space space, uint64_t address)
{
    return sharedAddress(space == Space::kGENERIC ? address - kSHARED_WINDOW : address);
}

// The value of an element in memory, extended by its sign or zeros.
uint64_t extended(uint8_t const* data, Transfer const& transfer)
{
    uint64_t value = 0;
    std::memcpy(&value, data, transfer.elementBytes);
    int const unused = 64 - 8 * static_cast<int>(transfer.elementBytes);
    return transfer.isSigned ? static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused) : value;
}

uint64_t registerValue(Registers const& registers, Size size, uint32_t index, int lane)
{
    return size == Size::k64 ? registers.longs[index][lane] : registers.words[index][lane];
}

void setRegister(Registers& registers, Size size, uint32_t index, int lane, uint64_t value)
{
    if (size == Size::k64)
    {
        registers.longs[index][lane] = value;
    }
    else
    {
        registers.words[index][lane] = static_cast<uint32_t>(size == Size::k16 ? value & 0xffffU : value);
    }
}

// Bytes of the kernel's parameters, which are the same for every thread.
uint8_t const* parameterAt(std::vector<uint8_t> const& parameters, uint64_t address, size_t bytes, int lane)
{
    uint64_t const offset = address - kPARAMETER_WINDOW;
    if (address < kPARAMETER_WINDOW || offset > parameters.size() || parameters.size() - offset < bytes)
    {
        throw Fault("ld.param outside the parameters", lane);
    }
    if (offset % bytes != 0)
    {
        throw Fault("ld.param of an address that is no multiple of its size", lane);
    }
    return &parameters[offset];
}

void load(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    Transfer const& transfer = instruction.transfer;
    Address const address = addressOf(instruction);
    requireDefined(address.defined(registers), executing, "an address");
    size_t const bytes = transfer.elementBytes * transfer.count;
    forEachLane(executing, [&](int lane) {
        uint8_t data[16];
        uint64_t const from = address.of(registers, lane);
        if (transfer.space == Space::kPARAMETER)
        {
            std::memcpy(data, parameterAt(lanes.block.parameters, from, bytes, lane), bytes);
        }
        else if (isShared(transfer.space, from))
        {
            lanes.block.shared.read(inShared(transfer.space, from), data, bytes, accessor(lanes, lane));
        }
        else
        {
            std::memcpy(data, lanes.block.global.read(from, bytes, lane), bytes);
        }
        for (uint32_t i = 0; i < transfer.count; ++i)
        {
            setRegister(registers, transfer.size, instruction.operands[kELEMENTS + i], lane,
                extended(data + i * transfer.elementBytes, transfer));
        }
    });
    for (uint32_t i = 0; i < transfer.count; ++i)
    {
        registers.defined(transfer.size, instruction.operands[kELEMENTS + i]) |= executing;
    }
}

void store(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    Transfer const& transfer = instruction.transfer;
    Address const address = addressOf(instruction);
    requireDefined(address.defined(registers), executing, "an address");
    for (uint32_t i = 0; i < transfer.count; ++i)
    {
        requireDefined(
            registers.defined(transfer.size, instruction.operands[kELEMENTS + i]), executing, "a value to store");
    }
    size_t const bytes = transfer.elementBytes * transfer.count;
    forEachLane(executing, [&](int lane) {
        uint8_t data[16];
        for (uint32_t i = 0; i < transfer.count; ++i)
        {
            uint64_t const value = registerValue(registers, transfer.size, instruction.operands[kELEMENTS + i], lane);
            std::memcpy(data + i * transfer.elementBytes, &value, transfer.elementBytes);
        }
        uint64_t const to = address.of(registers, lane);
        if (isShared(transfer.space, to))
        {
            lanes.block.shared.write(inShared(transfer.space, to), data, bytes, accessor(lanes, lane));
        }
        else
        {
            std::memcpy(lanes.block.global.write(to, bytes, lane), data, bytes);
        }
    });
}

void decodeTransfer(Decoder& decoder, Instruction& result, Transfer const& transfer, bool loads)
{
    decoder.expectOperands(2);
    result.execute = loads ? load : store;
    result.transfer = transfer;
    decodeAddress(decoder, decoder.operand(loads ? 1 : 0), transfer.space, result);
    auto const elements = decoder.elements(decoder.operand(loads ? 0 : 1), transfer.count);
    if (loads || elements[0].kind == Operand::Kind::kNAME)
    {
        result.transfer.size = std::max(transfer.size, decoder.sizeOfRegister(elements[0])); // may be wider
    }
    Size const size = result.transfer.size;
    for (uint32_t i = 0; i < transfer.count; ++i)
    {
        result.operands[kELEMENTS + i]
            = loads ? decoder.destination(elements[i], size) : decoder.source(elements[i], size);
    }
}

template <typename T>
T exchange(T, T given)
{
    return given;
}

template <typename T>
T sum(T old, T given)
{
    return static_cast<T>(old + given);
}

template <typename T>
T smaller(T old, T given)
{
    return std::min(old, given);
}

template <typename T>
T larger(T old, T given)
{
    return std::max(old, given);
}

uint32_t bothBits(uint32_t old, uint32_t given)
{
    return old & given;
}

uint32_t eitherBit(uint32_t old, uint32_t given)
{
    return old | given;
}

uint32_t increment(uint32_t old, uint32_t last)
{
    return old >= last ? 0 : old + 1;
}

// operands: address, its size, target, value.
template <typename T, T (*kFUNCTION)(T, T), Space kSPACE>
void executeAtomic(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    Address const address = addressOf(instruction);
    uint32_t const target = instruction.operands[kELEMENTS];
    uint32_t const value = instruction.operands[kELEMENTS + 1];
    requireDefined(address.defined(registers), executing, "an address");
    requireDefined(registers.defined<T>(value), executing, "a value to store");
    forEachLane(executing, [&](int lane) {
        uint64_t const at = address.of(registers, lane);
        void* const memory = isShared(kSPACE, at)
            ? static_cast<void*>(&lanes.block.shared.atomic(inShared(kSPACE, at), accessor(lanes, lane)))
            : (lanes.block.global.read(at, sizeof(T), lane), lanes.block.global.write(at, sizeof(T), lane));
        T old;
        std::memcpy(&old, memory, sizeof(T));
        T const updated = kFUNCTION(old, registers.get<T>(value, lane));
        std::memcpy(memory, &updated, sizeof(T));
        registers.set<T>(target, lane, old);
    });
    registers.defined<T>(target) |= executing;
}

template <typename T, T (*kFUNCTION)(T, T), Space kSPACE>
void decodeAtomic(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(3);
    result.execute = executeAtomic<T, kFUNCTION, kSPACE>;
    decodeAddress(decoder, decoder.operand(1), kSPACE, result);
    result.operands[kELEMENTS] = decoder.destination(decoder.operand(0), sizeOf<T>());
    result.operands[kELEMENTS + 1] = decoder.source(decoder.operand(2), sizeOf<T>());
}

struct ElementType
{
    char const* name;
    uint32_t bytes;
    bool isSigned;
    Size size; // of its registers
};

constexpr ElementType kTYPES[] = {{"u8", 1, false, Size::k16}, {"s8", 1, true, Size::k16}, {"b16", 2, false, Size::k16},
    {"u16", 2, false, Size::k16}, {"s16", 2, true, Size::k16}, {"b32", 4, false, Size::k32},
    {"u32", 4, false, Size::k32}, {"s32", 4, true, Size::k32}, {"f32", 4, false, Size::k32},
    {"b64", 8, false, Size::k64}, {"u64", 8, false, Size::k64}, {"s64", 8, true, Size::k64}};

void addSpace(Opcodes& opcodes, std::string const& name, Space space, bool loads)
{
    for (ElementType const& type : kTYPES)
    {
        for (auto const& [vector, count] : {std::pair(".", 1U), {".v2.", 2U}, {".v4.", 4U}})
        {
            Transfer const transfer{space, type.bytes, type.isSigned, type.size, count};
            if (type.bytes * count <= 16)
            {
                opcodes[name + vector + type.name] = [transfer, loads](Decoder& decoder, Instruction& result) {
                    decodeTransfer(decoder, result, transfer, loads);
                };
            }
        }
    }
}

template <Space kSPACE>
void addAtomics(Opcodes& opcodes, std::string const& space)
{
    opcodes["atom" + space + ".exch.b32"] = decodeAtomic<uint32_t, exchange<uint32_t>, kSPACE>;
    opcodes["atom" + space + ".add.u32"] = decodeAtomic<uint32_t, sum<uint32_t>, kSPACE>;
    opcodes["atom" + space + ".add.s32"] = decodeAtomic<uint32_t, sum<uint32_t>, kSPACE>;
    opcodes["atom" + space + ".add.f32"] = decodeAtomic<float, sum<float>, kSPACE>;
    opcodes["atom" + space + ".inc.u32"] = decodeAtomic<uint32_t, increment, kSPACE>;
    opcodes["atom" + space + ".and.b32"] = decodeAtomic<uint32_t, bothBits, kSPACE>;
    opcodes["atom" + space + ".or.b32"] = decodeAtomic<uint32_t, eitherBit, kSPACE>;
    opcodes["atom" + space + ".min.s32"] = decodeAtomic<int32_t, smaller<int32_t>, kSPACE>;
    opcodes["atom" + space + ".max.s32"] = decodeAtomic<int32_t, larger<int32_t>, kSPACE>;
    opcodes["atom" + space + ".min.u32"] = decodeAtomic<uint32_t, smaller<uint32_t>, kSPACE>;
    opcodes["atom" + space + ".max.u32"] = decodeAtomic<uint32_t, larger<uint32_t>, kSPACE>;
}

} // namespace

void addTransfers(Opcodes& opcodes)
{
    for (auto const& [name, space] :
        {std::pair("", Space::kGENERIC), {".global", Space::kGLOBAL}, {".shared", Space::kSHARED}})
    {
        addSpace(opcodes, std::string("ld") + name, space, true);
        addSpace(opcodes, std::string("st") + name, space, false);
    }
    addSpace(opcodes, "ld.global.nc", Space::kGLOBAL, true);
    addSpace(opcodes, "ld.param", Space::kPARAMETER, true);
    addAtomics<Space::kGENERIC>(opcodes, "");
    addAtomics<Space::kGLOBAL>(opcodes, ".global");
    addAtomics<Space::kSHARED>(opcodes, ".shared");
}

} // namespace lfx::ptx
