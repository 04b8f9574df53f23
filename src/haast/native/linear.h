// Matrix products for few rows: y = x W^T with a packed W.
//
// W is stored in panels of 16 outputs, K-major, in fp16. For every code path and any number of rows, an output is fma
// over k = 0, 1, 2, ... into one fp32 accumulator, plus its bias. Weights in blocks: linear_blocks.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu.h"
#include "half.h"
#include "pool.h"

namespace {

struct Linear {
    const float* x;
    const uint16_t* packed;  // fp16
    const float* bias;       // (out), may be null
    float* y;
    int64_t rows, in, out, x_stride, y_stride;
};

// ---------------------------------------------------------------- portable path

void linear_scalar(const void* job, int64_t first, int64_t last) {
    const Linear& a = *static_cast<const Linear*>(job);
    std::unique_ptr<float[]> panel(new float[a.in * kLanes]);
    for (int64_t p = first; p < last; ++p) {
        const uint16_t* w = a.packed + p * a.in * kLanes;
        for (int64_t i = 0; i < a.in * kLanes; ++i) panel[i] = half_to_float(w[i]);
        const int64_t valid = a.out - p * kLanes < kLanes ? a.out - p * kLanes : kLanes;
        for (int64_t r = 0; r < a.rows; ++r) {
            const float* x = a.x + r * a.x_stride;
            float acc[kLanes] = {};
            for (int64_t k = 0; k < a.in; ++k)
                for (int64_t l = 0; l < kLanes; ++l) acc[l] += x[k] * panel[k * kLanes + l];
            float* y = a.y + r * a.y_stride + p * kLanes;
            for (int64_t l = 0; l < valid; ++l) y[l] = acc[l] + (a.bias ? a.bias[p * kLanes + l] : 0.0f);
        }
    }
}

// Destination of one tile's sums, with the biases and the number of its outputs.
struct Ends {
    float* y;
    int64_t y_stride;
    const float* bias;  // of the tile's first output, or null
    int64_t valid;
};

inline Ends ends_of(const Linear& a, int64_t row, int64_t panel) {
    const int64_t o = panel * kLanes;
    return Ends{a.y + row * a.y_stride + o, a.y_stride, a.bias ? a.bias + o : nullptr, a.out - o};
}

// Splits rows into blocks of at most `most` rows and similar size (8 rows are 4 + 4, not 6 + 2): a block of 2 could not
// fill the FMA pipelines. Calls each(first row, rows).
template <typename Each>
inline void row_blocks(int64_t rows, int64_t most, Each each) {
    const int64_t blocks = (rows + most - 1) / most, base = rows / blocks, longer = rows % blocks;
    for (int64_t b = 0, r = 0; b < blocks; ++b) {
        const int64_t count = base + (b < longer ? 1 : 0);
        each(r, count);
        r += count;
    }
}

// ---------------------------------------------------------------- AVX2 path
#if defined(HAAST_X86)

AVX_INLINE __m256 load8(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

AVX_INLINE void store_panel(__m256 lo, __m256 hi, const Ends& e, int64_t row, int64_t panel) {
    const int64_t o = panel * kLanes, valid = e.valid - o;
    float* y = e.y + row * e.y_stride + o;
    if (valid >= kLanes) {
        if (e.bias) {
            lo = _mm256_add_ps(lo, _mm256_loadu_ps(e.bias + o));
            hi = _mm256_add_ps(hi, _mm256_loadu_ps(e.bias + o + 8));
        }
        _mm256_storeu_ps(y, lo);
        _mm256_storeu_ps(y + 8, hi);
        return;
    }
    float t[kLanes];
    _mm256_storeu_ps(t, lo);
    _mm256_storeu_ps(t + 8, hi);
    for (int64_t l = 0; l < valid; ++l) y[l] = e.bias ? t[l] + e.bias[o + l] : t[l];
}

// R rows by P panels. R and P are compile-time constants, so that all accumulators stay in registers; a spill costs
// a factor of 2 to 3. Few rows take several panels: an FMA has a latency of 4, so 8 chains must be in flight.
template <int R, int P>
AVX void tile(const float* x, int64_t x_stride, const uint16_t* w, int64_t in, const Ends& ends) {
    __m256 acc[R][P][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) acc[r][p][0] = acc[r][p][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < in; ++k) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            const uint16_t* wk = w + (p * in + k) * kLanes;
            _mm_prefetch(reinterpret_cast<const char*>(wk) + kAhead, _MM_HINT_T0);
            const __m256 lo = load8(wk), hi = load8(wk + 8);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m256 xv = _mm256_broadcast_ss(x + r * x_stride + k);
                acc[r][p][0] = _mm256_fmadd_ps(xv, lo, acc[r][p][0]);
                acc[r][p][1] = _mm256_fmadd_ps(xv, hi, acc[r][p][1]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store_panel(acc[r][p][0], acc[r][p][1], ends, r, p);
}

template <int P>
AVX void rows_by_panels(const Linear& a, int64_t row, int64_t rows, const uint16_t* w, int64_t panel) {
    const float* x = a.x + row * a.x_stride;
    const Ends ends = ends_of(a, row, panel);
    switch (rows) {
        case 1: return tile<1, P>(x, a.x_stride, w, a.in, ends);
        case 2: return tile<2, P>(x, a.x_stride, w, a.in, ends);
        case 3: return tile<3, P>(x, a.x_stride, w, a.in, ends);
        default: break;
    }
    for (int p = 0; p < P; ++p) {  // 8 or more chains already: one panel at a time fits into 16 registers
        const uint16_t* wp = w + p * a.in * kLanes;
        const Ends own = ends_of(a, row, panel + p);
        if (rows == 4) tile<4, 1>(x, a.x_stride, wp, a.in, own);
        else if (rows == 5) tile<5, 1>(x, a.x_stride, wp, a.in, own);
        else tile<6, 1>(x, a.x_stride, wp, a.in, own);
    }
}

template <int P>
void all_rows(const Linear& a, const uint16_t* w, int64_t panel) {
    row_blocks(a.rows, kMaxRows, [&](int64_t row, int64_t rows) { rows_by_panels<P>(a, row, rows, w, panel); });
}

AVX void linear_avx(const void* job, int64_t first, int64_t last) {
    const Linear& a = *static_cast<const Linear*>(job);
    const uint16_t* w = a.packed;
    const int64_t step = a.in * kLanes;
    int64_t p = first;
    if (a.rows == 1)
        for (; p + 4 <= last; p += 4) all_rows<4>(a, w + p * step, p);
    for (; p + 2 <= last; p += 2) all_rows<2>(a, w + p * step, p);
    for (; p < last; ++p) all_rows<1>(a, w + p * step, p);
}

// ---------------------------------------------------------------- AVX-512 path

AVX512_INLINE __m512 load16(const uint16_t* p) {
    // The masked intrinsic with all lanes on gives the plain instruction; gcc 12 warns about the plain intrinsic.
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// A panel is one of 32 registers. Each output is the same chain of FMAs as on AVX2 and has the same bits.
template <int R, int P>
AVX512 void tile512(const float* x, int64_t x_stride, const uint16_t* w, int64_t in, const Ends& ends) {
    __m512 acc[R][P];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < in; ++k) {
        __m512 wv[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            const uint16_t* wk = w + (p * in + k) * kLanes;
            _mm_prefetch(reinterpret_cast<const char*>(wk) + kAhead, _MM_HINT_T0);
            wv[p] = load16(wk);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512 xv = _mm512_set1_ps(x[r * x_stride + k]);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) acc[r][p] = _mm512_fmadd_ps(xv, wv[p], acc[r][p]);
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
        const int64_t o = p * kLanes, left = ends.valid - o;
        const __mmask16 lanes = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        const __m512 b = ends.bias ? _mm512_maskz_loadu_ps(lanes, ends.bias + o) : _mm512_setzero_ps();
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            _mm512_mask_storeu_ps(ends.y + r * ends.y_stride + o, lanes,
                                  ends.bias ? _mm512_add_ps(acc[r][p], b) : acc[r][p]);
    }
}

constexpr int64_t kMaxRows512 = 12;  // 12 rows x 2 panels = 24 accumulators, 2 weights, 1 broadcast: 27 of 32

template <int P>
AVX512 void rows_by_panels512(const Linear& a, int64_t row, int64_t rows, const uint16_t* w, int64_t panel) {
    const float* x = a.x + row * a.x_stride;
    const Ends ends = ends_of(a, row, panel);
    switch (rows) {
        case 1: return tile512<1, P>(x, a.x_stride, w, a.in, ends);
        case 2: return tile512<2, P>(x, a.x_stride, w, a.in, ends);
        case 3: return tile512<3, P>(x, a.x_stride, w, a.in, ends);
        case 4: return tile512<4, P>(x, a.x_stride, w, a.in, ends);
        case 5: return tile512<5, P>(x, a.x_stride, w, a.in, ends);
        case 6: return tile512<6, P>(x, a.x_stride, w, a.in, ends);
        case 7: return tile512<7, P>(x, a.x_stride, w, a.in, ends);
        case 8: return tile512<8, P>(x, a.x_stride, w, a.in, ends);
        case 9: return tile512<9, P>(x, a.x_stride, w, a.in, ends);
        case 10: return tile512<10, P>(x, a.x_stride, w, a.in, ends);
        case 11: return tile512<11, P>(x, a.x_stride, w, a.in, ends);
        default: return tile512<12, P>(x, a.x_stride, w, a.in, ends);
    }
}

template <int P>
void all_rows512(const Linear& a, const uint16_t* w, int64_t panel) {
    row_blocks(a.rows, kMaxRows512, [&](int64_t row, int64_t rows) { rows_by_panels512<P>(a, row, rows, w, panel); });
}

AVX512 void linear_avx512(const void* job, int64_t first, int64_t last) {
    const Linear& a = *static_cast<const Linear*>(job);
    const uint16_t* w = a.packed;
    const int64_t step = a.in * kLanes;
    int64_t p = first;
    if (a.rows == 1)
        for (; p + 8 <= last; p += 8) tile512<1, 8>(a.x, a.x_stride, w + p * step, a.in, ends_of(a, 0, p));
    for (; p + 2 <= last; p += 2) all_rows512<2>(a, w + p * step, p);
    for (; p < last; ++p) all_rows512<1>(a, w + p * step, p);
}

AVX void pack_avx(const float* w, uint16_t* panel, int64_t valid, int64_t in) {
    for (int64_t l = 0; l < valid; ++l)
        for (int64_t k = 0; k < in; ++k) panel[k * kLanes + l] = _cvtss_sh(w[l * in + k], _MM_FROUND_TO_NEAREST_INT);
}
#endif  // HAAST_X86

// ---------------------------------------------------------------- NEON path
#if defined(HAAST_NEON)

inline void load_panel(const uint16_t* p, float32x4_t* w) {
    for (int i = 0; i < 4; ++i) w[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
}

// R rows by one panel of four registers: 6 x 4 accumulators, 4 weights, 1 value of x, 29 of 32.
template <int R>
void tile_neon(const float* x, int64_t x_stride, const uint16_t* w, int64_t in, const Ends& ends) {
    float32x4_t acc[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i) acc[r][i] = vdupq_n_f32(0.0f);
    for (int64_t k = 0; k < in; ++k) {
        float32x4_t wv[4];
        __builtin_prefetch(reinterpret_cast<const char*>(w + k * kLanes) + kAhead);
        load_panel(w + k * kLanes, wv);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float32x4_t xv = vdupq_n_f32(x[r * x_stride + k]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) acc[r][i] = vfmaq_f32(acc[r][i], xv, wv[i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        float t[kLanes];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst1q_f32(t + 4 * i, acc[r][i]);
        float* y = ends.y + r * ends.y_stride;
        for (int64_t l = 0; l < kLanes && l < ends.valid; ++l) y[l] = ends.bias ? t[l] + ends.bias[l] : t[l];
    }
}

void linear_neon(const void* job, int64_t first, int64_t last) {
    const Linear& a = *static_cast<const Linear*>(job);
    for (int64_t p = first; p < last; ++p) {
        const uint16_t* w = a.packed + p * a.in * kLanes;
        row_blocks(a.rows, kMaxRows, [&](int64_t row, int64_t rows) {
            const float* x = a.x + row * a.x_stride;
            const Ends ends = ends_of(a, row, p);
            switch (rows) {
                case 1: return tile_neon<1>(x, a.x_stride, w, a.in, ends);
                case 2: return tile_neon<2>(x, a.x_stride, w, a.in, ends);
                case 3: return tile_neon<3>(x, a.x_stride, w, a.in, ends);
                case 4: return tile_neon<4>(x, a.x_stride, w, a.in, ends);
                case 5: return tile_neon<5>(x, a.x_stride, w, a.in, ends);
                default: return tile_neon<6>(x, a.x_stride, w, a.in, ends);
            }
        });
    }
}
#endif  // HAAST_NEON

// ---------------------------------------------------------------- one entry

Pool::Work linear_work() {
#if defined(HAAST_X86)
    if (path() == kAvx512) return linear_avx512;
    if (use_avx()) return linear_avx;
#elif defined(HAAST_NEON)
    if (path() != kScalar) return linear_neon;
#endif
    return linear_scalar;
}

void multiply(const Linear& a, int threads) {
    if (a.rows <= 0 || a.out <= 0) return;
    const int64_t panels = (a.out + kLanes - 1) / kLanes;
    if (a.rows * a.in * a.out < kSerialWork) threads = 1;
    pool().run(linear_work(), &a, panels, chunk_of(panels, threads), threads);
}

}  // namespace
