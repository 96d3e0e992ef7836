// The race detector behind race_detector.h: the sanitizer's calls for loads and stores, and the last accesses of each
// piece of memory. It is compiled without the sanitizer.
#define LFX_DETECT_RACES
#include "race_detector.h"

#include "bank_conflicts.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

namespace lfx
{
namespace race
{
namespace
{

constexpr int kWARP = 32;
constexpr int kMAX_WARPS = 8;     // of a block
constexpr size_t kCELL_BYTES = 2; // the smallest type of the kernels' data; an access of one byte counts for both

using Place = void const*; // an instruction of the kernel

enum class Kind
{
    kREAD,
    kWRITE,
    kATOMIC,
};

struct Access
{
    bool isBy(int other) const
    {
        return exists() && thread == other;
    }
    bool exists() const
    {
        return launch != 0;
    }

    int launch; // counted from 1; 0: there was no access
    int block;  // counted over all launches
    int thread;
    int blockEpoch; // number of barriers of the block before it
    int warpEpoch;  // number of __syncwarp() of the thread's warp before it
    bool atomic;
    int64_t time; // order of execution
    Place place;
};

// Reads of one warp between two barriers of its block.
struct WarpReads
{
    uint32_t lanes;
    int warpEpoch; // of the last ones; those before are ordered before them for the warp itself
    Place place;
};

struct SharedCell
{
    Access write;
    Access copy; // asynchronous, in flight
    int readBlock;
    int readEpoch;
    WarpReads reads[kMAX_WARPS]; // in readBlock and readEpoch
};

struct GlobalCell
{
    Access write;
    size_t reads; // index in State::reads of those since the write; 0: there were none
};

// A cell for each kCELL_BYTES of a piece of memory, all zeros at first. Those that are never accessed take no memory.
template <typename Cell>
class Cells
{
public:
    explicit Cells(size_t bytes)
        : mBytes((bytes / kCELL_BYTES + 1) * sizeof(Cell))
        , mCells(static_cast<Cell*>(
              mmap(nullptr, mBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)))
    {
    }
    Cells(Cells const&) = delete;
    Cells& operator=(Cells const&) = delete;
    ~Cells()
    {
        munmap(mCells, mBytes);
    }

    Cell& operator[](size_t offset)
    {
        return mCells[offset / kCELL_BYTES];
    }

private:
    size_t mBytes;
    Cell* mCells;
};

template <typename Cell>
struct Memory
{
    Memory(std::string name, void const* start, size_t bytes)
        : name(std::move(name))
        , start(static_cast<uint8_t const*>(start))
        , bytes(bytes)
        , cells(bytes)
    {
    }
    bool holds(uint8_t const* address) const
    {
        return address >= start && address < start + bytes;
    }

    std::string name;
    uint8_t const* start;
    size_t bytes;
    Cells<Cell> cells;
};

// A fence and an atomic operation after it by the same thread: what precedes the fence is visible to whoever sees the
// atomic operation's result and has a fence after that.
struct Release
{
    Access fence;
};

struct Acquire
{
    Access atomic;
    std::vector<Release> const* releases;
    size_t count; // of those releases that the atomic operation followed
    bool fenced;
    Access fence;
};

struct State
{
    Place kernel = nullptr;
    int launch = 0;
    int block = 0;
    int blockIndex = 0;
    int thread = kNO_THREAD;
    int blockEpoch = 0;
    int warpEpoch[kMAX_WARPS] = {};
    int64_t time = 0;
    std::unique_ptr<Memory<SharedCell>> shared;
    std::vector<std::unique_ptr<Memory<GlobalCell>>> global;
    std::vector<std::vector<Access>> reads{1};               // of the cells of global memory
    std::map<int, Access> fences;                            // the last one of each thread of the block
    std::map<uint8_t const*, std::vector<Release>> releases; // by address, in this launch
    std::vector<Acquire> acquires;                           // of the block
    bool countsBanks = false;
    BankCounter banks;
    std::string removedFile;
    int removedLine = 0;
    std::string reports;
    std::set<std::pair<Place, Place>> reported;
    int64_t races = 0;
    int64_t checks = 0;
};

State& state()
{
    static State the;
    return the;
}

Access now(Place place, Kind kind = Kind::kREAD)
{
    State& s = state();
    int const warpEpoch = s.warpEpoch[s.thread / kWARP];
    return {s.launch, s.block, s.thread, s.blockEpoch, warpEpoch, kind == Kind::kATOMIC, ++s.time, place};
}

// Whether barriers of the block or the warp order an access before another one of the same block.
bool isOrderedInBlock(Access const& before, Access const& after)
{
    return before.thread == after.thread || before.blockEpoch != after.blockEpoch
        || (before.thread / kWARP == after.thread / kWARP && before.warpEpoch != after.warpEpoch);
}

// Whether fences and atomic operations order an access before another one of another block of the same launch.
bool isOrderedAcrossBlocks(Access const& before, Access const& after)
{
    for (Acquire const& acquire : state().acquires)
    {
        if (!acquire.fenced || !isOrderedInBlock(acquire.fence, after))
        {
            continue;
        }
        for (size_t i = 0; i < acquire.count; ++i)
        {
            Access const& fence = (*acquire.releases)[i].fence;
            if (fence.block == before.block && before.time < fence.time && isOrderedInBlock(before, fence))
            {
                return true;
            }
        }
    }
    return false;
}

bool isOrdered(Access const& before, Access const& after)
{
    if (!before.exists() || before.launch != after.launch || (before.atomic && after.atomic))
    {
        return true;
    }
    return before.block == after.block ? isOrderedInBlock(before, after) : isOrderedAcrossBlocks(before, after);
}

void report(char const* what, std::string const& memory, size_t offset, Access const& before, Access const& after)
{
    State& s = state();
    ++s.races;
    if (!s.reported.emplace(before.place, after.place).second)
    {
        return;
    }
    char line[512];
    std::snprintf(line, sizeof line, "%s|%p|%s|%zu|%d|%d|%p|%d|%p\n", what, s.kernel, memory.c_str(), offset,
        s.blockIndex, before.thread, before.place, after.thread, after.place);
    s.reports += line;
}

void checkShared(Memory<SharedCell>& memory, size_t offset, Access const& access, Kind kind, bool startsCopy)
{
    State& s = state();
    SharedCell& cell = memory.cells[offset];
    if (cell.copy.exists() && cell.copy.block == access.block)
    {
        report("access to the destination of a copy in flight", memory.name, offset, cell.copy, access);
    }
    if (cell.write.block == access.block && !isOrdered(cell.write, access))
    {
        char const* const what = kind == Kind::kREAD ? "read after write" : "write after write";
        report(what, memory.name, offset, cell.write, access);
    }
    bool const hasReads = cell.readBlock == access.block && cell.readEpoch == access.blockEpoch;
    if (kind == Kind::kREAD)
    {
        if (!hasReads)
        {
            std::memset(cell.reads, 0, sizeof cell.reads);
            cell.readBlock = access.block;
            cell.readEpoch = access.blockEpoch;
        }
        WarpReads& reads = cell.reads[access.thread / kWARP];
        uint32_t const others = reads.warpEpoch == access.warpEpoch ? reads.lanes : 0;
        reads = {others | 1U << access.thread % kWARP, access.warpEpoch, access.place};
        return;
    }
    for (int warp = 0; hasReads && warp < kMAX_WARPS; ++warp)
    {
        WarpReads const& reads = cell.reads[warp];
        bool const isOwn = warp == access.thread / kWARP;
        uint32_t const own = isOwn ? 1U << access.thread % kWARP : 0;
        if ((reads.lanes & ~own) != 0 && !(isOwn && reads.warpEpoch != access.warpEpoch))
        {
            int const lane = __builtin_ctz(reads.lanes & ~own);
            Access const before{
                s.launch, s.block, warp * kWARP + lane, access.blockEpoch, reads.warpEpoch, false, 0, reads.place};
            report("write after read", memory.name, offset, before, access);
        }
    }
    cell.readBlock = 0;
    (startsCopy ? cell.copy : cell.write) = access;
}

void checkGlobal(Memory<GlobalCell>& memory, size_t offset, Access const& access, Kind kind)
{
    GlobalCell& cell = memory.cells[offset];
    if (!isOrdered(cell.write, access))
    {
        char const* const what = kind == Kind::kREAD ? "read after write" : "write after write";
        report(what, memory.name, offset, cell.write, access);
    }
    std::vector<std::vector<Access>>& all = state().reads;
    if (kind == Kind::kREAD)
    {
        if (cell.reads == 0)
        {
            cell.reads = all.size();
            all.emplace_back();
        }
        // What is ordered after this read is also ordered after those that are ordered before it.
        std::vector<Access>& reads = all[cell.reads];
        auto const isBefore = [&access](Access const& read) { return isOrdered(read, access); };
        reads.erase(std::remove_if(reads.begin(), reads.end(), isBefore), reads.end());
        reads.push_back(access);
        return;
    }
    for (Access const& read : all[cell.reads])
    {
        if (!isOrdered(read, access))
        {
            report("write after read", memory.name, offset, read, access);
        }
    }
    if (kind == Kind::kWRITE)
    {
        all[cell.reads].clear(); // an atomic operation would hide them from the next one, of another thread
    }
    cell.write = access;
}

void check(void const* address, size_t bytes, Kind kind, Place place, bool startsCopy = false)
{
    State& s = state();
    if (s.thread == kNO_THREAD)
    {
        return;
    }
    auto const* const first = static_cast<uint8_t const*>(address);
    if (s.shared != nullptr && s.shared->holds(first))
    {
        if (s.countsBanks)
        {
            s.banks.add(place, s.thread, first - s.shared->start, bytes);
        }
        Access const access = now(place, kind);
        for (size_t i = 0; i < bytes; i += kCELL_BYTES)
        {
            ++s.checks;
            checkShared(*s.shared, first - s.shared->start + i, access, kind, startsCopy);
        }
        return;
    }
    for (auto const& memory : s.global)
    {
        if (memory->holds(first))
        {
            Access const access = now(place, kind);
            for (size_t i = 0; i < bytes; i += kCELL_BYTES)
            {
                ++s.checks;
                checkGlobal(*memory, first - memory->start + i, access, kind);
            }
            return;
        }
    }
}

} // namespace

void beginLaunch(void const* kernel, void const* shared, size_t sharedBytes)
{
    State& s = state();
    s.kernel = kernel;
    ++s.launch;
    s.releases.clear();
    s.shared = std::make_unique<Memory<SharedCell>>("shared", shared, sharedBytes);
}

void beginBlock(int blockIndex)
{
    State& s = state();
    s.banks.endBlock();
    ++s.block;
    s.blockIndex = blockIndex;
    s.blockEpoch = 0;
    std::memset(s.warpEpoch, 0, sizeof s.warpEpoch);
    s.fences.clear();
    s.acquires.clear();
}

void setThread(int thread)
{
    if (thread >= kMAX_WARPS * kWARP)
    {
        std::fprintf(stderr, "race detector: a block has more than %d threads\n", kMAX_WARPS * kWARP);
        std::abort();
    }
    state().thread = thread;
}

void blockBarrier()
{
    ++state().blockEpoch;
}

void warpBarrier(int warp)
{
    ++state().warpEpoch[warp];
}

void read(void const* address, size_t bytes)
{
    check(address, bytes, Kind::kREAD, __builtin_return_address(0));
}

void atomic(void const* address, size_t bytes)
{
    State& s = state();
    check(address, bytes, Kind::kATOMIC, __builtin_return_address(0));
    if (s.shared->holds(static_cast<uint8_t const*>(address)))
    {
        return;
    }
    std::vector<Release>& releases = s.releases[static_cast<uint8_t const*>(address)];
    s.acquires.push_back({now(nullptr), &releases, releases.size(), false, {}});
    auto const fence = s.fences.find(s.thread);
    if (fence != s.fences.end())
    {
        releases.push_back({fence->second});
    }
}

void fence()
{
    State& s = state();
    s.fences[s.thread] = now(nullptr);
    for (Acquire& acquire : s.acquires)
    {
        if (!acquire.fenced && acquire.atomic.thread == s.thread)
        {
            acquire.fenced = true;
            acquire.fence = s.fences[s.thread];
        }
    }
}

void copyStarted(void const* destination)
{
    check(destination, 16, Kind::kWRITE, __builtin_return_address(0), true);
}

void copyArrived(void const* destination, int thread)
{
    State& s = state();
    int const running = std::exchange(s.thread, thread);
    size_t const offset = static_cast<uint8_t const*>(destination) - s.shared->start;
    for (size_t i = 0; i < 16; i += kCELL_BYTES)
    {
        SharedCell& cell = s.shared->cells[offset + i];
        Place const place = cell.copy.place;
        cell.copy = {};
        checkShared(*s.shared, offset + i, now(place), Kind::kWRITE, false);
    }
    s.thread = running;
}

bool isRemoved(char const* file, int line)
{
    State const& s = state();
    if (line != s.removedLine)
    {
        return false;
    }
    size_t const length = std::strlen(file);
    return length >= s.removedFile.size() && s.removedFile == file + length - s.removedFile.size();
}

Unchecked::Unchecked()
    : mThread(state().thread)
{
    state().thread = kNO_THREAD;
}

Unchecked::~Unchecked()
{
    state().thread = mThread;
}

} // namespace race
} // namespace lfx

using lfx::race::Kind;
using lfx::race::state;

// For the tests, which call them by name.
extern "C"
{
    // Global memory to check; a piece with the same start is replaced.
    void lfxRaceWatch(char const* name, void const* start, size_t bytes)
    {
        state().global.push_back(std::make_unique<lfx::race::Memory<lfx::race::GlobalCell>>(name, start, bytes));
    }

    // Leaves out the barriers, waits and commits in one line of a source file from now on; line 0: none.
    void lfxRaceRemove(char const* file, int line)
    {
        state().removedFile = file;
        state().removedLine = line;
    }

    // Forgets the watched memory and the reports.
    void lfxRaceReset()
    {
        state().global.clear();
        state().reads.resize(1);
        state().reports.clear();
        state().reported.clear();
        state().races = 0;
        state().checks = 0;
    }

    int64_t lfxRaceCount()
    {
        return state().races;
    }

    int64_t lfxRaceChecks()
    {
        return state().checks;
    }

    // One line for each pair of instructions with a race: what | kernel | memory | offset | block | thread | instruction |
    // thread | instruction.
    char const* lfxRaceReports()
    {
        return state().reports.c_str();
    }

    // Counts the bank conflicts of all accesses of shared memory from now on.
    void lfxBankCount()
    {
        state().countsBanks = true;
        state().banks = {};
    }

    // One line for each instruction: instruction | bytes of a lane | phases | passes.
    char const* lfxBankCounts()
    {
        static std::string result;
        result.clear();
        state().banks.endBlock();
        for (auto const& [place, count] : state().banks.counts)
        {
            char line[128];
            std::snprintf(line, sizeof line, "%p|%zu|%ld|%ld\n", place, count.bytes, static_cast<long>(count.phases),
                static_cast<long>(count.passes));
            result += line;
        }
        return result.c_str();
    }

#define LFX_ACCESS(bytes)                                                                                              \
    void __tsan_read##bytes(void* p)                                                                                   \
    {                                                                                                                  \
        lfx::race::check(p, bytes, Kind::kREAD, __builtin_return_address(0));                                          \
    }                                                                                                                  \
    void __tsan_write##bytes(void* p)                                                                                  \
    {                                                                                                                  \
        lfx::race::check(p, bytes, Kind::kWRITE, __builtin_return_address(0));                                         \
    }                                                                                                                  \
    void __tsan_unaligned_read##bytes(void* p)                                                                         \
    {                                                                                                                  \
        lfx::race::check(p, bytes, Kind::kREAD, __builtin_return_address(0));                                          \
    }                                                                                                                  \
    void __tsan_unaligned_write##bytes(void* p)                                                                        \
    {                                                                                                                  \
        lfx::race::check(p, bytes, Kind::kWRITE, __builtin_return_address(0));                                         \
    }
    LFX_ACCESS(1)
    LFX_ACCESS(2)
    LFX_ACCESS(4)
    LFX_ACCESS(8)
    LFX_ACCESS(16)

    void __tsan_read_range(void* p, size_t bytes)
    {
        lfx::race::check(p, bytes, Kind::kREAD, __builtin_return_address(0));
    }
    void __tsan_write_range(void* p, size_t bytes)
    {
        lfx::race::check(p, bytes, Kind::kWRITE, __builtin_return_address(0));
    }
    void __tsan_init()
    {
    }
    void __tsan_func_entry(void*)
    {
    }
    void __tsan_func_exit()
    {
    }
    void __tsan_vptr_update(void**, void*)
    {
    }
    void __tsan_vptr_read(void**)
    {
    }
}
