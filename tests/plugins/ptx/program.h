// PTX text, parsed: kernels, their variables, and their statements, whose opcodes and operands are still words.
//
// Source: PTX ISA, "Syntax", "State Spaces, Types, and Variables".
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace lfx::ptx
{

class Error : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

// The sizes of registers.
enum class Size : uint8_t
{
    kPREDICATE,
    k16,
    k32,
    k64,
};

struct Operand
{
    enum class Kind : uint8_t
    {
        kNAME,    // a register, a special register, a label or a variable
        kINTEGER, // value
        kFLOAT,   // the bits of a float32 in value
        kADDRESS, // [name + value]
        kVECTOR,  // {elements}
        kPAIR,    // elements[0] | elements[1]
    };

    Kind kind = Kind::kNAME;
    bool negated = false; // !name
    std::string name;
    uint64_t value = 0;
    std::vector<Operand> elements;
};

struct Statement
{
    int32_t line = 0;
    std::string text;
    std::string guard; // predicate register, or empty
    bool guardNegated = false;
    std::string opcode; // with its modifiers
    std::vector<Operand> operands;
};

struct Variable
{
    size_t bytes = 0;
    size_t offset = 0; // in the parameters, or in shared memory
};

struct Kernel
{
    std::string name;
    std::map<std::string, Variable> parameters;
    std::vector<size_t> parameterOffsets; // in the order of the declaration
    std::vector<size_t> parameterBytes;
    std::map<std::string, Size> registers;
    std::map<std::string, Variable> shared; // the variable whose size the launch gives has bytes = 0
    size_t staticSharedBytes = 0;
    size_t sharedAlignment = 16;
    uint32_t maxThreads = 1024;
    std::vector<Statement> statements;
    std::map<std::string, size_t> labels; // -> index of the statement that follows
};

// Reads the kernels of a module. Throws Error, with the line, for whatever it does not know.
std::vector<Kernel> parse(std::string const& text);

} // namespace lfx::ptx
