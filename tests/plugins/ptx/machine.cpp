// Blocks run one after another; their warps too, each until it reaches a barrier of the block.
#include "machine.h"
#include "warp.h"

namespace lfx::ptx
{
namespace
{

// bar.red.or.pred: the disjunction over all threads.
void reduceOr(std::vector<Warp>& warps)
{
    bool result = false;
    for (Warp& warp : warps)
    {
        Registers& registers = warp.registers();
        uint32_t const source = warp.barrier().operands[1];
        if (registers.predicatesDefined[source] != kALL_LANES)
        {
            warp.fail(Fault("an undefined predicate is reduced", -1));
        }
        result |= registers.predicates[source] != 0;
    }
    for (Warp& warp : warps)
    {
        uint32_t const target = warp.barrier().operands[0];
        warp.registers().predicates[target] = result ? kALL_LANES : 0;
        warp.registers().predicatesDefined[target] = kALL_LANES;
    }
}

// Every warp waits at a barrier of the block.
void passBarrier(std::vector<Warp>& warps, Block& block)
{
    uint32_t const isReduction = warps.front().barrier().count;
    for (Warp& warp : warps)
    {
        if (warp.barrier().count != isReduction)
        {
            warp.fail(Fault("warps wait at different kinds of barriers", -1));
        }
    }
    if (isReduction != 0)
    {
        reduceOr(warps);
    }
    ++block.epoch;
    for (Warp& warp : warps)
    {
        warp.release();
    }
}

void runBlock(std::vector<Warp>& warps, Block& block)
{
    for (;;)
    {
        size_t ended = 0;
        for (Warp& warp : warps)
        {
            warp.run();
            ended += warp.hasEnded() ? 1 : 0;
        }
        if (ended == warps.size())
        {
            return;
        }
        for (Warp& warp : warps)
        {
            if (ended != 0 && !warp.hasEnded())
            {
                warp.fail(Fault("a barrier of the block is not reached by threads that have ended", -1));
            }
        }
        passBarrier(warps, block);
    }
}

std::vector<uint8_t> parametersOf(Kernel const& kernel, void const* const* arguments)
{
    std::vector<uint8_t> result;
    for (size_t i = 0; i < kernel.parameterOffsets.size(); ++i)
    {
        result.resize(kernel.parameterOffsets[i] + kernel.parameterBytes[i]);
        std::memcpy(&result[kernel.parameterOffsets[i]], arguments[i], kernel.parameterBytes[i]);
    }
    return result;
}

} // namespace

void run(Code const& code, Launch const& launch, GlobalMemory& global)
{
    uint32_t const threads = launch.block.x * launch.block.y * launch.block.z;
    if (threads == 0 || threads > code.kernel.maxThreads || threads % kLANES != 0)
    {
        throw Error(code.kernel.name + ": blocks of " + std::to_string(threads) + " threads; allowed are multiples of "
            + std::to_string(kLANES) + " up to " + std::to_string(code.kernel.maxThreads));
    }
    size_t const alignment = code.kernel.sharedAlignment;
    size_t const sharedBytes
        = (code.kernel.staticSharedBytes + alignment - 1) / alignment * alignment + launch.sharedBytes;
    Block block{global, {}, parametersOf(code.kernel, launch.arguments)};
    std::vector<Warp> warps;
    warps.reserve(threads / kLANES);
    for (uint32_t i = 0; i < threads / kLANES; ++i)
    {
        warps.emplace_back(code, block, i);
    }
    Dimensions index{};
    for (index.z = 0; index.z < launch.grid.z; ++index.z)
    {
        for (index.y = 0; index.y < launch.grid.y; ++index.y)
        {
            for (index.x = 0; index.x < launch.grid.x; ++index.x)
            {
                ++block.epoch;
                block.shared.reset(sharedBytes, alignment);
                for (Warp& warp : warps)
                {
                    warp.start(launch, index);
                }
                runBlock(warps, block);
            }
        }
    }
}

std::unique_ptr<Code> decode(Kernel kernel)
{
    auto code = std::make_unique<Code>();
    code->kernel = std::move(kernel);
    Decoder decoder(*code);
    // The end of the text ends the threads.
    code->kernel.statements.push_back({});
    code->kernel.statements.back().opcode = code->kernel.statements.back().text = "ret";
    for (Statement const& statement : code->kernel.statements)
    {
        code->instructions.emplace_back();
        decoder.decode(statement, code->instructions.back());
    }
    return code;
}

} // namespace lfx::ptx
