// Chooses the instruction set, prepares the tables of a call, and runs its tasks.
#include "cpu/cpu_attention.h"

#include "cpu/kernels.h"

#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

namespace lfx::cpu
{
namespace
{

constexpr size_t kALIGNMENT = alignof(float);
constexpr char const* kOUT_OF_MEMORY = "there is not enough memory for the tables of the CPU kernel";

Kernels const& kernelsOf([[maybe_unused]] InstructionSet set)
{
#if defined(__x86_64__)
    switch (set)
    {
    case InstructionSet::kAVX512: return avx512::kKERNELS;
    case InstructionSet::kAVX2: return avx2::kKERNELS;
    default: break;
    }
#endif
    return baseline::kKERNELS;
}

template <typename T>
std::unique_ptr<T[]> allocate(size_t count)
{
    return std::unique_ptr<T[]>(new (std::nothrow) T[count]);
}

// Calls run(task) for each task below `total`.
template <typename Run>
void forEach(ThreadPool const& threads, size_t total, Run const& run)
{
    auto const task = [](void* argument, size_t index) { (*static_cast<Run const*>(argument))(index); };
    threads.parallelFor(threads.pool, total, task, const_cast<Run*>(&run));
}

template <typename Params>
char const* reasonNotToRun(Params const& params, InstructionSet set)
{
    if (char const* reason = unsupportedReason(params, Target::kCPU))
    {
        return reason;
    }
    if (params.type != Type::kFLOAT)
    {
        return "the CPU kernels compute float32 only";
    }
    if (!isSupported(set))
    {
        return "this CPU does not have the instruction set";
    }
    return inaccessibleReason(params, kALIGNMENT);
}

// Fills the tables of a batch element; returns the number of used slots.
int32_t fillTables(BandedParams const& p, int32_t batch, int32_t* rowContent, int32_t* globalPositions)
{
    int32_t const* const mask = p.keyMask + static_cast<size_t>(batch) * p.seqlen;
    int32_t const* const index = p.globalIndex + static_cast<size_t>(batch) * p.slots;
    for (int32_t i = 0; i < p.seqlen; ++i)
    {
        rowContent[i] = mask[i] != 0 ? kLOCAL_ROW : kZERO_ROW;
    }
    int32_t used = 0;
    for (int32_t slot = 0; slot < p.slots; ++slot)
    {
        if (isUsedSlot(index[slot], p.seqlen))
        {
            rowContent[index[slot]] = kGLOBAL_ROW + slot;
            globalPositions[used++] = index[slot];
        }
    }
    return used;
}

} // namespace

ThreadPool callerThread() noexcept
{
    auto const inOrder = [](void*, size_t total, Task task, void* argument) {
        for (size_t index = 0; index < total; ++index)
        {
            task(argument, index);
        }
    };
    return {inOrder, nullptr};
}

bool isSupported(InstructionSet set) noexcept
{
    switch (set)
    {
    case InstructionSet::kBASELINE: return true;
#if defined(__x86_64__)
    case InstructionSet::kAVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case InstructionSet::kAVX512:
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
            && __builtin_cpu_supports("fma");
#endif
    default: return false;
    }
}

InstructionSet widestInstructionSet() noexcept
{
    for (InstructionSet set : {InstructionSet::kAVX512, InstructionSet::kAVX2})
    {
        if (isSupported(set))
        {
            return set;
        }
    }
    return InstructionSet::kBASELINE;
}

bool findInstructionSet(char const* name, InstructionSet& set) noexcept
{
    char const* const names[] = {"baseline", "avx2", "avx512"}; // in the order of InstructionSet
    for (int32_t i = 0; i < 3; ++i)
    {
        set = static_cast<InstructionSet>(i);
        if (std::strcmp(name, names[i]) == 0)
        {
            return isSupported(set);
        }
    }
    return false;
}

char const* runBandedAttention(BandedParams const& params, ThreadPool const& threads, InstructionSet set) noexcept
{
    if (char const* reason = reasonNotToRun(params, set))
    {
        return reason;
    }
    auto const rowContent = allocate<int32_t>(static_cast<size_t>(params.batch) * params.seqlen);
    auto const globalPositions = allocate<int32_t>(static_cast<size_t>(params.batch) * params.slots);
    auto const numGlobal = allocate<int32_t>(params.batch);
    if (rowContent == nullptr || globalPositions == nullptr || numGlobal == nullptr)
    {
        return kOUT_OF_MEMORY;
    }
    for (int32_t batch = 0; batch < params.batch; ++batch)
    {
        numGlobal[batch] = fillTables(params, batch, rowContent.get() + static_cast<size_t>(batch) * params.seqlen,
            globalPositions.get() + static_cast<size_t>(batch) * params.slots);
    }
    BandedCall const call{params, rowContent.get(), globalPositions.get(), numGlobal.get()};
    Kernels const& kernels = kernelsOf(set);
    forEach(threads, call.tasks(), [&](size_t task) { kernels.bandedTile(call, task); });
    return nullptr;
}

char const* runGlobalAttention(GlobalParams const& params, ThreadPool const& threads, InstructionSet set) noexcept
{
    if (char const* reason = reasonNotToRun(params, set))
    {
        return reason;
    }
    std::unique_ptr<float[]> partial;
    size_t const rows = GlobalCall::rows(params);
    int32_t const parts = GlobalCall::parts(params);
    if (parts > 1)
    {
        partial = allocate<float>(parts * rows * (static_cast<size_t>(params.headSize) + 2));
        if (partial == nullptr)
        {
            return kOUT_OF_MEMORY;
        }
    }
    GlobalCall const call{params, partial.get()};
    Kernels const& kernels = kernelsOf(set);
    forEach(threads, call.tasks(), [&](size_t task) { kernels.globalTile(call, task); });
    if (parts > 1)
    {
        forEach(threads, rows, [&](size_t row) { kernels.combineParts(call, row); });
    }
    return nullptr;
}

} // namespace lfx::cpu
