// A warp that executes the code of a kernel. Lanes may branch apart: those that are furthest behind in the code run first,
// so that they meet again where their paths join.
#pragma once

#include "machine.h"

namespace lfx::ptx
{

class Warp
{
public:
    Warp(Code const& code, Block& block, uint32_t index);

    // Puts all lanes at the start of a block's code, with no register defined.
    void start(Launch const& launch, Dimensions const& blockIndex);

    // Runs until the warp has ended or all its lanes wait at a barrier of the block.
    void run();

    bool hasEnded() const
    {
        return mAlive == 0;
    }

    // The barrier at which the warp waits.
    Instruction const& barrier() const
    {
        return mCode.instructions[mGroups.front().at];
    }

    // Lets the warp pass the barrier.
    void release()
    {
        mGroups.front().waits = false;
        ++mGroups.front().at;
    }

    Registers& registers()
    {
        return mLanes.registers;
    }

    // Throws Error: the fault, and where it is.
    [[noreturn]] void fail(Fault const& fault) const;

private:
    // Lanes that are at the same instruction.
    struct Group
    {
        uint32_t at;
        uint32_t lanes;
        bool waits; // for other lanes, to execute the instruction together
    };

    uint32_t special(std::string const& name, Launch const& launch, Dimensions const& blockIndex, uint32_t lane) const;
    void place(uint32_t at, uint32_t lanes, bool waits);
    uint32_t executingLanes(Instruction const& instruction, uint32_t lanes);
    bool converged(Instruction const& instruction, uint32_t executing);
    void runGroup(Group const& group);
    bool goesOn(Instruction const& instruction, uint32_t at, uint32_t lanes, uint32_t executing);
    [[noreturn]] void failWaiting();

    Code const& mCode;
    Lanes mLanes;
    std::vector<Group> mGroups; // by `at`
    uint32_t mAlive = 0;
    uint64_t mExecuted = 0;
    Instruction const* mCurrent = nullptr;
};

} // namespace lfx::ptx
