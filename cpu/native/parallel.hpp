// Work shared by a few threads, without OpenMP: torch brings its own OpenMP runtime, and two of them would spin against each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

// On x86 each such function exists for AVX-512, AVX2 and plain x86-64; the loader picks at run time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// Calls body(i) for every i in [0, count) on up to `threads` threads, fewer if the system has none left; the first exception is
// thrown again here.
template <class Body>
void parallel_for(long count, int threads, Body&& body) {
    std::atomic<long> next{0};
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    auto work = [&] {
        try {
            for (long i; (i = next.fetch_add(1)) < count && !failed;) body(i);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    const long extra = std::min<long>(threads, count) - 1;
    try {
        for (long t = 0; t < extra; ++t) others.emplace_back(work);
    } catch (const std::exception&) {  // those that run must be waited for
    }
    work();
    for (auto& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}
