// Threads for the kernels where the host has none to give: they live as long as a call of parallelFor().
#pragma once

#include "cpu/cpu_attention.h"

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace lfx::cpu
{

struct Threads
{
    int32_t count; // the caller's thread is one of them

    ThreadPool pool()
    {
        return {parallelFor, this};
    }

    // Each thread takes the next task, so that their order differs from run to run.
    static void parallelFor(void* pool, size_t total, Task task, void* argument)
    {
        std::atomic<size_t> next{0};
        auto const work = [&] {
            for (size_t index = next++; index < total; index = next++)
            {
                task(argument, index);
            }
        };
        size_t const wanted = static_cast<size_t>(static_cast<Threads*>(pool)->count);
        std::vector<std::thread> threads;
        try
        {
            while (threads.size() + 1 < wanted && threads.size() + 1 < total)
            {
                threads.emplace_back(work);
            }
        }
        catch (std::exception const&) // the system has no more threads: those that there are do the work
        {
        }
        work();
        for (std::thread& thread : threads)
        {
            thread.join();
        }
    }
};

} // namespace lfx::cpu
