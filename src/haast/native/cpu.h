// CPU features, attributes that compile a function for them, runtime dispatch, and shared constants.
#pragma once

#include <cstdint>
#include <thread>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define HAAST_X86 1
#include <cpuid.h>
#include <immintrin.h>
// Runtime dispatch: only functions with these attributes use AVX2, so that a build without -march runs anywhere.
#define AVX static __attribute__((target("avx2,fma,f16c")))
#define AVX_INLINE static inline __attribute__((target("avx2,fma,f16c"), always_inline))
#define AVX512 static __attribute__((target("avx512f,avx2,fma,f16c")))
#define AVX512_INLINE static inline __attribute__((target("avx512f,avx2,fma,f16c"), always_inline))
#elif defined(__aarch64__) && defined(__GNUC__)
#define HAAST_NEON 1
#include <arm_neon.h>  // every 64-bit ARM CPU has it, including fp16 conversion
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace {

constexpr int64_t kLanes = 16;            // outputs per panel: two AVX2 registers
constexpr int64_t kMaxGroup = 64;         // most query heads per KV head in the fast attention
constexpr int64_t kMaxRows = 6;           // 6 rows x 2 registers = 12 accumulators, 2 weights, 1 broadcast: 15 of 16
constexpr int64_t kSerialWork = 1 << 15;  // multiply-adds below which a second thread costs more than it saves
constexpr int64_t kAhead = 3072;          // bytes by which weights are prefetched
constexpr float kMasked = -1e30f;         // mask values up to this one (also finfo.min and -inf) hide a slot

// NEON counts as kAvx2, with its dot products as kAvx2Vnni. VNNI matters only to products with block weights.
enum Path { kScalar = 0, kAvx2 = 1, kAvx2Vnni = 2, kAvx512 = 3 };

Path widest = kAvx512;  // limit of the code path; lowered only by tests

#if defined(HAAST_X86)
// gcc 12's __builtin_cpu_supports knows no "avxvnni". Bit 4 of EAX of leaf 7, subleaf 1.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(HAAST_NEON)
bool has_dot_products() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return true;  // every Apple CPU that runs a 64-bit ARM system of today
#endif
}
#endif

int cpu_features() {
#if defined(HAAST_X86)
    __builtin_cpu_init();
    return (__builtin_cpu_supports("avx2") ? 1 : 0) | (__builtin_cpu_supports("fma") ? 2 : 0) |
           (__builtin_cpu_supports("f16c") ? 4 : 0) | (__builtin_cpu_supports("avx512f") ? 8 : 0) |
           (has_avx_vnni() ? 32 : 0) |
           (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni") ? 64 : 0);
#elif defined(HAAST_NEON)
    return 16 | (has_dot_products() ? 128 : 0);
#else
    return 0;
#endif
}

bool has(int feature) {
    static const int features = cpu_features();
    return features & feature;
}

Path path() {
    static const Path found = has(16)                               ? has(128) ? kAvx2Vnni : kAvx2
                              : !(has(1) && has(2) && has(4)) ? kScalar
                              : has(8)                              ? kAvx512
                              : has(32)                             ? kAvx2Vnni
                                                                    : kAvx2;
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
