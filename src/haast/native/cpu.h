// CPU features, attributes that compile a function for them, runtime dispatch, and shared constants.
#pragma once

#include <cstdint>
#include <thread>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define HAAST_X86 1
#include <immintrin.h>
// Runtime dispatch: only functions with these attributes use AVX2, so that a build without -march runs anywhere.
#define AVX static __attribute__((target("avx2,fma,f16c")))
#define AVX_INLINE static inline __attribute__((target("avx2,fma,f16c"), always_inline))
#define AVX512 static __attribute__((target("avx512f,avx2,fma,f16c")))
#define AVX512_INLINE static inline __attribute__((target("avx512f,avx2,fma,f16c"), always_inline))
#elif defined(__aarch64__) && defined(__GNUC__)
#define HAAST_NEON 1
#include <arm_neon.h>  // every 64-bit ARM CPU has it, including fp16 conversion
#endif

namespace {

constexpr int64_t kLanes = 16;            // outputs per panel: two AVX2 registers
constexpr int64_t kMaxGroup = 64;         // most query heads per KV head in the fast attention
constexpr int64_t kMaxRows = 6;           // 6 rows x 2 registers = 12 accumulators, 2 weights, 1 broadcast: 15 of 16
constexpr int64_t kSerialWork = 1 << 15;  // multiply-adds below which a second thread costs more than it saves
constexpr int64_t kAhead = 3072;          // bytes by which weights are prefetched
constexpr float kMasked = -1e30f;         // mask values up to this one (also finfo.min and -inf) hide a slot

enum Path { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };  // NEON counts as kAvx2

Path widest = kAvx512;  // limit of the code path; lowered only by tests

int cpu_features() {
#if defined(HAAST_X86)
    __builtin_cpu_init();
    return (__builtin_cpu_supports("avx2") ? 1 : 0) | (__builtin_cpu_supports("fma") ? 2 : 0) |
           (__builtin_cpu_supports("f16c") ? 4 : 0) | (__builtin_cpu_supports("avx512f") ? 8 : 0);
#elif defined(HAAST_NEON)
    return 16;
#else
    return 0;
#endif
}

Path path() {
    static const int features = cpu_features();
    static const Path found = features & 16 ? kAvx2 : (features & 7) != 7 ? kScalar : features & 8 ? kAvx512 : kAvx2;
    return found < widest ? found : widest;
}

bool use_avx() { return path() >= kAvx2; }

void pause() {
#if defined(HAAST_X86)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace
