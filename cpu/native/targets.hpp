// Compiles the file named by KERNELS once for each kind of machine and picks at run time: include this after the standard headers.
//
// Not with target_clones: GCC takes vectors apart for the plain machine before it makes the clones. The kernels use no templates of the
// standard library, which would exist once for all kinds and might be the wrong one's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// A bfloat16 as its 16 bits.
struct Bfloat16 {
    uint16_t bits;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_TARGETS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#define MACHINE 512  // what the compiler knows of the target comes too late for the preprocessor
namespace avx512 {
constexpr int LANES = 16;
#include "vector.hpp"
#include KERNELS
}  // namespace avx512
#undef MACHINE
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#define MACHINE 256
namespace avx2 {
constexpr int LANES = 8;
#include "vector.hpp"
#include KERNELS
}  // namespace avx2
#undef MACHINE
#pragma GCC pop_options
#endif
#define MACHINE 128
namespace plain {
constexpr int LANES = 4;
#include "vector.hpp"
#include KERNELS
}  // namespace plain
#undef MACHINE

constexpr int MOST_LANES = 16;

// 2: AVX-512, 1: AVX2, 0: neither; $SSD_CPU_SIMD (avx512, avx2, plain) asks for less than the machine has.
static inline int machine() {
#ifdef HAS_TARGETS
    static const int level = [] {
        const char* wish = std::getenv("SSD_CPU_SIMD");
        const int limit = wish == nullptr ? 2 : !std::strcmp(wish, "plain") ? 0 : !std::strcmp(wish, "avx2") ? 1 : 2;
        __builtin_cpu_init();
        for (const bool has : {__builtin_cpu_supports("avx2") != 0, __builtin_cpu_supports("fma") != 0, __builtin_cpu_supports("bmi") != 0, __builtin_cpu_supports("bmi2") != 0})
            if (!has) return 0;
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
        return wide && limit > 1 ? 2 : limit > 0 ? 1 : 0;
    }();
    return level;
#else
    return 0;
#endif
}

#ifdef HAS_TARGETS
#define PICK(function) (machine() == 2 ? avx512::function : machine() == 1 ? avx2::function : plain::function)
#else
#define PICK(function) (plain::function)
#endif
