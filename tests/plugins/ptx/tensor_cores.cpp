// ldmatrix and mma.
//
// Source: PTX ISA, "Warp-level matrix load instruction: ldmatrix", "Matrix fragments for mma.m16n8k16 with floating point
// type".
#include "address.h"
#include "float16.h"

namespace lfx::ptx
{
namespace
{

void requireWholeWarp(Decoder& decoder, Instruction& result)
{
    result.flow = Flow::kCONVERGE;
    result.members = static_cast<int32_t>(decoder.constant(Size::k32, kALL_LANES));
}

// ldmatrix.m8n8.xN: lanes 8i to 8i + 7 have the addresses of the rows of matrix i. operands: address, its size, then one
// register for each matrix.
template <bool kTRANSPOSED>
void loadMatrices(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    Registers& registers = lanes.registers;
    bool const isLong = instruction.operands[1] == static_cast<uint32_t>(Size::k64);
    Address const address{instruction.operands[0], isLong, instruction.offset};
    uint32_t const matrices = instruction.count;
    uint32_t const addressed = matrices == 4 ? kALL_LANES : (1U << (8 * matrices)) - 1;
    requireDefined(address.defined(registers), addressed, "an address");
    uint16_t rows[4][8][8];
    forEachLane(addressed, [&](int lane) {
        uint32_t const from = sharedAddress(address.of(registers, lane));
        if (from % 16 != 0)
        {
            throw Fault("ldmatrix of an address that is no multiple of 16", lane);
        }
        lanes.block.shared.read(from, rows[lane / 8][lane % 8], 16, accessor(lanes, kWHOLE_WARP));
    });
    for (uint32_t m = 0; m < matrices; ++m)
    {
        uint32_t const target = instruction.operands[2 + m];
        for (int lane = 0; lane < kLANES; ++lane)
        {
            uint32_t pair = 0;
            for (int i = 0; i < 2; ++i)
            {
                int const line = lane / 4;
                int const element = lane % 4 * 2 + i;
                uint32_t const value = kTRANSPOSED ? rows[m][element][line] : rows[m][line][element];
                pair |= value << (16 * i);
            }
            registers.set<uint32_t>(target, lane, pair);
        }
        registers.defined<uint32_t>(target) |= executing;
    }
}

template <uint32_t kMATRICES, bool kTRANSPOSED>
void decodeLoad(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(2);
    requireWholeWarp(decoder, result);
    result.execute = loadMatrices<kTRANSPOSED>;
    result.count = kMATRICES;
    Size size{};
    result.operands[0] = decoder.address(decoder.operand(1), result, size);
    result.operands[1] = static_cast<uint32_t>(size);
    auto const targets = decoder.elements(decoder.operand(0), kMATRICES);
    for (uint32_t i = 0; i < kMATRICES; ++i)
    {
        result.operands[2 + i] = decoder.destination(targets[i], Size::k32);
    }
}

// Where an mma has its operands: 4 registers of d, 4 of a, 2 of b, 4 of c.
constexpr size_t kA = 4;
constexpr size_t kB = 8;
constexpr size_t kC = 10;
constexpr size_t kEND = 14;

template <float (*kTO_FLOAT)(uint16_t)>
float element(Registers const& registers, uint32_t index, int lane, int half)
{
    return kTO_FLOAT(static_cast<uint16_t>(registers.get<uint32_t>(index, lane) >> (16 * half)));
}

// d (16×8) = a (16×16) · b (16×8) + c. Products are exact in float32; they are added one by one.
template <float (*kTO_FLOAT)(uint16_t)>
void multiplyMatrices(Instruction const& instruction, Lanes& lanes, uint32_t executing)
{
    auto const& operands = instruction.operands;
    Registers& registers = lanes.registers;
    float a[16][16];
    float b[16][8];
    float d[16][8];
    uint32_t defined = kALL_LANES;
    for (size_t i = kA; i < kEND; ++i)
    {
        defined &= registers.defined<uint32_t>(operands[i]);
    }
    for (int lane = 0; lane < kLANES; ++lane)
    {
        int const group = lane / 4;
        int const column = lane % 4 * 2;
        for (int i = 0; i < 8; ++i) // register i / 2, half i % 2
        {
            int const row = group + (i / 2 % 2 == 0 ? 0 : 8);
            a[row][column + i % 2 + (i < 4 ? 0 : 8)] = element<kTO_FLOAT>(registers, operands[kA + i / 2], lane, i % 2);
        }
        for (int i = 0; i < 4; ++i)
        {
            b[column + i % 2 + (i < 2 ? 0 : 8)][group]
                = element<kTO_FLOAT>(registers, operands[kB + i / 2], lane, i % 2);
            d[group + (i < 2 ? 0 : 8)][column + i % 2] = registers.get<float>(operands[kC + i], lane);
        }
    }
    for (int row = 0; row < 16; ++row)
    {
        for (int k = 0; k < 16; ++k)
        {
            for (int column = 0; column < 8; ++column)
            {
                d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (int i = 0; i < 4; ++i)
    {
        for (int lane = 0; lane < kLANES; ++lane)
        {
            registers.set<float>(operands[i], lane, d[lane / 4 + (i < 2 ? 0 : 8)][lane % 4 * 2 + i % 2]);
        }
        // An undefined source makes the whole matrix undefined.
        mergeDefined(registers.defined<float>(operands[i]), executing, defined == kALL_LANES ? kALL_LANES : 0);
    }
}

template <float (*kTO_FLOAT)(uint16_t)>
void decodeProduct(Decoder& decoder, Instruction& result)
{
    decoder.expectOperands(4);
    requireWholeWarp(decoder, result);
    result.execute = multiplyMatrices<kTO_FLOAT>;
    size_t next = 0;
    for (auto const& [operand, count] : {std::pair(0, 4), {1, 4}, {2, 2}, {3, 4}})
    {
        for (Operand const& part : decoder.elements(decoder.operand(operand), count))
        {
            result.operands[next++]
                = operand == 0 ? decoder.destination(part, Size::k32) : decoder.source(part, Size::k32);
        }
    }
}

} // namespace

void addTensorCores(Opcodes& opcodes)
{
    std::string const load = "ldmatrix.sync.aligned.m8n8";
    opcodes[load + ".x1.shared.b16"] = decodeLoad<1, false>;
    opcodes[load + ".x2.shared.b16"] = decodeLoad<2, false>;
    opcodes[load + ".x4.shared.b16"] = decodeLoad<4, false>;
    opcodes[load + ".x1.trans.shared.b16"] = decodeLoad<1, true>;
    opcodes[load + ".x2.trans.shared.b16"] = decodeLoad<2, true>;
    opcodes[load + ".x4.trans.shared.b16"] = decodeLoad<4, true>;
    std::string const product = "mma.sync.aligned.m16n8k16.row.col.f32";
    opcodes[product + ".f16.f16.f32"] = decodeProduct<fromHalf>;
    opcodes[product + ".bf16.bf16.f32"] = decodeProduct<fromBfloat16>;
}

} // namespace lfx::ptx
