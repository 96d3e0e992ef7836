// Instructions that compute each lane's result from the same lane's sources, made from a function of one lane.
#pragma once

#include "instruction.h"

namespace lfx::ptx
{

// The unsigned type of the same size.
template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, bool>, bool,
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

template <auto kFUNCTION>
struct Lanewise;

template <typename Result, typename... Arguments, Result (*kFUNCTION)(Arguments...)>
struct Lanewise<kFUNCTION>
{
    static void decode(Decoder& decoder, Instruction& result)
    {
        decoder.expectOperands(1 + sizeof...(Arguments));
        result.execute = execute;
        result.operands[0] = decoder.destination(decoder.operand(0), sizeOf<Result>());
        size_t i = 0;
        ((++i, result.operands[i] = decoder.source(decoder.operand(i), sizeOf<Arguments>())), ...);
    }

private:
    static void execute(Instruction const& instruction, Lanes& lanes, uint32_t executing)
    {
        run(instruction, lanes.registers, executing, std::index_sequence_for<Arguments...>{});
    }

    template <size_t... kI>
    static void run(
        Instruction const& instruction, Registers& registers, uint32_t executing, std::index_sequence<kI...>)
    {
        uint32_t const target = instruction.operands[0];
        uint32_t const defined
            = (kALL_LANES & ... & registers.template defined<Arguments>(instruction.operands[1 + kI]));
        std::array<Bits<Result>, kLANES> results; // of all lanes, since every function is safe for any source
        for (int lane = 0; lane < kLANES; ++lane)
        {
            Result const result = kFUNCTION(registers.template get<Arguments>(instruction.operands[1 + kI], lane)...);
            std::memcpy(&results[lane], &result, sizeof(result));
        }
        registers.store(target, results, executing);
        mergeDefined(registers.template defined<Result>(target), executing, defined);
    }
};

template <auto kFUNCTION>
constexpr auto lanewise = Lanewise<kFUNCTION>::decode;

} // namespace lfx::ptx
