// Row-wise operators: RMS norm, SwiGLU and rotary embedding.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu.h"
#include "pool.h"
#include "vector_math.h"

namespace {

struct RowWise {
    const float *x, *weight;  // weight: only for norms
    float* y;
    int64_t dim;  // width of a row of y
    float eps;
};

void rms_norm_scalar(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    for (int64_t r = first; r < last; ++r) {
        const float* x = a.x + r * a.dim;
        float sum = 0.0f;
        for (int64_t i = 0; i < a.dim; ++i) sum += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(a.dim) + a.eps);
        for (int64_t i = 0; i < a.dim; ++i) a.y[r * a.dim + i] = a.weight[i] * (x[i] * scale);
    }
}

void swiglu_scalar(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    for (int64_t r = first; r < last; ++r) {
        const float *gate = a.x + r * 2 * a.dim, *up = gate + a.dim;
        for (int64_t i = 0; i < a.dim; ++i) a.y[r * a.dim + i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}

struct Rotation {
    float* x;  // (tokens, x_stride): `heads` heads of d values at the start of each row
    const float *cosine, *sine;
    int64_t heads, d, x_stride, period;
};

// Rotary embedding in place, with halves paired as in Llama. Products are rounded before the sum, as in torch.
void rotate(const void* job, int64_t first, int64_t last) {
    const Rotation& a = *static_cast<const Rotation*>(job);
    const int64_t half = a.d / 2;
    for (int64_t r = first; r < last; ++r) {
        const float *c = a.cosine + r % a.period * a.d, *s = a.sine + r % a.period * a.d;
        for (int64_t h = 0; h < a.heads; ++h) {
            float *lo = a.x + r * a.x_stride + h * a.d, *hi = lo + half;
            for (int64_t i = 0; i < half; ++i) {
                const float x = lo[i], y = hi[i];
                lo[i] = x * c[i] - y * s[i];
                hi[i] = y * c[half + i] + x * s[half + i];
            }
        }
    }
}

#if defined(HAAST_X86)
AVX void rms_norm_avx(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    for (int64_t r = first; r < last; ++r) {
        const float* x = a.x + r * a.dim;
        float* y = a.y + r * a.dim;
        __m256 squares = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 8 <= a.dim; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        float sum = sum8(squares);
        for (; i < a.dim; ++i) sum += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(a.dim) + a.eps);
        const __m256 s = _mm256_set1_ps(scale);
        for (i = 0; i + 8 <= a.dim; i += 8) {
            const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), s);
            _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(a.weight + i), scaled));
        }
        for (; i < a.dim; ++i) y[i] = a.weight[i] * (x[i] * scale);
    }
}

// Sixteen values at a time from the start of each row; returns how many were done.
AVX512 int64_t swiglu_wide(const float* gate, const float* up, float* y, int64_t dim) {
    const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80000000));
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
        const __m512 g = _mm512_loadu_ps(gate + i);
        const __m512 minus = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(g), sign));
        const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(minus)));
        _mm512_storeu_ps(y + i, _mm512_mul_ps(silu, _mm512_loadu_ps(up + i)));
    }
    return i;
}

AVX void swiglu_avx(const void* job, int64_t first, int64_t last) {
    const RowWise& a = *static_cast<const RowWise*>(job);
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (int64_t r = first; r < last; ++r) {
        const float *gate = a.x + r * 2 * a.dim, *up = gate + a.dim;
        float* y = a.y + r * a.dim;
        int64_t i = path() == kAvx512 ? swiglu_wide(gate, up, y, a.dim) : 0;
        for (; i + 8 <= a.dim; i += 8) {
            const __m256 g = _mm256_loadu_ps(gate + i);
            const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp8(_mm256_xor_ps(g, sign))));
            _mm256_storeu_ps(y + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
        }
        for (; i < a.dim; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}
#endif  // HAAST_X86

#if defined(HAAST_X86)
#define PICK(name) (use_avx() ? name##_avx : name##_scalar)
#else
#define PICK(name) (name##_scalar)
#endif

void rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t dim, float eps, int threads) {
    const RowWise a{x, weight, y, dim, eps};
    each_row(PICK(rms_norm), &a, rows, dim, threads);
}

void swiglu(const float* gate_up, float* y, int64_t rows, int64_t width, int threads) {
    const RowWise a{gate_up, nullptr, y, width, 0.0f};
    each_row(PICK(swiglu), &a, rows, width, threads, kSerialWork / 8);  // exp and a division each
}

}  // namespace
