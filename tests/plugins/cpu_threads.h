// Threads for the CPU kernels, one for each call of parallelFor() and each number below `threads`.
#pragma once

#include "cpu/cpu_attention.h"

#include <atomic>
#include <thread>
#include <vector>

struct Threads
{
    int32_t count;

    lfx::cpu::ThreadPool pool()
    {
        return {parallelFor, this};
    }

    // Each thread takes the next task, so that their order differs from run to run.
    static void parallelFor(void* pool, size_t total, lfx::cpu::Task task, void* argument)
    {
        std::atomic<size_t> next{0};
        auto const work = [&] {
            for (size_t index = next++; index < total; index = next++)
            {
                task(argument, index);
            }
        };
        std::vector<std::thread> threads;
        for (int32_t i = 1; i < static_cast<Threads*>(pool)->count; ++i)
        {
            threads.emplace_back(work);
        }
        work();
        for (std::thread& thread : threads)
        {
            thread.join();
        }
    }
};
