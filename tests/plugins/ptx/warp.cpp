#include "warp.h"

#include <algorithm>

namespace lfx::ptx
{
namespace
{

constexpr uint64_t kMAX_INSTRUCTIONS = 20'000'000; // of a warp in a block; more is taken for a loop without end

} // namespace

Warp::Warp(Code const& code, Block& block, uint32_t index)
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

void Warp::start(Launch const& launch, Dimensions const& blockIndex)
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

uint32_t Warp::special(std::string const& name, Launch const& launch, Dimensions const& blockIndex, uint32_t lane) const
{
    if (name == "%laneid")
    {
        return lane;
    }
    uint32_t const thread = mLanes.index * kLANES + lane;
    Dimensions const threadIndex{
        thread % launch.block.x, thread / launch.block.x % launch.block.y, thread / launch.block.x / launch.block.y};
    bool const isOfGrid = name.find("cta") != std::string::npos;
    bool const isCount = name.find("%n") == 0;
    Dimensions const& value = isOfGrid ? (isCount ? launch.grid : blockIndex) : isCount ? launch.block : threadIndex;
    return name.back() == 'x' ? value.x : name.back() == 'y' ? value.y : value.z;
}

void Warp::run()
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

void Warp::fail(Fault const& fault) const
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

void Warp::failWaiting()
{
    std::string lines;
    for (Group const& group : mGroups)
    {
        mCurrent = &mCode.instructions[group.at];
        lines += (lines.empty() ? "" : " and ") + std::to_string(mCurrent->statement->line);
    }
    fail(Fault("lanes of a warp wait for one another forever, at PTX lines " + lines, -1));
}

// Adds lanes at an instruction to those that are there.
void Warp::place(uint32_t at, uint32_t lanes, bool waits)
{
    if (lanes == 0)
    {
        return;
    }
    auto const next = std::find_if(mGroups.begin(), mGroups.end(), [at](Group const& group) { return group.at >= at; });
    if (next != mGroups.end() && next->at == at)
    {
        next->lanes |= lanes;
        next->waits = waits;
        return;
    }
    mGroups.insert(next, {at, lanes, waits});
}

uint32_t Warp::executingLanes(Instruction const& instruction, uint32_t lanes)
{
    if (instruction.guard < 0)
    {
        return lanes;
    }
    requireDefined(mLanes.registers.predicatesDefined[instruction.guard], lanes, "a predicate");
    uint32_t const guard = mLanes.registers.predicates[instruction.guard];
    return lanes & (instruction.guardNegated ? ~guard : guard);
}

// Whether all lanes that the instruction's mask names are here.
bool Warp::converged(Instruction const& instruction, uint32_t executing)
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

// Runs lanes until they wait, end, part, or reach other lanes.
void Warp::runGroup(Group const& group)
{
    uint32_t at = group.at;
    auto const ahead = std::find_if(mGroups.begin(), mGroups.end(), [at](Group const& other) { return other.at > at; });
    uint32_t const meeting = ahead == mGroups.end() ? UINT32_MAX : ahead->at;
    for (; at < meeting; ++at)
    {
        mCurrent = &mCode.instructions[at];
        Instruction const& instruction = *mCurrent;
        if (++mExecuted > kMAX_INSTRUCTIONS)
        {
            throw Fault("a loop that does not end", -1);
        }
        uint32_t const executing = executingLanes(instruction, group.lanes);
        if (executing == 0)
        {
            continue;
        }
        if (instruction.flow == Flow::kNEXT)
        {
            instruction.execute(instruction, mLanes, executing);
        }
        else if (!goesOn(instruction, at, group.lanes, executing))
        {
            return;
        }
    }
    place(at, group.lanes, false);
}

// Executes an instruction with an effect on the flow. Returns whether all lanes go on to the next one.
bool Warp::goesOn(Instruction const& instruction, uint32_t at, uint32_t lanes, uint32_t executing)
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
    if (!converged(instruction, executing) || instruction.flow == Flow::kBLOCK_BARRIER)
    {
        place(at, lanes, true);
        return false;
    }
    mLanes.epoch += instruction.flow == Flow::kWARP_BARRIER && executing == kALL_LANES ? 1 : 0;
    instruction.execute(instruction, mLanes, executing);
    return true;
}

} // namespace lfx::ptx
