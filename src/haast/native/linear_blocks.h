// Matrix products with block weights (blocks.h) in integers: y = x W^T.
//
// A row of x is rounded to int8 per block of 32 inputs, with one fp32 scale each. Products within the inputs that share
// a scale are exact integers; over blocks they are added in fp32, in the order of the inputs:
//   acc = fma(float(sum of q * x) * scale, row scale, acc), then acc = fma(minimum, row scale * sum of x, acc)
// so that an output has the same bits with every instruction set, for any other rows and any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "blocks.h"
#include "cpu.h"
#include "linear.h"
#include "pool.h"

namespace {

struct Blocks {  // a product
    const float* x;
    const void* packed;
    const float* bias;  // (out), may be null
    float* y;
    int64_t rows, in, out, x_stride, y_stride;
    WeightForm form;
};

// Rows as int8. The rows of a tile are interleaved block by block, so that a tile reads one stream: (tiles, blocks,
// rows of the tile, 32) and so on.
struct RowBlocks {
    int8_t* q;       // (rows, blocks, 32)
    float* scales;   // (rows, blocks)
    int32_t* sums;   // (rows, blocks, scales per block): what the format needs of the sum of q, see `sum_of`
};

struct BlockProduct {
    const Blocks* a;
    const RowBlocks* x;
};

// ---------------------------------------------------------------- rows

// What a product adds for the sum of a row's q: the bits of fp32 row scale * sum for formats with minimums, else the
// integer - zero * sum from which the sum of products starts.
inline int32_t sum_of(const BlockForm& f, int32_t sum, float scale) {
    if (!f.minimum) return -f.zero * sum;
    const float scaled = scale * static_cast<float>(sum);
    int32_t bits;
    std::memcpy(&bits, &scaled, 4);
    return bits;
}

struct Rounding {
    const Blocks* a;
    const RowBlocks* x;
    int64_t most_rows;  // of a tile
};

// One block: its largest magnitude becomes 127. A NaN or an infinity makes the scale NaN or infinite.
inline float scales_of(int32_t most_bits, float* inverse) {
    float most;
    std::memcpy(&most, &most_bits, 4);
    const bool tiny = most < 1e-30f;  // 127 / most could overflow
    *inverse = tiny ? 0.0f : 127.0f / most;
    return tiny ? 0.0f : most / 127.0f;
}

float round_scalar(const float* x, int8_t* q, int32_t* sums) {
    int32_t most = 0;
    for (int i = 0; i < kBlockInputs; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        most = std::max(most, bits & 0x7fffffff);
    }
    float inverse;
    const float scale = scales_of(most, &inverse);
    sums[0] = sums[1] = 0;
    for (int i = 0; i < kBlockInputs; ++i) {
        const float value = std::nearbyint(x[i] * inverse);
        q[i] = value >= -127.0f && value <= 127.0f ? static_cast<int8_t>(value) : 0;  // NaN: the scale is NaN too
        sums[i / 16] += q[i];
    }
    return scale;
}

#if defined(HAAST_X86)
AVX_INLINE int32_t sum_lanes(__m256i v) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

AVX_INLINE int32_t max_lane(__m256i v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

AVX float round_avx(const float* x, int8_t* q, int32_t* sums) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    const __m256 limit = _mm256_set1_ps(127.5f), sign = _mm256_set1_ps(-0.0f);
    __m256 v[4];
    __m256i most = _mm256_setzero_si256(), whole[4];
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    }
    float inverse;
    const float scale = scales_of(max_lane(most), &inverse);
    for (int i = 0; i < 4; ++i) {
        const __m256 exact = _mm256_mul_ps(v[i], _mm256_set1_ps(inverse));
        const __m256 valid = _mm256_cmp_ps(_mm256_andnot_ps(sign, exact), limit, _CMP_LT_OQ);  // false for NaN
        whole[i] = _mm256_cvtps_epi32(_mm256_and_ps(exact, valid));
    }
    sums[0] = sum_lanes(_mm256_add_epi32(whole[0], whole[1]));
    sums[1] = sum_lanes(_mm256_add_epi32(whole[2], whole[3]));
    // Packing works within 128-bit lanes; the permutation puts groups of four back in order.
    const __m256i low = _mm256_packs_epi32(whole[0], whole[1]), high = _mm256_packs_epi32(whole[2], whole[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
    return scale;
}

AVX512 float round_avx512(const float* x, int8_t* q, int32_t* sums) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512 v[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
    const __m512i most = _mm512_maskz_max_epi32(0xffff, _mm512_and_si512(_mm512_castps_si512(v[0]), magnitude),
                                                _mm512_and_si512(_mm512_castps_si512(v[1]), magnitude));
    float inverse;
    const float scale = scales_of(
        max_lane(_mm256_max_epi32(_mm512_castsi512_si256(most), _mm512_maskz_extracti64x4_epi64(0xf, most, 1))), &inverse);
    for (int i = 0; i < 2; ++i) {
        const __m512 exact = _mm512_mul_ps(v[i], _mm512_set1_ps(inverse));
        const __m512 size = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(exact), magnitude));
        const __mmask16 valid = _mm512_cmp_ps_mask(size, _mm512_set1_ps(127.5f), _CMP_LT_OQ);  // false for NaN
        const __m512i whole = _mm512_maskz_cvtps_epi32(valid, exact);
        sums[i] = sum_lanes(_mm256_add_epi32(_mm512_castsi512_si256(whole), _mm512_maskz_extracti64x4_epi64(0xf, whole, 1)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), _mm512_maskz_cvtsepi32_epi8(0xffff, whole));
    }
    return scale;
}
#endif

void round_rows(const void* job, int64_t first, int64_t last) {
    const Rounding& a = *static_cast<const Rounding*>(job);
    const Blocks& p = *a.a;
    const BlockForm& f = kForms[p.form];
    const int64_t blocks = groups_of(f, p.in) * (f.group / kBlockInputs), shares = kBlockInputs / f.shared;
    auto* round = round_scalar;
#if defined(HAAST_X86)
    round = path() == kAvx512 ? round_avx512 : use_avx() ? round_avx : round_scalar;
#endif
    row_blocks(p.rows, a.most_rows, [&](int64_t row, int64_t count) {
        for (int64_t r = std::max(row, first); r < std::min(row + count, last); ++r) {
            const float* x = p.x + r * p.x_stride;
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t at = row * blocks + b * count + r - row;
                float ends[kBlockInputs] = {};  // of a row that ends within a block
                const int64_t left = p.in - b * kBlockInputs;
                if (left < kBlockInputs && left > 0) std::memcpy(ends, x + b * kBlockInputs, sizeof(float) * static_cast<size_t>(left));
                const float* from = left < kBlockInputs ? ends : x + b * kBlockInputs;
                int32_t sums[2];
                const float scale = round(from, a.x->q + at * kBlockInputs, sums);
                a.x->scales[at] = scale;
                int32_t* to = a.x->sums + (row * blocks + b * count) * shares + r - row;
                if (shares == 1) to[0] = sum_of(f, sums[0] + sums[1], scale);
                else to[0] = sum_of(f, sums[0], scale), to[count] = sum_of(f, sums[1], scale);
            }
        }
    });
}

// ---------------------------------------------------------------- portable path

namespace portable {
#define ISA_FN static
#define ISA_INLINE static inline
constexpr int kWidth = 16, kMostRows = 4;
constexpr bool kNarrow = false;
struct Ints {
    uint8_t bytes[4 * kWidth];
    int32_t lane(int l) const {
        int32_t v;
        std::memcpy(&v, bytes + 4 * l, 4);
        return v;
    }
    void set(int l, int32_t v) { std::memcpy(bytes + 4 * l, &v, 4); }
};
struct Floats {
    float lanes[kWidth];
};
ISA_INLINE Ints zero() { return Ints{}; }
ISA_INLINE Floats none() { return Floats{}; }
ISA_INLINE Ints load(const uint8_t* p) {
    Ints v;
    std::memcpy(v.bytes, p, sizeof v.bytes);
    return v;
}
ISA_INLINE Ints either(const Ints& a, const Ints& b) {
    Ints v;
    for (int i = 0; i < 4 * kWidth; ++i) v.bytes[i] = a.bytes[i] | b.bytes[i];
    return v;
}
template <int kFrom, int kTo, int kMask>
ISA_INLINE Ints field(const Ints& a) {
    Ints v;
    for (int i = 0; i < 4 * kWidth; ++i) v.bytes[i] = static_cast<uint8_t>((a.bytes[i] >> kFrom & kMask) << kTo);
    return v;
}
template <int kBits>
ISA_INLINE Ints dot(const Ints& sum, const Ints& q, const int8_t* x) {
    Ints v;
    for (int l = 0; l < kWidth; ++l) {
        int32_t total = sum.lane(l);
        for (int i = 0; i < 4; ++i) total += q.bytes[4 * l + i] * x[i];
        v.set(l, total);
    }
    return v;
}
ISA_INLINE Ints dot_narrow(const Ints& q, const int8_t*) { return q; }  // not used: kNarrow is false
ISA_INLINE Ints add_narrow(const Ints& a, const Ints&) { return a; }
ISA_INLINE Ints widen(const Ints& sum, const Ints&) { return sum; }
template <int kBits>
ISA_INLINE Ints start(const int32_t* from) {
    Ints v;
    for (int l = 0; l < kWidth; ++l) v.set(l, *from);
    return v;
}
#define HAAST_LANES(value)                               \
    Floats v;                                            \
    for (int l = 0; l < kWidth; ++l) v.lanes[l] = value; \
    return v
ISA_INLINE Floats to_float(const Ints& a) { HAAST_LANES(static_cast<float>(a.lane(l))); }
ISA_INLINE Floats mul(const Floats& a, const Floats& b) { HAAST_LANES(a.lanes[l] * b.lanes[l]); }
ISA_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    HAAST_LANES(std::fma(a.lanes[l], b.lanes[l], c.lanes[l]));
}
ISA_INLINE Floats minus_fma(const Floats& a, const Floats& b, const Floats& c) {
    HAAST_LANES(std::fma(-a.lanes[l], b.lanes[l], c.lanes[l]));
}
ISA_INLINE Floats halves(const uint8_t* p) { HAAST_LANES(half_to_float(half_at(p + 2 * l))); }
ISA_INLINE Floats bytes(const uint8_t* p) { HAAST_LANES(static_cast<float>(p[l])); }
ISA_INLINE Floats signed_bytes(const uint8_t* p) { HAAST_LANES(static_cast<float>(static_cast<int8_t>(p[l]))); }
ISA_INLINE Floats splat(const float* p) { HAAST_LANES(*p); }
ISA_INLINE void store(const Floats& v, const float* bias, float* y, int64_t valid) {
    for (int l = 0; l < kWidth && l < valid; ++l) y[l] = bias ? v.lanes[l] + bias[l] : v.lanes[l];
}
#include "block_tile.h"
#undef HAAST_LANES
#undef ISA_FN
#undef ISA_INLINE
}  // namespace portable

// ---------------------------------------------------------------- AVX2, with and without VNNI
#if defined(HAAST_X86)

#define HAAST_AVX2_OPERATORS                                                                                          \
    using Ints = __m256i;                                                                                             \
    using Floats = __m256;                                                                                            \
    constexpr int kWidth = 8;                                                                                         \
    ISA_INLINE Ints zero() { return _mm256_setzero_si256(); }                                                         \
    ISA_INLINE Floats none() { return _mm256_setzero_ps(); }                                                          \
    ISA_INLINE Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }        \
    ISA_INLINE Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }                                          \
    template <int kFrom, int kTo, int kMask>                                                                          \
    ISA_INLINE Ints field(Ints a) {                                                                                   \
        if constexpr (kFrom > kTo) a = _mm256_srli_epi16(a, kFrom - kTo);                                             \
        if constexpr (kFrom < kTo) a = _mm256_slli_epi16(a, kTo - kFrom);                                             \
        return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(kMask << kTo)));                                \
    }                                                                                                                 \
    ISA_INLINE Ints quad_at(const int8_t* x) {                                                                        \
        int32_t four;                                                                                                 \
        std::memcpy(&four, x, 4);                                                                                     \
        return _mm256_set1_epi32(four);                                                                               \
    }                                                                                                                 \
    ISA_INLINE Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }                                              \
    ISA_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }                                         \
    ISA_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }                          \
    ISA_INLINE Floats minus_fma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }                   \
    ISA_INLINE Floats halves(const uint8_t* p) {                                                                      \
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));                                 \
    }                                                                                                                 \
    ISA_INLINE Floats bytes(const uint8_t* p) {                                                                       \
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));        \
    }                                                                                                                 \
    ISA_INLINE Floats signed_bytes(const uint8_t* p) {                                                                \
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));        \
    }                                                                                                                 \
    ISA_INLINE Floats splat(const float* p) { return _mm256_broadcast_ss(p); }                                        \
    ISA_INLINE void store(Floats v, const float* bias, float* y, int64_t valid) {                                     \
        if (valid >= kWidth) return _mm256_storeu_ps(y, bias ? _mm256_add_ps(v, _mm256_loadu_ps(bias)) : v);          \
        float lanes[kWidth];                                                                                          \
        _mm256_storeu_ps(lanes, v);                                                                                   \
        for (int64_t l = 0; l < valid; ++l) y[l] = bias ? lanes[l] + bias[l] : lanes[l];                              \
    }

namespace avx2 {
#define ISA_FN AVX
#define ISA_INLINE AVX_INLINE
HAAST_AVX2_OPERATORS
constexpr int kMostRows = 6;
constexpr bool kNarrow = true;
// Only for 8 bits, whose products do not fit two into 16 bits with their signs: |w| * (x with the sign of w), with
// w = q - 128.
template <int kBits>
ISA_INLINE Ints dot(Ints sum, Ints q, const int8_t* x) {
    static_assert(kBits == 8);
    const Ints w = _mm256_xor_si256(q, _mm256_set1_epi8(static_cast<char>(0x80)));
    const Ints pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(quad_at(x), w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
ISA_INLINE Ints dot_narrow(Ints q, const int8_t* x) { return _mm256_maddubs_epi16(q, quad_at(x)); }
ISA_INLINE Ints add_narrow(Ints a, Ints b) {
    Ints sum = _mm256_add_epi16(a, b);
    asm("" : "+x"(sum));  // keeps it in a register: gcc spills these sums otherwise
    return sum;
}
ISA_INLINE Ints widen(Ints sum, Ints narrow) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
}
template <int kBits>
ISA_INLINE Ints start(const int32_t* from) {
    return kBits == 8 ? zero() : _mm256_set1_epi32(*from);
}
#include "block_tile.h"
#undef ISA_FN
#undef ISA_INLINE
}  // namespace avx2

namespace avx2_vnni {
#define ISA_FN static __attribute__((target("avx2,fma,f16c,avxvnni")))
#define ISA_INLINE static inline __attribute__((target("avx2,fma,f16c,avxvnni"), always_inline))
HAAST_AVX2_OPERATORS
constexpr int kMostRows = 6;
constexpr bool kNarrow = false;
template <int kBits>
ISA_INLINE Ints dot(Ints sum, Ints q, const int8_t* x) {
    return _mm256_dpbusd_avx_epi32(sum, q, quad_at(x));
}
ISA_INLINE Ints dot_narrow(Ints q, const int8_t*) { return q; }  // not used: kNarrow is false
ISA_INLINE Ints add_narrow(Ints a, Ints) { return a; }
ISA_INLINE Ints widen(Ints sum, Ints) { return sum; }
template <int kBits>
ISA_INLINE Ints start(const int32_t* from) {
    return _mm256_set1_epi32(*from);
}
#include "block_tile.h"
#undef ISA_FN
#undef ISA_INLINE
}  // namespace avx2_vnni

// ---------------------------------------------------------------- AVX-512 with VNNI

namespace avx512_vnni {
#define HAAST_AVX512_VNNI "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c"
#define ISA_FN static __attribute__((target(HAAST_AVX512_VNNI)))
#define ISA_INLINE static inline __attribute__((target(HAAST_AVX512_VNNI), always_inline))
using Ints = __m512i;
using Floats = __m512;
constexpr int kWidth = 16, kMostRows = 8;
constexpr bool kNarrow = false;
ISA_INLINE Ints zero() { return _mm512_setzero_si512(); }
ISA_INLINE Floats none() { return _mm512_setzero_ps(); }
ISA_INLINE Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
ISA_INLINE Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int kFrom, int kTo, int kMask>
ISA_INLINE Ints field(Ints a) {
    if constexpr (kFrom > kTo) a = _mm512_srli_epi16(a, kFrom - kTo);
    if constexpr (kFrom < kTo) a = _mm512_slli_epi16(a, kTo - kFrom);
    return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(kMask << kTo)));
}
template <int kBits>
ISA_INLINE Ints dot(Ints sum, Ints q, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(sum, q, _mm512_set1_epi32(four));
}
ISA_INLINE Ints dot_narrow(Ints q, const int8_t*) { return q; }  // not used: kNarrow is false
ISA_INLINE Ints add_narrow(Ints a, Ints) { return a; }
ISA_INLINE Ints widen(Ints sum, Ints) { return sum; }
template <int kBits>
ISA_INLINE Ints start(const int32_t* from) {
    return _mm512_set1_epi32(*from);
}
// The masked intrinsics with all lanes on give the plain instructions; gcc 12 warns about the plain intrinsics.
ISA_INLINE Floats to_float(Ints a) { return _mm512_maskz_cvtepi32_ps(0xffff, a); }
ISA_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
ISA_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
ISA_INLINE Floats minus_fma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
ISA_INLINE Floats halves(const uint8_t* p) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ISA_INLINE Floats bytes(const uint8_t* p) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return to_float(_mm512_maskz_cvtepu8_epi32(0xffff, sixteen));
}
ISA_INLINE Floats signed_bytes(const uint8_t* p) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return to_float(_mm512_maskz_cvtepi8_epi32(0xffff, sixteen));
}
ISA_INLINE Floats splat(const float* p) { return _mm512_set1_ps(*p); }
ISA_INLINE void store(Floats v, const float* bias, float* y, int64_t valid) {
    const __mmask16 lanes = valid >= kWidth ? 0xffff : static_cast<__mmask16>((1u << valid) - 1);
    _mm512_mask_storeu_ps(y, lanes, bias ? _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, bias)) : v);
}
#include "block_tile.h"
#undef ISA_FN
#undef ISA_INLINE
}  // namespace avx512_vnni
#endif  // HAAST_X86

// ---------------------------------------------------------------- NEON, with and without dot products
#if defined(HAAST_NEON)

#define HAAST_NEON_OPERATORS                                                                                          \
    using Ints = int8x16_t;                                                                                           \
    using Floats = float32x4_t;                                                                                       \
    constexpr int kWidth = 4, kMostRows = 6;                                                          \
    constexpr bool kNarrow = false;                                                                                   \
    ISA_INLINE Ints zero() { return vdupq_n_s8(0); }                                                                  \
    ISA_INLINE Floats none() { return vdupq_n_f32(0.0f); }                                                            \
    ISA_INLINE Ints load(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }                               \
    ISA_INLINE Ints either(Ints a, Ints b) { return vorrq_s8(a, b); }                                                 \
    template <int kFrom, int kTo, int kMask>                                                                          \
    ISA_INLINE Ints field(Ints a) {                                                                                   \
        uint8x16_t v = vreinterpretq_u8_s8(a);                                                                        \
        if constexpr (kFrom > kTo) v = vshrq_n_u8(v, kFrom - kTo);                                                    \
        if constexpr (kFrom < kTo) v = vshlq_n_u8(v, kTo - kFrom);                                                    \
        return vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(static_cast<uint8_t>(kMask << kTo))));                      \
    }                                                                                                                 \
    ISA_INLINE int8x16_t quad_at(const int8_t* x) {                                                                   \
        int32_t four;                                                                                                 \
        std::memcpy(&four, x, 4);                                                                                     \
        return vreinterpretq_s8_s32(vdupq_n_s32(four));                                                               \
    }                                                                                                                 \
    /* 8 bits: w = q - 128 is signed, so that the sum needs no start. */                                              \
    template <int kBits>                                                                                              \
    ISA_INLINE Ints dot(Ints sum, Ints q, const int8_t* x) {                                                          \
        if constexpr (kBits == 8) q = veorq_s8(q, vdupq_n_s8(static_cast<int8_t>(-128)));                             \
        return vreinterpretq_s8_s32(dot_signed(vreinterpretq_s32_s8(sum), q, quad_at(x)));                            \
    }                                                                                                                 \
    template <int kBits>                                                                                              \
    ISA_INLINE Ints start(const int32_t* from) {                                                                      \
        return vreinterpretq_s8_s32(vdupq_n_s32(kBits == 8 ? 0 : *from));                                             \
    }                                                                                                                 \
    ISA_INLINE Ints dot_narrow(Ints q, const int8_t*) { return q; } /* not used: kNarrow is false */                  \
    ISA_INLINE Ints add_narrow(Ints a, Ints) { return a; }                                                            \
    ISA_INLINE Ints widen(Ints sum, Ints) { return sum; }                                                             \
    ISA_INLINE Floats to_float(Ints a) { return vcvtq_f32_s32(vreinterpretq_s32_s8(a)); }                             \
    ISA_INLINE Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }                                             \
    ISA_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }                                \
    ISA_INLINE Floats minus_fma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }                          \
    ISA_INLINE Floats halves(const uint8_t* p) {                                                                      \
        return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));                                                         \
    }                                                                                                                 \
    ISA_INLINE Floats bytes(const uint8_t* p) {                                                                       \
        const float four[4] = {static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),          \
                               static_cast<float>(p[3])};                                                             \
        return vld1q_f32(four);                                                                                       \
    }                                                                                                                 \
    ISA_INLINE Floats signed_bytes(const uint8_t* p) {                                                                \
        const auto* s = reinterpret_cast<const int8_t*>(p);                                                           \
        const float four[4] = {static_cast<float>(s[0]), static_cast<float>(s[1]), static_cast<float>(s[2]),          \
                               static_cast<float>(s[3])};                                                             \
        return vld1q_f32(four);                                                                                       \
    }                                                                                                                 \
    ISA_INLINE Floats splat(const float* p) { return vdupq_n_f32(*p); }                                               \
    ISA_INLINE void store(Floats v, const float* bias, float* y, int64_t valid) {                                     \
        float lanes[kWidth];                                                                                          \
        vst1q_f32(lanes, v);                                                                                          \
        for (int64_t l = 0; l < kWidth && l < valid; ++l) y[l] = bias ? lanes[l] + bias[l] : lanes[l];                \
    }

namespace neon {
#define ISA_FN static
#define ISA_INLINE static inline __attribute__((always_inline))
ISA_INLINE int32x4_t dot_signed(int32x4_t sum, int8x16_t w, int8x16_t x) {
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
HAAST_NEON_OPERATORS
#include "block_tile.h"
#undef ISA_FN
#undef ISA_INLINE
}  // namespace neon

namespace neon_dot {
#define ISA_FN static __attribute__((target("arch=armv8.2-a+dotprod")))
#define ISA_INLINE static inline __attribute__((target("arch=armv8.2-a+dotprod"), always_inline))
ISA_INLINE int32x4_t dot_signed(int32x4_t sum, int8x16_t w, int8x16_t x) { return vdotq_s32(sum, w, x); }
HAAST_NEON_OPERATORS
#include "block_tile.h"
#undef ISA_FN
#undef ISA_INLINE
}  // namespace neon_dot
#endif  // HAAST_NEON

// ---------------------------------------------------------------- one entry

struct BlockPath {
    Pool::Work work;
    int64_t most_rows;  // of a tile
};

BlockPath block_path(WeightForm form) {
#if defined(HAAST_X86)
    if (path() >= kAvx512 && has(64)) return {avx512_vnni::work_of(form), avx512_vnni::kMostRows};
    if (path() >= kAvx2Vnni && has(32)) return {avx2_vnni::work_of(form), avx2_vnni::kMostRows};
    if (use_avx()) return {avx2::work_of(form), avx2::kMostRows};
#elif defined(HAAST_NEON)
    if (path() >= kAvx2Vnni) return {neon_dot::work_of(form), neon_dot::kMostRows};
    if (path() >= kAvx2) return {neon::work_of(form), neon::kMostRows};
#endif
    return {portable::work_of(form), portable::kMostRows};
}

void multiply_blocks(const Blocks& a, int threads) {
    if (a.rows <= 0 || a.out <= 0) return;
    const BlockForm& f = kForms[a.form];
    const int64_t blocks = groups_of(f, a.in) * (f.group / kBlockInputs), panels = (a.out + kLanes - 1) / kLanes;
    const int64_t numbers = a.rows * blocks;
    const std::unique_ptr<int32_t[]> scratch(new int32_t[numbers * (kBlockInputs / 4 + 1 + kBlockInputs / f.shared)]);
    int32_t* const sums = scratch.get() + numbers * (kBlockInputs / 4 + 1);
    const RowBlocks x{reinterpret_cast<int8_t*>(scratch.get()), reinterpret_cast<float*>(scratch.get() + numbers * (kBlockInputs / 4)), sums};
    const BlockPath run = block_path(a.form);
    if (a.rows * a.in * a.out < kSerialWork) threads = 1;
    const Rounding rounding{&a, &x, run.most_rows};
    each_row(round_rows, &rounding, a.rows, a.in, threads);
    const BlockProduct product{&a, &x};
    pool().run(run.work, &product, panels, chunk_of(panels, threads), threads);
}

}  // namespace
