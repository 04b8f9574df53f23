// Peak memory bandwidth and peak multiply-adds per second of the machine, for roofline estimates.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "pool.h"

namespace {

struct Reading {
    const uint8_t* bytes;
    int64_t size, pieces;
    volatile uint64_t* sink;  // one entry per piece, 64 bytes apart, so that the compiler can't drop the reads
};

struct Multiplying {
    int64_t rounds;
    volatile float* sink;
};

constexpr int kChains = 12;  // independent sums, enough for the latency of two FMA pipelines
constexpr int64_t kApart = 8;

void read_scalar(const void* job, int64_t first, int64_t last) {
    const Reading& a = *static_cast<const Reading*>(job);
    for (int64_t piece = first; piece < last; ++piece) {
        const int64_t from = a.size / 64 * piece / a.pieces * 64, to = a.size / 64 * (piece + 1) / a.pieces * 64;
        uint64_t sum[8] = {};
        for (int64_t i = from; i < to; i += 64)
            for (int64_t j = 0; j < 8; ++j) sum[j] += *reinterpret_cast<const uint64_t*>(a.bytes + i + 8 * j);
        for (int64_t j = 1; j < 8; ++j) sum[0] += sum[j];
        a.sink[piece * kApart] = sum[0];
    }
}

void multiply_scalar(const void* job, int64_t first, int64_t last) {
    const Multiplying& a = *static_cast<const Multiplying*>(job);
    for (int64_t piece = first; piece < last; ++piece) {
        float sum[4 * kChains] = {};
        for (int64_t i = 0; i < a.rounds; ++i)
            for (int j = 0; j < 4 * kChains; ++j) sum[j] = sum[j] * 0.999f + 0.5f;
        for (int j = 1; j < 4 * kChains; ++j) sum[0] += sum[j];
        a.sink[piece * 2 * kApart] = sum[0];
    }
}

#if defined(HAAST_X86)
AVX void read_avx(const void* job, int64_t first, int64_t last) {
    const Reading& a = *static_cast<const Reading*>(job);
    for (int64_t piece = first; piece < last; ++piece) {
        const int64_t from = a.size / 256 * piece / a.pieces * 256, to = a.size / 256 * (piece + 1) / a.pieces * 256;
        __m256i sum[8];
        for (int j = 0; j < 8; ++j) sum[j] = _mm256_setzero_si256();
        for (int64_t i = from; i < to; i += 256)
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                _mm_prefetch(reinterpret_cast<const char*>(a.bytes) + i + 32 * j + kAhead, _MM_HINT_T0);
                sum[j] = _mm256_xor_si256(
                    sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.bytes + i + 32 * j)));
            }
        for (int j = 1; j < 8; ++j) sum[0] = _mm256_xor_si256(sum[0], sum[j]);
        a.sink[piece * kApart] = static_cast<uint64_t>(_mm256_extract_epi64(sum[0], 0));
    }
}

AVX void multiply_avx(const void* job, int64_t first, int64_t last) {
    const Multiplying& a = *static_cast<const Multiplying*>(job);
    const __m256 factor = _mm256_set1_ps(0.999f), more = _mm256_set1_ps(0.5f);
    for (int64_t piece = first; piece < last; ++piece) {
        __m256 sum[kChains];
#pragma GCC unroll 12
        for (int j = 0; j < kChains; ++j) sum[j] = _mm256_set1_ps(static_cast<float>(j));
        for (int64_t i = 0; i < a.rounds; ++i)
#pragma GCC unroll 12
            for (int j = 0; j < kChains; ++j) sum[j] = _mm256_fmadd_ps(sum[j], factor, more);
        for (int j = 1; j < kChains; ++j) sum[0] = _mm256_add_ps(sum[0], sum[j]);
        a.sink[piece * 2 * kApart] = _mm256_cvtss_f32(sum[0]);
    }
}

AVX512 void multiply_avx512(const void* job, int64_t first, int64_t last) {
    const Multiplying& a = *static_cast<const Multiplying*>(job);
    const __m512 factor = _mm512_set1_ps(0.999f), more = _mm512_set1_ps(0.5f);
    for (int64_t piece = first; piece < last; ++piece) {
        __m512 sum[kChains];
#pragma GCC unroll 12
        for (int j = 0; j < kChains; ++j) sum[j] = _mm512_set1_ps(static_cast<float>(j));
        for (int64_t i = 0; i < a.rounds; ++i)
#pragma GCC unroll 12
            for (int j = 0; j < kChains; ++j) sum[j] = _mm512_fmadd_ps(sum[j], factor, more);
        for (int j = 1; j < kChains; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
        float t[16];
        _mm512_storeu_ps(t, sum[0]);
        a.sink[piece * 2 * kApart] = t[0];
    }
}
#endif

// Number of lanes of a multiply-add on the current code path.
int64_t lanes() {
#if defined(HAAST_X86)
    return path() == kAvx512 ? 16 : use_avx() ? 8 : 4;
#else
    return 4;
#endif
}

}  // namespace
