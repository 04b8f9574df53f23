// Tree attention: queries against the slots that each of them sees, summed in slot order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu.h"
#include "pool.h"
#include "vector_math.h"

namespace {

struct Attention {
    const float *q, *k, *v, *mask;  // mask may be null: every slot is seen
    float* out;                     // (rows, n, heads, d), contiguous
    int64_t rows, heads, kv_heads, n, slots, d;
    int64_t q_row, q_head, q_node, k_row, k_head, k_slot, v_row, v_head, v_slot, mask_row, mask_node;
    float scaling, softcap;
    int64_t together;  // heads of one piece of work
    // Instead of a mask, where `past` is not null: slots [0, past[row]) are seen, and of the `flight` slots behind
    // them what `seen` says; with a window, only what stands less than `window` positions back.
    const int64_t* past;              // (rows)
    const int64_t* begins;            // (rows): the position in slot 0; null: 0
    const uint8_t* seen;              // (rows, n, flight)
    const int64_t *positions, *flight_positions;  // (rows, n) and (rows, flight), windows only
    int64_t flight, window;
};

// One query row of one or more heads that read the same KV head.
struct Query {
    int64_t row, node, head, heads;
    const float* mask;  // (slots), or null
    const int32_t* slot;
    int64_t count;  // unmasked slots
    bool biased;    // some unmasked mask value is not 0
};

// Lists the unmasked slots in slot order, then repeats the last one up to a multiple of 8 (safe to load, never summed).
int64_t compact(const float* mask, int64_t slots, int32_t* slot, bool* biased) {
    int64_t count = 0;
    bool any = false;
    for (int64_t s = 0; s < slots; ++s) {
        const bool seen = !mask || mask[s] > kMasked;
        slot[count] = static_cast<int32_t>(s);
        count += seen;
        any |= seen && mask && mask[s] != 0.0f;
    }
    *biased = any;
    if (count)
        for (int64_t i = count; i % 8; ++i) slot[i] = slot[count - 1];
    return count;
}

int64_t list_masked(const Attention& a, int64_t row, int64_t node, int32_t* slot, bool* biased) {
    return compact(a.mask ? a.mask + row * a.mask_row + node * a.mask_node : nullptr, a.slots, slot, biased);
}

int64_t list_seen(const Attention& a, int64_t row, int64_t node, int32_t* slot, bool* biased) {
    const int64_t past = a.past[row], position = a.window ? a.positions[row * a.n + node] : 0;
    const int64_t nearest = position - a.window + 1, slots_off = nearest - (a.begins ? a.begins[row] : 0);
    const int64_t first = a.window && slots_off > 0 ? slots_off : 0;
    int64_t count = past > first ? past - first : 0;
    for (int64_t i = 0; i < count; ++i) slot[i] = static_cast<int32_t>(first + i);
    const uint8_t* seen = a.seen + (row * a.n + node) * a.flight;
    for (int64_t j = 0; j < a.flight; ++j) {
        const bool near = !a.window || a.flight_positions[row * a.flight + j] >= nearest;
        slot[count] = static_cast<int32_t>(past + j);
        count += seen[j] && near;
    }
    *biased = false;
    if (count)
        for (int64_t i = count; i % 8; ++i) slot[i] = slot[count - 1];
    return count;
}

void attend_scalar(const Attention& a, const Query& u, float* p) {
    const int64_t kv = u.head / (a.heads / a.kv_heads);
    for (int64_t h = u.head; h < u.head + u.heads; ++h) {
        const float* q = a.q + u.row * a.q_row + h * a.q_head + u.node * a.q_node;
        float* out = a.out + ((u.row * a.n + u.node) * a.heads + h) * a.d;
        float best = -std::numeric_limits<float>::infinity(), total = 0.0f;
        for (int64_t i = 0; i < u.count; ++i) {
            const float* k = a.k + u.row * a.k_row + kv * a.k_head + u.slot[i] * a.k_slot;
            float s = 0.0f;
            for (int64_t c = 0; c < a.d; ++c) s += q[c] * k[c];
            s *= a.scaling;
            if (a.softcap > 0.0f) s = a.softcap * std::tanh(s / a.softcap);
            p[i] = u.biased ? s + u.mask[u.slot[i]] : s;
            best = p[i] > best ? p[i] : best;
        }
        for (int64_t c = 0; c < a.d; ++c) out[c] = 0.0f;
        for (int64_t i = 0; i < u.count; ++i) {
            const float* v = a.v + u.row * a.v_row + kv * a.v_head + u.slot[i] * a.v_slot;
            const float e = std::exp(p[i] - best);
            total += e;
            for (int64_t c = 0; c < a.d; ++c) out[c] += e * v[c];
        }
        if (u.count)
            for (int64_t c = 0; c < a.d; ++c) out[c] /= total;
    }
}

#if defined(HAAST_X86)
// The same list as compact(), eight mask values at a time.
AVX int64_t compact_avx(const float* mask, int64_t slots, int32_t* slot, bool* biased) {
    if (!mask) return compact(mask, slots, slot, biased);
    int64_t count = 0, s = 0;
    int any = 0;
    const __m256 limit = _mm256_set1_ps(kMasked), zero = _mm256_setzero_ps();
    const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (; s + 8 <= slots; s += 8) {
        const __m256 m = _mm256_loadu_ps(mask + s);
        const __m256 seen = _mm256_cmp_ps(m, limit, _CMP_GT_OQ);
        int bits = _mm256_movemask_ps(seen);
        any |= _mm256_movemask_ps(_mm256_and_ps(seen, _mm256_cmp_ps(m, zero, _CMP_NEQ_UQ)));
        if (bits == 255) {
            const __m256i all = _mm256_add_epi32(iota, _mm256_set1_epi32(static_cast<int>(s)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(slot + count), all);
            count += 8;
            continue;
        }
        for (; bits; bits &= bits - 1)
            slot[count++] = static_cast<int32_t>(s) + __builtin_ctz(static_cast<unsigned>(bits));
    }
    for (; s < slots; ++s)
        if (mask[s] > kMasked) {
            slot[count++] = static_cast<int32_t>(s);
            any |= mask[s] != 0.0f;
        }
    *biased = any != 0;
    if (count)
        for (int64_t i = count; i % 8; ++i) slot[i] = slot[count - 1];
    return count;
}

AVX int64_t list_masked_avx(const Attention& a, int64_t row, int64_t node, int32_t* slot, bool* biased) {
    return compact_avx(a.mask ? a.mask + row * a.mask_row + node * a.mask_node : nullptr, a.slots, slot, biased);
}

// Scores of H heads against eight slots, in two halves of four: 4 x H accumulators share the loads of K and q. Every dot
// product is reduced by the same tree of additions, so a score depends neither on its place among the eight nor on H.
template <int H>
AVX_INLINE void dots8(const float* q, int64_t q_head, const float* const* k, int64_t d, float* p, int64_t p_stride) {
    for (int half = 0; half < 8; half += 4) {
        const float *k0 = k[half], *k1 = k[half + 1], *k2 = k[half + 2], *k3 = k[half + 3];
        __m256 acc[H][4];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) acc[h][0] = acc[h][1] = acc[h][2] = acc[h][3] = _mm256_setzero_ps();
        for (int64_t c = 0; c < d; c += 8) {
            const __m256 a = _mm256_loadu_ps(k0 + c), b = _mm256_loadu_ps(k1 + c);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                const __m256 qv = _mm256_loadu_ps(q + h * q_head + c);
                acc[h][0] = _mm256_fmadd_ps(qv, a, acc[h][0]);
                acc[h][1] = _mm256_fmadd_ps(qv, b, acc[h][1]);
                acc[h][2] = _mm256_fmadd_ps(qv, _mm256_loadu_ps(k2 + c), acc[h][2]);
                acc[h][3] = _mm256_fmadd_ps(qv, _mm256_loadu_ps(k3 + c), acc[h][3]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(acc[h][0], acc[h][1]), _mm256_hadd_ps(acc[h][2], acc[h][3]));
            _mm_storeu_ps(p + h * p_stride + half, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
        }
    }
}

// The same sums on AVX-512, two slots in one register: the low half adds up one slot's products, the high half another's.
template <int H>
AVX512_INLINE void dots8_wide(const float* q, int64_t q_head, const float* const* k, int64_t d, float* p,
                              int64_t p_stride) {
    __m512 acc[H][4];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) acc[h][0] = acc[h][1] = acc[h][2] = acc[h][3] = _mm512_setzero_ps();
    for (int64_t c = 0; c < d; c += 8) {
        __m512 qv[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h)
            qv[h] = _mm512_castpd_ps(_mm512_maskz_broadcast_f64x4(0xff, _mm256_castps_pd(_mm256_loadu_ps(q + h * q_head + c))));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(k[2 * j] + c)));
            const __m512 kv = _mm512_castpd_ps(
                _mm512_maskz_insertf64x4(0xff, low, _mm256_castps_pd(_mm256_loadu_ps(k[2 * j + 1] + c)), 1));
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) acc[h][j] = _mm512_fmadd_ps(qv[h], kv, acc[h][j]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m256 s0 = _mm512_castps512_ps256(acc[h][2 * half]), s2 = _mm512_castps512_ps256(acc[h][2 * half + 1]);
            const __m256 s1 = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(acc[h][2 * half]), 1));
            const __m256 s3 =
                _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(acc[h][2 * half + 1]), 1));
            const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(s0, s1), _mm256_hadd_ps(s2, s3));
            _mm_storeu_ps(p + h * p_stride + 4 * half,
                          _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
        }
}

AVX512 void dots_avx512(const Attention& a, const Query& u, const float* keys, const float* q, float* p,
                        int64_t p_stride) {
    for (int64_t i = 0; i < u.count; i += 8) {
        const float* k[8];
        for (int j = 0; j < 8; ++j) k[j] = keys + u.slot[i + j] * a.k_slot;
        int64_t h = 0;
        for (; h + 3 <= u.heads; h += 3)
            dots8_wide<3>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
        for (; h < u.heads; ++h) dots8_wide<1>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
    }
}

AVX void dots_avx(const Attention& a, const Query& u, const float* keys, const float* q, float* p, int64_t p_stride) {
    for (int64_t i = 0; i < u.count; i += 8) {
        const float* k[8];
        for (int j = 0; j < 8; ++j) k[j] = keys + u.slot[i + j] * a.k_slot;
        int64_t h = 0;
        for (; h + 3 <= u.heads; h += 3) dots8<3>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
        for (; h < u.heads; ++h) dots8<1>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
    }
}

// Scores of all heads of the query, eight slots at a time: a key row is read once per KV head.
AVX void scores_avx(const Attention& a, const Query& u, float* p, int64_t p_stride) {
    const float* keys = a.k + u.row * a.k_row + u.head / (a.heads / a.kv_heads) * a.k_head;
    const float* q = a.q + u.row * a.q_row + u.head * a.q_head + u.node * a.q_node;
    if (path() == kAvx512) dots_avx512(a, u, keys, q, p, p_stride);
    else dots_avx(a, u, keys, q, p, p_stride);
    const __m256 scaling = _mm256_set1_ps(a.scaling), cap = _mm256_set1_ps(a.softcap);
    for (int64_t h = 0; h < u.heads; ++h)
        for (int64_t i = 0; i < u.count; i += 8) {
            __m256 s = _mm256_mul_ps(_mm256_loadu_ps(p + h * p_stride + i), scaling);
            if (a.softcap > 0.0f) s = _mm256_mul_ps(cap, tanh8(_mm256_div_ps(s, cap)));
            if (u.biased) {
                const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(u.slot + i));
                s = _mm256_add_ps(s, _mm256_i32gather_ps(u.mask, at, 4));
            }
            _mm256_storeu_ps(p + h * p_stride + i, s);
        }
}

// Scores to unnormalised weights in place; returns their sum. The places after `count` become 0 and add nothing.
AVX float softmax_avx(float* p, int64_t count) {
    const float lowest = -std::numeric_limits<float>::infinity();
    const int64_t whole = (count + 7) / 8 * 8;
    for (int64_t i = count; i < whole; ++i) p[i] = lowest;
    __m256 top = _mm256_set1_ps(lowest), total = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 8) top = _mm256_max_ps(top, _mm256_loadu_ps(p + i));
    top = _mm256_set1_ps(max8(top));
    for (int64_t i = 0; i < whole; i += 8) {
        const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(p + i), top));
        _mm256_storeu_ps(p + i, e);
        total = _mm256_add_ps(total, e);
    }
    return sum8(total);
}

// C registers of the head dimension of H heads over the slots [from, to), continuing the sums that stand in out. The
// heads share the loads of V; every sum is one chain in slot order whatever C and H are.
template <int H, int C>
AVX void weigh(const Attention& a, const Query& u, const float* values, const float* p, int64_t p_stride, int64_t from,
               int64_t to, float* out) {
    __m256 acc[H][C];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[h][c] = _mm256_loadu_ps(out + h * a.d + c * 8);
    for (int64_t i = from; i < to; ++i) {
        const float* v = values + u.slot[i] * a.v_slot;
        __m256 pv[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) pv[h] = _mm256_broadcast_ss(p + h * p_stride + i);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const __m256 vv = _mm256_loadu_ps(v + c * 8);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) acc[h][c] = _mm256_fmadd_ps(pv[h], vv, acc[h][c]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) _mm256_storeu_ps(out + h * a.d + c * 8, acc[h][c]);
}

// The same chains on AVX-512, sixteen values of the head dimension in a register.
template <int H, int C>
AVX512 void weigh_wide(const Attention& a, const Query& u, const float* values, const float* p, int64_t p_stride,
                       int64_t from, int64_t to, float* out) {
    __m512 acc[H][C];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[h][c] = _mm512_loadu_ps(out + h * a.d + c * 16);
    for (int64_t i = from; i < to; ++i) {
        const float* v = values + u.slot[i] * a.v_slot;
        __m512 pv[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) pv[h] = _mm512_set1_ps(p[h * p_stride + i]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const __m512 vv = _mm512_loadu_ps(v + c * 16);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) acc[h][c] = _mm512_fmadd_ps(pv[h], vv, acc[h][c]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + h * a.d + c * 16, acc[h][c]);
}

template <int H>
AVX void weigh_heads(const Attention& a, const Query& u, const float* values, const float* p, int64_t p_stride, int64_t from,
                     int64_t to, float* out) {
    constexpr int kWide = H == 1 ? 8 : 4;  // 8 or 12 accumulators
    int64_t c = 0;
    if (path() == kAvx512)
        for (; c + 64 <= a.d; c += 64) weigh_wide<H, 4>(a, u, values + c, p, p_stride, from, to, out + c);
    for (; c + kWide * 8 <= a.d; c += kWide * 8) weigh<H, kWide>(a, u, values + c, p, p_stride, from, to, out + c);
    for (; c + 16 <= a.d; c += 16) weigh<H, 2>(a, u, values + c, p, p_stride, from, to, out + c);
    if (c < a.d) weigh<H, 1>(a, u, values + c, p, p_stride, from, to, out + c);
}

AVX void attend_avx(const Attention& a, const Query& u, float* p) {
    constexpr int64_t kBlock = 64;  // 64 value rows of 64 floats are 16 KB: they stay in L1 while the heads take turns
    const int64_t p_stride = (a.slots + 7) / 8 * 8;
    const float* values = a.v + u.row * a.v_row + u.head / (a.heads / a.kv_heads) * a.v_head;
    float* out = a.out + ((u.row * a.n + u.node) * a.heads + u.head) * a.d;
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(u.heads * a.d));
    if (!u.count) return;
    scores_avx(a, u, p, p_stride);
    float total[kMaxGroup];
    for (int64_t h = 0; h < u.heads; ++h) total[h] = softmax_avx(p + h * p_stride, u.count);
    for (int64_t i = 0; i < u.count; i += kBlock) {
        const int64_t end = i + kBlock < u.count ? i + kBlock : u.count;
        int64_t h = 0;
        for (; h + 3 <= u.heads; h += 3)
            weigh_heads<3>(a, u, values, p + h * p_stride, p_stride, i, end, out + h * a.d);
        for (; h < u.heads; ++h) weigh_heads<1>(a, u, values, p + h * p_stride, p_stride, i, end, out + h * a.d);
    }
    for (int64_t h = 0; h < u.heads; ++h) {
        const __m256 t = _mm256_set1_ps(total[h]);
        for (int64_t c = h * a.d; c < (h + 1) * a.d; c += 8)
            _mm256_storeu_ps(out + c, _mm256_div_ps(_mm256_loadu_ps(out + c), t));
    }
}

#endif  // HAAST_X86

// Items are (row, head or group of heads, node), nodes innermost: they read the same K and V.
template <int64_t (*List)(const Attention&, int64_t, int64_t, int32_t*, bool*),
          void (*Attend)(const Attention&, const Query&, float*)>
void attend_items(const void* job, int64_t first, int64_t last) {
    const Attention& a = *static_cast<const Attention*>(job);
    const int64_t room = (a.slots + 7) / 8 * 8, per_row = a.heads / a.together;
    std::unique_ptr<int32_t[]> slot(new int32_t[room + 8]);
    std::unique_ptr<float[]> p(new float[room * a.together + 8]);
    for (int64_t item = first; item < last; ++item) {
        const int64_t node = item % a.n, head = item / a.n % per_row * a.together, row = item / a.n / per_row;
        const float* mask = a.mask ? a.mask + row * a.mask_row + node * a.mask_node : nullptr;
        Query u{row, node, head, a.together, mask, slot.get(), 0, false};
        u.count = List(a, row, node, slot.get(), &u.biased);
        Attend(a, u, p.get());
    }
}

void attend(Attention a, int threads) {
    if (a.rows <= 0 || a.n <= 0) return;
    // Heads of a group go together (they share K and V) unless that leaves too few pieces for the threads.
    const int64_t group = a.heads / a.kv_heads;
    a.together = a.rows * a.n * a.kv_heads >= 4 * threads ? group : 1;
    Pool::Work work = a.past ? attend_items<list_seen, attend_scalar> : attend_items<list_masked, attend_scalar>;
#if defined(HAAST_X86)
    if (use_avx() && a.d % 8 == 0 && group <= kMaxGroup)
        work = a.past ? attend_items<list_seen, attend_avx> : attend_items<list_masked_avx, attend_avx>;
#endif
    const int64_t items = a.rows * a.n * (a.heads / a.together);
    if (items * a.together * a.slots * a.d < kSerialWork) threads = 1;
    const int64_t chunk = items / (8 * static_cast<int64_t>(threads < 1 ? 1 : threads));
    pool().run(work, &a, items, chunk < 1 ? 1 : chunk, threads);
}

}  // namespace
