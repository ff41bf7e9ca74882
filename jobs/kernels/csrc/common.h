// What all kernels share: how they are exported, and how work is shared between threads.
//
// A kernel is an `extern "C"` function that takes addresses, sizes in elements and, last, the number
// of threads. It allocates nothing that outlives the call and keeps no state.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#define RS_EXPORT extern "C" __attribute__((visibility("default")))

namespace rs {

using Bfloat16 = uint16_t;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Run body(task) for every task in [0, num_tasks). Threads take the next task when they are free,
// so a core that is disturbed delays nobody by more than one task. What a task computes must not
// depend on the thread that runs it.
template <class Body>
void parallel_tasks(int64_t num_tasks, int num_threads, const Body& body) {
    if (num_threads <= 1 || num_tasks <= 1) {
        for (int64_t task = 0; task < num_tasks; ++task) body(task);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(num_threads)
    {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
            body(task);
        }
    }
}

// Run body(task) for every task in [0, num_tasks). Each thread begins with a range of neighbouring
// tasks of its own, in order, so that what lies side by side in memory is read by one core in one
// stream; a thread that has finished takes from the ends of the others' ranges.
template <class Body>
void parallel_ranges(int64_t num_tasks, int num_threads, const Body& body) {
    if (num_threads <= 1 || num_tasks <= 1) {
        for (int64_t task = 0; task < num_tasks; ++task) body(task);
        return;
    }
    // Low half: first task left; high half: end. One word, so that both change at once.
    struct alignas(64) Range {
        std::atomic<uint64_t> bounds;
    };
    constexpr int kMaxThreads = 256;
    const int threads = std::min(num_threads, kMaxThreads);
    Range ranges[kMaxThreads];
    for (int t = 0; t < threads; ++t) {
        const uint64_t first = num_tasks * t / threads, end = num_tasks * (t + 1) / threads;
        ranges[t].bounds.store(end << 32 | first, std::memory_order_relaxed);
    }
    const auto take = [&](int owner, bool from_front) -> int64_t {
        uint64_t seen = ranges[owner].bounds.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t first = seen & 0xFFFFFFFFu, end = seen >> 32;
            if (first >= end) return num_tasks;
            const uint64_t left = from_front ? end << 32 | (first + 1) : (end - 1) << 32 | first;
            if (ranges[owner].bounds.compare_exchange_weak(seen, left)) {
                return static_cast<int64_t>(from_front ? first : end - 1);
            }
        }
    };
#pragma omp parallel num_threads(threads)
    {
        // The runtime may give fewer threads than asked for; ranges without one are taken too.
        const int own = omp_get_thread_num();
        for (int i = 0; i < threads; ++i) {
            const int owner = (own + i) % threads;
            for (int64_t task; (task = take(owner, i == 0)) < num_tasks;) body(task);
        }
    }
}

}  // namespace rs
