// Conversion of 16-bit floats (fp16, bf16) to fp32 and back, in portable code and in vector registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu.h"

namespace {

float half_to_float(uint16_t h) {
    // A multiplication re-biases exponents, which is right for subnormals too; the OR handles infinity and NaN.
    uint32_t bits = static_cast<uint32_t>(h & 0x7fffu) << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    bits |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    bits |= static_cast<uint32_t>(h & 0x8000u) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and up rounds to infinity
    if (bits < 0x38800000u) {                        // below 2^-14: subnormal; adding 0.5 rounds
        float f;
        std::memcpy(&f, &bits, 4);
        f += 0.5f;
        std::memcpy(&bits, &f, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + ((bits >> 13) & 1u);  // round to nearest, ties to even
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

// The 16-bit number formats of a KV cache.
struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(F16 x) { return half_to_float(x.bits); }
inline float widen(BF16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline void narrow_one(float x, F16* out) { out->bits = float_to_half(x); }
inline void narrow_one(float x, BF16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // round to nearest, ties to even
    out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded >> 16);
}

template <typename E>
void narrow_scalar(const float* x, E* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow_one(x[i], out + i);
}

#if defined(HAAST_X86)
AVX_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
AVX_INLINE __m256 load8(const F16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
AVX_INLINE __m256 load8(const BF16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Loads sixteen from two addresses, eight each. The masked intrinsics with all lanes on give the plain instructions;
// gcc 12 warns about the plain intrinsics.
AVX512_INLINE __m512 load8_twice(const float* low, const float* high) {
    const __m512d first = _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(low)));
    return _mm512_castpd_ps(_mm512_maskz_insertf64x4(0xff, first, _mm256_castps_pd(_mm256_loadu_ps(high)), 1));
}
AVX512_INLINE __m512 widen16(__m256i bits, F16) { return _mm512_maskz_cvtph_ps(0xffff, bits); }
AVX512_INLINE __m512 widen16(__m256i bits, BF16) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16));
}
template <typename E>
AVX512_INLINE __m512 load8_twice(const E* low, const E* high) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
    return widen16(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1), E{});
}
AVX512_INLINE __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
template <typename E>
AVX512_INLINE __m512 load16(const E* p) {
    return widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), E{});
}

AVX void narrow_avx(const float* x, F16* out, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    narrow_scalar(x + i, out + i, count - i);
}

AVX void narrow_avx(const float* x, BF16* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow_one(x[i], out + i);  // integer code, which the compiler vectorises
}
#endif  // HAAST_X86

// Converts fp32 numbers to the format of a cache, rounded to nearest, ties to even.
inline void narrow(const float* x, float* out, int64_t count) {
    std::memcpy(out, x, sizeof(float) * static_cast<size_t>(count));
}
template <typename E>
void narrow(const float* x, E* out, int64_t count) {
#if defined(HAAST_X86)
    if (use_avx()) return narrow_avx(x, out, count);
#endif
    narrow_scalar(x, out, count);
}

}  // namespace
