// Blocks and warps that execute the code of a kernel.
#pragma once

#include "instruction.h"

#include <memory>

namespace lfx::ptx
{

struct Dimensions
{
    uint32_t x, y, z;
};

struct Launch
{
    Dimensions grid;
    Dimensions block;
    size_t sharedBytes; // in addition to those that the kernel declares
    void const* const* arguments;
};

// What the warps of a block share.
class Block
{
public:
    GlobalMemory& global;
    SharedMemory shared;
    std::vector<uint8_t> parameters;
    uint32_t epoch = 0; // counts barriers, and blocks
};

// Runs every block, one after another. Throws Error.
void run(Code const& code, Launch const& launch, GlobalMemory& global);

// Resolves the opcodes and operands of a kernel.
std::unique_ptr<Code> decode(Kernel kernel);

} // namespace lfx::ptx
