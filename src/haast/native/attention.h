// Tree attention: each query attends to its unmasked slots, with sums in slot order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu.h"
#include "half.h"
#include "pool.h"
#include "slots.h"
#include "vector_math.h"

namespace {

// Number format of keys and values.
enum Form : int64_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

struct Attention {
    const float *q, *mask;  // mask may be null: no slot is masked
    const void *k, *v;      // of `form`
    float* out;             // (rows, n, heads, d), contiguous
    int64_t rows, heads, kv_heads, n, slots, d;
    int64_t q_row, q_head, q_node, k_row, k_head, k_slot, v_row, v_head, v_slot, mask_row, mask_node;
    float scaling, softcap;
    int64_t together;  // heads per work item
    // Replaces the mask if `places` is not null: a row attends to its logical slots [0, past[row]) and to those of
    // the next `flight` slots that `seen` marks; with a window, only to positions less than `window` back. Slot i of
    // the past holds position i.
    const Slots* places;  // physical slots of the logical ones; k_row and v_row are 0: all rows share one store
    const int64_t* past;  // (rows)
    const uint8_t* seen;  // (rows, n, flight)
    const int64_t *positions, *flight_positions;  // (rows, n) and (rows, flight), windows only
    int64_t flight, window;
    Form form;
};

template <typename E>
inline const E* keys_of(const Attention& a, int64_t row, int64_t kv) {
    return static_cast<const E*>(a.k) + row * a.k_row + kv * a.k_head;
}

template <typename E>
inline const E* values_of(const Attention& a, int64_t row, int64_t kv) {
    return static_cast<const E*>(a.v) + row * a.v_row + kv * a.v_head;
}

// One query row of one or more heads that read the same KV head.
struct Query {
    int64_t row, node, head, heads;
    const float* mask;  // (slots), or null
    const int32_t* slot;  // (count): physical slots to attend to, in text order; their numbers do not change a result
    int64_t count;
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
    const int64_t past = a.past[row], nearest = a.window ? a.positions[row * a.n + node] - a.window + 1 : 0;
    const int64_t first = nearest > 0 ? nearest : 0;
    const int32_t* place = a.places->of_row(row);
    int64_t count = past > first ? past - first : 0;
    if (count) std::memcpy(slot, place + first, sizeof(int32_t) * static_cast<size_t>(count));
    const uint8_t* seen = a.seen + (row * a.n + node) * a.flight;
    for (int64_t j = 0; j < a.flight; ++j) {
        const bool near = !a.window || a.flight_positions[row * a.flight + j] >= nearest;
        slot[count] = place[past + j];
        count += seen[j] && near;
    }
    *biased = false;
    if (count)
        for (int64_t i = count; i % 8; ++i) slot[i] = slot[count - 1];
    return count;
}

template <typename E>
void attend_scalar(const Attention& a, const Query& u, float* p) {
    const int64_t kv = u.head / (a.heads / a.kv_heads);
    const E *keys = keys_of<E>(a, u.row, kv), *values = values_of<E>(a, u.row, kv);
    for (int64_t h = u.head; h < u.head + u.heads; ++h) {
        const float* q = a.q + u.row * a.q_row + h * a.q_head + u.node * a.q_node;
        float* out = a.out + ((u.row * a.n + u.node) * a.heads + h) * a.d;
        float best = -std::numeric_limits<float>::infinity(), total = 0.0f;
        for (int64_t i = 0; i < u.count; ++i) {
            const E* k = keys + u.slot[i] * a.k_slot;
            float s = 0.0f;
            for (int64_t c = 0; c < a.d; ++c) s += q[c] * widen(k[c]);
            s *= a.scaling;
            if (a.softcap > 0.0f) s = a.softcap * std::tanh(s / a.softcap);
            p[i] = u.biased ? s + u.mask[u.slot[i]] : s;
            best = p[i] > best ? p[i] : best;
        }
        for (int64_t c = 0; c < a.d; ++c) out[c] = 0.0f;
        for (int64_t i = 0; i < u.count; ++i) {
            const E* v = values + u.slot[i] * a.v_slot;
            const float e = std::exp(p[i] - best);
            total += e;
            for (int64_t c = 0; c < a.d; ++c) out[c] += e * widen(v[c]);
        }
        if (u.count)
            for (int64_t c = 0; c < a.d; ++c) out[c] /= total;
    }
}

#if defined(HAAST_X86)
// As compact(), but eight mask values at a time.
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

constexpr int64_t kSlotsAhead = 32;  // two blocks: a slot's row is prefetched this many slots before its use

// Whether the slots [from, to) of a query's list, and those prefetched meanwhile, are contiguous in the store. If so,
// the hardware prefetcher suffices; it cannot predict a jump to another block.
inline bool one_stretch(const Query& u, int64_t from, int64_t to) {
    const int64_t last = (to + kSlotsAhead < u.count ? to + kSlotsAhead : u.count) - 1;
    return u.slot[last] - u.slot[from] == last - from;
}

// Prefetches the row of the slot `kSlotsAhead` entries after entry i of the list.
template <typename E>
AVX_INLINE void ask_ahead(const Query& u, int64_t i, const E* rows, int64_t stride, int64_t d) {
    if (i + kSlotsAhead >= u.count) return;
    const char* row = reinterpret_cast<const char*>(rows + u.slot[i + kSlotsAhead] * stride);
    for (int64_t at = 0; at < d * static_cast<int64_t>(sizeof(E)); at += 64) _mm_prefetch(row + at, _MM_HINT_T0);
}

// Scores of H heads for eight slots, in two halves of four: 4 x H accumulators share the loads of K and q. All dot
// products are reduced by the same tree of additions, so a score depends neither on its index among the eight nor on H.
template <int H, typename E>
AVX_INLINE void dots8(const float* q, int64_t q_head, const E* const* k, int64_t d, float* p, int64_t p_stride) {
    for (int half = 0; half < 8; half += 4) {
        const E *k0 = k[half], *k1 = k[half + 1], *k2 = k[half + 2], *k3 = k[half + 3];
        __m256 acc[H][4];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) acc[h][0] = acc[h][1] = acc[h][2] = acc[h][3] = _mm256_setzero_ps();
        for (int64_t c = 0; c < d; c += 8) {
            const __m256 a = load8(k0 + c), b = load8(k1 + c);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                const __m256 qv = _mm256_loadu_ps(q + h * q_head + c);
                acc[h][0] = _mm256_fmadd_ps(qv, a, acc[h][0]);
                acc[h][1] = _mm256_fmadd_ps(qv, b, acc[h][1]);
                acc[h][2] = _mm256_fmadd_ps(qv, load8(k2 + c), acc[h][2]);
                acc[h][3] = _mm256_fmadd_ps(qv, load8(k3 + c), acc[h][3]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(acc[h][0], acc[h][1]), _mm256_hadd_ps(acc[h][2], acc[h][3]));
            _mm_storeu_ps(p + h * p_stride + half, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
        }
    }
}

template <int I>
AVX512_INLINE __m256 half_of(__m512 v) {
    return _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(v), I));
}

// The same sums on AVX-512, with two slots per register: one in the low half, one in the high half.
template <int H, typename E>
AVX512_INLINE void dots8_wide(const float* q, int64_t q_head, const E* const* k, int64_t d, float* p,
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
            const __m512 kv = load8_twice(k[2 * j] + c, k[2 * j + 1] + c);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) acc[h][j] = _mm512_fmadd_ps(qv[h], kv, acc[h][j]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512 first = acc[h][2 * half], second = acc[h][2 * half + 1];
            const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half_of<0>(first), half_of<1>(first)),
                                            _mm256_hadd_ps(half_of<0>(second), half_of<1>(second)));
            _mm_storeu_ps(p + h * p_stride + 4 * half,
                          _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
        }
}

template <typename E>
AVX512 void dots_avx512(const Attention& a, const Query& u, const E* keys, const float* q, float* p,
                        int64_t p_stride) {
    for (int64_t i = 0; i < u.count; i += 8) {
        const E* k[8];
        for (int j = 0; j < 8; ++j) k[j] = keys + u.slot[i + j] * a.k_slot;
        if (!one_stretch(u, i, i + 8))
            for (int j = 0; j < 8; ++j) ask_ahead(u, i + j, keys, a.k_slot, a.d);
        int64_t h = 0;
        for (; h + 3 <= u.heads; h += 3)
            dots8_wide<3>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
        for (; h < u.heads; ++h) dots8_wide<1>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
    }
}

template <typename E>
AVX void dots_avx(const Attention& a, const Query& u, const E* keys, const float* q, float* p, int64_t p_stride) {
    for (int64_t i = 0; i < u.count; i += 8) {
        const E* k[8];
        for (int j = 0; j < 8; ++j) k[j] = keys + u.slot[i + j] * a.k_slot;
        if (!one_stretch(u, i, i + 8))
            for (int j = 0; j < 8; ++j) ask_ahead(u, i + j, keys, a.k_slot, a.d);
        int64_t h = 0;
        for (; h + 3 <= u.heads; h += 3) dots8<3>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
        for (; h < u.heads; ++h) dots8<1>(q + h * a.q_head, a.q_head, k, a.d, p + h * p_stride + i, p_stride);
    }
}

// Scores of all heads of the query, eight slots at a time. Reads each key row once per KV head.
template <typename E>
AVX void scores_avx(const Attention& a, const Query& u, float* p, int64_t p_stride) {
    const E* keys = keys_of<E>(a, u.row, u.head / (a.heads / a.kv_heads));
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

// Turns scores into unnormalised weights in place; returns their sum. Entries after `count` become 0.
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

// Adds the weighted values of the slots [from, to) to `out`, for H heads and C registers of the head dimension. The
// heads share the loads of V. Each sum is one chain in slot order for any C and H.
template <int H, int C, typename E>
AVX void weigh(const Attention& a, const Query& u, const E* values, const float* p, int64_t p_stride, int64_t from,
               int64_t to, float* out) {
    __m256 acc[H][C];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[h][c] = _mm256_loadu_ps(out + h * a.d + c * 8);
    const bool ask = !one_stretch(u, from, to);
    for (int64_t i = from; i < to; ++i) {
        const E* v = values + u.slot[i] * a.v_slot;
        if (ask) ask_ahead(u, i, values, a.v_slot, C * 8);
        __m256 pv[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) pv[h] = _mm256_broadcast_ss(p + h * p_stride + i);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const __m256 vv = load8(v + c * 8);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) acc[h][c] = _mm256_fmadd_ps(pv[h], vv, acc[h][c]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) _mm256_storeu_ps(out + h * a.d + c * 8, acc[h][c]);
}

// The same chains on AVX-512, with sixteen values of the head dimension per register.
template <int H, int C, typename E>
AVX512 void weigh_wide(const Attention& a, const Query& u, const E* values, const float* p, int64_t p_stride,
                       int64_t from, int64_t to, float* out) {
    __m512 acc[H][C];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[h][c] = _mm512_loadu_ps(out + h * a.d + c * 16);
    const bool ask = !one_stretch(u, from, to);
    for (int64_t i = from; i < to; ++i) {
        const E* v = values + u.slot[i] * a.v_slot;
        if (ask) ask_ahead(u, i, values, a.v_slot, C * 16);
        __m512 pv[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) pv[h] = _mm512_set1_ps(p[h * p_stride + i]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const __m512 vv = load16(v + c * 16);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) acc[h][c] = _mm512_fmadd_ps(pv[h], vv, acc[h][c]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + h * a.d + c * 16, acc[h][c]);
}

template <int H, typename E>
AVX void weigh_heads(const Attention& a, const Query& u, const E* values, const float* p, int64_t p_stride, int64_t from,
                     int64_t to, float* out) {
    constexpr int kWide = H == 1 ? 8 : 4;  // 8 or 12 accumulators
    int64_t c = 0;
    if (path() == kAvx512)
        for (; c + 64 <= a.d; c += 64) weigh_wide<H, 4>(a, u, values + c, p, p_stride, from, to, out + c);
    for (; c + kWide * 8 <= a.d; c += kWide * 8) weigh<H, kWide>(a, u, values + c, p, p_stride, from, to, out + c);
    for (; c + 16 <= a.d; c += 16) weigh<H, 2>(a, u, values + c, p, p_stride, from, to, out + c);
    if (c < a.d) weigh<H, 1>(a, u, values + c, p, p_stride, from, to, out + c);
}

template <typename E>
AVX void attend_avx(const Attention& a, const Query& u, float* p) {
    constexpr int64_t kBlock = 64;  // 64 value rows of 64 floats are 16 KB, which stay in L1 for all heads
    const int64_t p_stride = (a.slots + 7) / 8 * 8;
    const E* values = values_of<E>(a, u.row, u.head / (a.heads / a.kv_heads));
    float* out = a.out + ((u.row * a.n + u.node) * a.heads + u.head) * a.d;
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(u.heads * a.d));
    if (!u.count) return;
    scores_avx<E>(a, u, p, p_stride);
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

// Items are (row, head or group of heads, node); nodes are innermost, as they read the same K and V.
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

template <typename E>
Pool::Work attend_placed([[maybe_unused]] bool fast) {
#if defined(HAAST_X86)
    if (fast) return attend_items<list_seen, attend_avx<E>>;
#endif
    return attend_items<list_seen, attend_scalar<E>>;
}

Pool::Work attend_masked([[maybe_unused]] bool fast) {
#if defined(HAAST_X86)
    if (fast) return attend_items<list_masked_avx, attend_avx<float>>;
#endif
    return attend_items<list_masked, attend_scalar<float>>;
}

void attend(Attention a, int threads) {
    if (a.rows <= 0 || a.n <= 0) return;
    // Process the heads of a group together (they share K and V) unless that gives too few items for the threads.
    const int64_t group = a.heads / a.kv_heads;
    a.together = a.rows * a.n * a.kv_heads >= 4 * threads ? group : 1;
    const bool fast = use_avx() && a.d % 8 == 0 && group <= kMaxGroup;
    const Pool::Work work = !a.places         ? attend_masked(fast)
                            : a.form == kF16  ? attend_placed<F16>(fast)
                            : a.form == kBF16 ? attend_placed<BF16>(fast)
                                              : attend_placed<float>(fast);
    const int64_t items = a.rows * a.n * (a.heads / a.together);
    if (items * a.together * a.slots * a.d < kSerialWork) threads = 1;
    const int64_t chunk = items / (8 * static_cast<int64_t>(threads < 1 ? 1 : threads));
    pool().run(work, &a, items, chunk < 1 ? 1 : chunk, threads);
}

}  // namespace
