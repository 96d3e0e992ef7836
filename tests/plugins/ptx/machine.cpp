// Warps run one after another, each until it reaches a barrier of the block. Of the lanes of a warp, those that are
// furthest behind in the code run first, so that lanes that branched apart meet again where their paths join.
#include "machine.h"

#include <algorithm>

namespace lfx::ptx
{
namespace
{

constexpr uint64_t kMAX_INSTRUCTIONS = 20'000'000; // of a warp; more is taken for a loop without end

// Lanes of a warp that are at the same instruction.
struct Group
{
    uint32_t at;
    uint32_t lanes;
    bool waits; // for other lanes, to execute the instruction together
};

class Warp
{
public:
    Warp(Code const& code, Block& block, uint32_t index)
        : mCode(code)
        , mLanes{block, index, 1, {}, {}}
    {
        Registers& registers = mLanes.registers;
        registers.words.resize(code.words);
        registers.longs.resize(code.longs);
        registers.predicates.resize(code.predicates);
        for (auto const& [target, value] : code.wordConstants)
        {
            registers.words[target].fill(value);
        }
        for (auto const& [target, value] : code.longConstants)
        {
            registers.longs[target].fill(value);
        }
        for (auto const& [target, value] : code.predicateConstants)
        {
            registers.predicates[target] = value ? kALL_LANES : 0;
        }
    }

    void start(Launch const& launch, Dimensions const& blockIndex)
    {
        Registers& registers = mLanes.registers;
        registers.wordsDefined.assign(mCode.words, 0);
        registers.longsDefined.assign(mCode.longs, 0);
        registers.predicatesDefined.assign(mCode.predicates, 0);
        for (auto const& constant : mCode.wordConstants)
        {
            registers.wordsDefined[constant.first] = kALL_LANES;
        }
        for (auto const& constant : mCode.longConstants)
        {
            registers.longsDefined[constant.first] = kALL_LANES;
        }
        for (auto const& constant : mCode.predicateConstants)
        {
            registers.predicatesDefined[constant.first] = kALL_LANES;
        }
        for (auto const& [name, target] : mCode.specialRegisters)
        {
            registers.wordsDefined[target] = kALL_LANES;
            for (uint32_t lane = 0; lane < kLANES; ++lane)
            {
                registers.words[target][lane] = special(name, launch, blockIndex, lane);
            }
        }
        mLanes.copies = {};
        mGroups = {{0, kALL_LANES, false}};
        mAlive = kALL_LANES;
        mExecuted = 0;
        ++mLanes.epoch;
    }

    bool hasEnded() const
    {
        return mAlive == 0;
    }

    // The barrier at which the warp waits.
    Instruction const& barrier() const
    {
        return mCode.instructions[mGroups.front().at];
    }

    Lanes& lanes()
    {
        return mLanes;
    }

    // Lets the warp pass the barrier.
    void release()
    {
        mGroups.front().waits = false;
        ++mGroups.front().at;
    }

    // Runs until the warp has ended or all its lanes wait at a barrier of the block.
    void run()
    {
        while (!mGroups.empty())
        {
            auto const ready
                = std::find_if(mGroups.begin(), mGroups.end(), [](Group const& group) { return !group.waits; });
            if (ready == mGroups.end())
            {
                if (mGroups.size() == 1 && barrier().flow == Flow::kBLOCK_BARRIER && mAlive == kALL_LANES)
                {
                    return;
                }
                failWaiting();
            }
            Group const group = *ready;
            mGroups.erase(ready);
            try
            {
                runGroup(group);
            }
            catch (Fault const& fault)
            {
                fail(fault);
            }
        }
    }

    [[noreturn]] void fail(Fault const& fault) const
    {
        Statement const& statement = *mCurrent->statement;
        std::string where = mCode.kernel.name + ", warp " + std::to_string(mLanes.index);
        if (fault.lane >= 0)
        {
            where += ", lane " + std::to_string(fault.lane);
        }
        throw Error(std::string(fault.what()) + " (" + where + ", PTX line " + std::to_string(statement.line) + ": "
            + statement.text + ")");
    }

private:
    uint32_t special(std::string const& name, Launch const& launch, Dimensions const& blockIndex, uint32_t lane) const
    {
        if (name == "%laneid")
        {
            return lane;
        }
        uint32_t const thread = mLanes.index * kLANES + lane;
        Dimensions const threadIndex{thread % launch.block.x, thread / launch.block.x % launch.block.y,
            thread / launch.block.x / launch.block.y};
        bool const isOfGrid = name.find("cta") != std::string::npos;
        bool const isCount = name.find("%n") == 0;
        Dimensions const& value = isOfGrid ? (isCount ? launch.grid : blockIndex)
            : isCount                      ? launch.block
                                           : threadIndex;
        return name.back() == 'x' ? value.x : name.back() == 'y' ? value.y : value.z;
    }

    // Adds lanes at an instruction to those that are there.
    void place(uint32_t at, uint32_t lanes, bool waits)
    {
        if (lanes == 0)
        {
            return;
        }
        auto const next
            = std::find_if(mGroups.begin(), mGroups.end(), [at](Group const& group) { return group.at >= at; });
        if (next != mGroups.end() && next->at == at)
        {
            next->lanes |= lanes;
            next->waits = waits;
            return;
        }
        mGroups.insert(next, {at, lanes, waits});
    }

    uint32_t executingLanes(Instruction const& instruction, uint32_t lanes)
    {
        if (instruction.guard < 0)
        {
            return lanes;
        }
        requireDefined(mLanes.registers.predicatesDefined[instruction.guard], lanes, "a predicate");
        uint32_t const guard = mLanes.registers.predicates[instruction.guard];
        return lanes & (instruction.guardNegated ? ~guard : guard);
    }

    // Whether all lanes that are named by the mask of lanes are here.
    bool converged(Instruction const& instruction, uint32_t executing)
    {
        uint32_t const members = instruction.members;
        requireDefined(mLanes.registers.wordsDefined[members], executing, "a mask of lanes");
        uint32_t const named = mLanes.registers.words[members][__builtin_ctz(executing)];
        forEachLane(executing, [&](int lane) {
            if (mLanes.registers.words[members][lane] != named || (named >> lane & 1U) == 0)
            {
                throw Fault("lanes with different masks, or that their mask does not name", lane);
            }
        });
        if ((named & ~mAlive) != 0)
        {
            throw Fault("the whole warp is needed, but some of its lanes have ended", __builtin_ctz(named & ~mAlive));
        }
        return executing == named;
    }

    // Runs the lanes until they wait, end, part, or reach other lanes.
    void runGroup(Group group)
    {
        uint32_t at = group.at;
        uint32_t const lanes = group.lanes;
        auto const ahead
            = std::find_if(mGroups.begin(), mGroups.end(), [at](Group const& other) { return other.at > at; });
        uint32_t const meeting = ahead == mGroups.end() ? UINT32_MAX : ahead->at;
        for (; at < meeting; ++at)
        {
            mCurrent = &mCode.instructions[at];
            Instruction const& instruction = *mCurrent;
            if (++mExecuted > kMAX_INSTRUCTIONS)
            {
                throw Fault("a loop that does not end", -1);
            }
            uint32_t const executing = executingLanes(instruction, lanes);
            if (instruction.flow == Flow::kNEXT)
            {
                if (executing != 0)
                {
                    instruction.execute(instruction, mLanes, executing);
                }
                continue;
            }
            if (executing != 0 && !stays(instruction, at, lanes, executing))
            {
                return;
            }
        }
        place(at, lanes, false);
    }

    // Executes an instruction with an effect on the flow. Returns whether the lanes go on to the next one.
    bool stays(Instruction const& instruction, uint32_t at, uint32_t lanes, uint32_t executing)
    {
        switch (instruction.flow)
        {
        case Flow::kBRANCH:
            place(at + 1, lanes & ~executing, false);
            place(instruction.target, executing, false);
            return false;
        case Flow::kEXIT:
            mAlive &= ~executing;
            place(at + 1, lanes & ~executing, false);
            return false;
        default: break;
        }
        if (!converged(instruction, executing))
        {
            place(at, lanes, true);
            return false;
        }
        if (instruction.flow == Flow::kBLOCK_BARRIER)
        {
            place(at, lanes, true);
            return false;
        }
        mLanes.epoch += instruction.flow == Flow::kWARP_BARRIER && executing == kALL_LANES ? 1 : 0;
        instruction.execute(instruction, mLanes, executing);
        return true;
    }

    [[noreturn]] void failWaiting()
    {
        std::string lines;
        for (Group const& group : mGroups)
        {
            mCurrent = &mCode.instructions[group.at];
            lines += (lines.empty() ? "" : " and ") + std::to_string(mCurrent->statement->line);
        }
        fail(Fault("lanes of a warp wait for one another forever, at PTX lines " + lines, -1));
    }

    Code const& mCode;
    Lanes mLanes;
    std::vector<Group> mGroups; // by `at`
    uint32_t mAlive = 0;
    uint64_t mExecuted = 0;
    Instruction const* mCurrent = nullptr;
};

// bar.red.or.pred: the disjunction over all threads.
void reduceOr(std::vector<Warp>& warps)
{
    bool result = false;
    for (Warp& warp : warps)
    {
        Registers& registers = warp.lanes().registers;
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
        warp.lanes().registers.predicates[target] = result ? kALL_LANES : 0;
        warp.lanes().registers.predicatesDefined[target] = kALL_LANES;
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
