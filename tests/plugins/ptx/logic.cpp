// Logic, shifts and bit fields.
//
// Source: PTX ISA, "Logic and Shift Instructions", "Integer Arithmetic Instructions", "prmt".
#include "lanewise.h"

#include <algorithm>
#include <type_traits>

namespace lfx::ptx
{
namespace
{

template <typename T>
T bitAnd(T a, T b)
{
    return a & b;
}

template <typename T>
T bitOr(T a, T b)
{
    return a | b;
}

template <typename T>
T bitXor(T a, T b)
{
    return a ^ b;
}

template <typename T>
T bitNot(T a)
{
    return static_cast<T>(~a);
}

bool notPredicate(bool a)
{
    return !a;
}

// Amounts beyond the width shift everything out.
template <typename T>
T shiftLeft(T a, uint32_t amount)
{
    return amount >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << amount);
}

template <typename T>
T shiftRight(T a, uint32_t amount)
{
    uint32_t const last = 8 * sizeof(T) - 1;
    if (std::is_unsigned_v<T> && amount > last)
    {
        return T{0};
    }
    return static_cast<T>(a >> (amount > last ? last : amount));
}

uint32_t funnel(uint32_t low, uint32_t high, uint32_t amount, bool left)
{
    uint64_t const both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<uint32_t>(left ? both << amount >> 32 : both >> amount);
}

template <bool kLEFT, bool kWRAP>
uint32_t funnelShift(uint32_t low, uint32_t high, uint32_t amount)
{
    return funnel(low, high, kWRAP ? amount & 31U : std::min(amount, 32U), kLEFT);
}

template <typename T>
T bitFieldInsert(T a, T b, uint32_t position, uint32_t length)
{
    uint32_t const width = 8 * sizeof(T);
    uint32_t const begin = position & 0xffU;
    uint32_t const count = length & 0xffU;
    if (begin >= width || count == 0)
    {
        return b;
    }
    T const ones = count >= width ? ~T{0} : static_cast<T>((T{1} << count) - 1);
    T const mask = static_cast<T>(ones << begin);
    return (b & ~mask) | (static_cast<T>(a << begin) & mask);
}

template <typename T>
uint32_t populationCount(T a)
{
    return static_cast<uint32_t>(__builtin_popcountll(a));
}

uint32_t countLeadingZeros(uint32_t a)
{
    return a == 0 ? 32 : static_cast<uint32_t>(__builtin_clz(a));
}

uint32_t reverseBits(uint32_t a)
{
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i)
    {
        result |= (a >> i & 1U) << (31 - i);
    }
    return result;
}

uint32_t bitFieldExtract(uint32_t a, uint32_t position, uint32_t length)
{
    uint32_t const count = length & 0xffU;
    uint32_t const shifted = shiftRight(a, position & 0xffU);
    return count >= 32 ? shifted : shifted & ((1U << count) - 1);
}

uint32_t permuteBytes(uint32_t a, uint32_t b, uint32_t selector)
{
    uint64_t const bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
    {
        uint32_t const choice = selector >> (4 * i) & 0xfU;
        uint32_t const byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7U))) & 0xffU;
        bool const replicatesSign = choice >= 8;
        result |= (replicatesSign ? (byte & 0x80U) != 0 ? 0xffU : 0U : byte) << (8 * i);
    }
    return result;
}

uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table)
{
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i)
    {
        if ((table >> i & 1U) != 0)
        {
            result |= ((i & 4) != 0 ? a : ~a) & ((i & 2) != 0 ? b : ~b) & ((i & 1) != 0 ? c : ~c);
        }
    }
    return result;
}

template <typename T>
void addBits(Opcodes& opcodes, std::string const& type)
{
    opcodes["and." + type] = lanewise<bitAnd<T>>;
    opcodes["or." + type] = lanewise<bitOr<T>>;
    opcodes["xor." + type] = lanewise<bitXor<T>>;
    if constexpr (!std::is_same_v<T, bool>)
    {
        std::string const width = type.substr(1);
        opcodes["not." + type] = lanewise<bitNot<T>>;
        opcodes["shl." + type] = lanewise<shiftLeft<T>>;
        opcodes["shr.b" + width] = opcodes["shr.u" + width] = lanewise<shiftRight<T>>;
        opcodes["shr.s" + width] = lanewise<shiftRight<std::make_signed_t<T>>>;
    }
}

void addBitFields(Opcodes& opcodes)
{
    opcodes["not.pred"] = lanewise<notPredicate>;
    opcodes["shf.l.wrap.b32"] = lanewise<funnelShift<true, true>>;
    opcodes["shf.l.clamp.b32"] = lanewise<funnelShift<true, false>>;
    opcodes["shf.r.wrap.b32"] = lanewise<funnelShift<false, true>>;
    opcodes["shf.r.clamp.b32"] = lanewise<funnelShift<false, false>>;
    opcodes["bfi.b32"] = lanewise<bitFieldInsert<uint32_t>>;
    opcodes["bfi.b64"] = lanewise<bitFieldInsert<uint64_t>>;
    opcodes["bfe.u32"] = lanewise<bitFieldExtract>;
    opcodes["popc.b32"] = lanewise<populationCount<uint32_t>>;
    opcodes["popc.b64"] = lanewise<populationCount<uint64_t>>;
    opcodes["clz.b32"] = lanewise<countLeadingZeros>;
    opcodes["brev.b32"] = lanewise<reverseBits>;
    opcodes["prmt.b32"] = lanewise<permuteBytes>;
    opcodes["lop3.b32"] = lanewise<logic3>;
}

} // namespace

void addLogic(Opcodes& opcodes)
{
    addBits<bool>(opcodes, "pred");
    addBits<uint16_t>(opcodes, "b16");
    addBits<uint32_t>(opcodes, "b32");
    addBits<uint64_t>(opcodes, "b64");
    addBitFields(opcodes);
}

} // namespace lfx::ptx
