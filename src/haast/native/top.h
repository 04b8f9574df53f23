// Top-k entries of rows of logits, with their log-probabilities.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu.h"
#include "pool.h"
#include "vector_math.h"

namespace {

constexpr int64_t kMostTop = 64;

struct Top {
    const float* logits;  // (rows, width)
    float* logprobs;      // (rows, k), descending
    int64_t* ids;         // (rows, k); of equal logits the smaller id is first
    int64_t width, k;
};

// Inserts (value, id) into a descending list, after equal values, so that the smaller id stays first.
inline void insert(float value, int64_t id, float* best, int64_t* ids, int64_t k) {
    int64_t at = k - 1;
    for (; at > 0 && value > best[at - 1]; --at) best[at] = best[at - 1], ids[at] = ids[at - 1];
    best[at] = value, ids[at] = id;
}

// Fills the list of one row and returns the row's log-sum-exp.
float top_row_scalar(const float* x, int64_t width, int64_t k, float* best, int64_t* ids) {
    for (int64_t i = 0; i < width; ++i)
        if (x[i] > best[k - 1]) insert(x[i], i, best, ids, k);
    double total = 0.0;
    for (int64_t i = 0; i < width; ++i) total += std::exp(static_cast<double>(x[i] - best[0]));
    return best[0] + static_cast<float>(std::log(total));
}

#if defined(HAAST_X86)
AVX float top_row_avx(const float* x, int64_t width, int64_t k, float* best, int64_t* ids) {
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) {
        const __m256 least = _mm256_set1_ps(best[k - 1]);
        int better = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + i), least, _CMP_GT_OQ));
        for (; better; better &= better - 1) {
            const int64_t at = i + __builtin_ctz(static_cast<unsigned>(better));
            if (x[at] > best[k - 1]) insert(x[at], at, best, ids, k);
        }
    }
    for (int64_t at = i; at < width; ++at)
        if (x[at] > best[k - 1]) insert(x[at], at, best, ids, k);
    const __m256 top = _mm256_set1_ps(best[0]);
    __m256 total = _mm256_setzero_ps();
    for (i = 0; i + 8 <= width; i += 8)
        total = _mm256_add_ps(total, exp8(_mm256_sub_ps(_mm256_loadu_ps(x + i), top)));
    float sum = sum8(total);
    for (; i < width; ++i) sum += std::exp(x[i] - best[0]);
    return best[0] + std::log(sum);
}
#endif

template <float (*Row)(const float*, int64_t, int64_t, float*, int64_t*)>
void top_rows(const void* job, int64_t first, int64_t last) {
    const Top& a = *static_cast<const Top*>(job);
    for (int64_t r = first; r < last; ++r) {
        float* best = a.logprobs + r * a.k;
        int64_t* ids = a.ids + r * a.k;
        for (int64_t i = 0; i < a.k; ++i) best[i] = -INFINITY, ids[i] = 0;
        const float norm = Row(a.logits + r * a.width, a.width, a.k, best, ids);
        for (int64_t i = 0; i < a.k; ++i) best[i] -= norm;
    }
}

void top(const Top& a, int64_t rows, int threads) {
#if defined(HAAST_X86)
    const Pool::Work work = use_avx() ? top_rows<top_row_avx> : top_rows<top_row_scalar>;
#else
    const Pool::Work work = top_rows<top_row_scalar>;
#endif
    pool().run(work, &a, rows, 1, rows * a.width < kSerialWork ? 1 : threads);
}

}  // namespace
