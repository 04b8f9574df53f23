// exp, tanh, sums and maxima of AVX2 registers, and exp in double precision by a polynomial.
#pragma once

#include <cstdint>
#include "cpu.h"

namespace {

// The Taylor polynomial of exp up to degree 13, highest power first.
constexpr double kExp[14] = {1.6059043836821613e-10, 2.08767569878681e-09,   2.505210838544172e-08, 2.755731922398589e-07,
                             2.7557319223985893e-06, 2.48015873015873e-05,   1.984126984126984e-04, 1.388888888888889e-03,
                             8.333333333333333e-03,  4.1666666666666664e-02, 1.6666666666666666e-01, 0.5, 1.0, 1.0};

}  // namespace

#if defined(HAAST_X86)
namespace {

// exp as 2^n * e^r with |r| <= ln2 / 2 by a degree-6 polynomial (Cephes expf): about 1 ulp. 0 for inputs below -87.3.
AVX_INLINE __m256 exp8(__m256 x) {
    const __m256 low = _mm256_set1_ps(-87.33654f);
    const __m256 keep = _mm256_cmp_ps(x, low, _CMP_NLT_UQ);  // NaN stays NaN
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(low, x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(scale)));
}

// The same operations as `exp8`, and so the same bits, for 16 values.
AVX512_INLINE __m512 exp16(__m512 x) {
    const __m512 low = _mm512_set1_ps(-87.33654f);
    const __mmask16 keep = _mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ);  // NaN stays NaN
    x = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(88.0f), _mm512_maskz_max_ps(0xffff, low, x));
    const __m512 n = _mm512_maskz_roundscale_ps(0xffff, _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    const __m512i exponent = _mm512_add_epi32(_mm512_maskz_cvtps_epi32(0xffff, n), _mm512_set1_epi32(127));
    return _mm512_maskz_mul_ps(keep, p, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, exponent, 23)));
}

// exp of x <= 0 for four values: the same operations, and so the same bits, as `exp_of` in judge.h.
AVX_INLINE __m256d exp4(__m256d x) {
    const __m256d shift = _mm256_set1_pd(6755399441055744.0);
    const __m256d moved = _mm256_add_pd(_mm256_mul_pd(x, _mm256_set1_pd(1.4426950408889634)), shift);
    const __m256d n = _mm256_sub_pd(moved, shift);
    __m256d r = _mm256_sub_pd(x, _mm256_mul_pd(n, _mm256_set1_pd(0.6931471803691238)));
    r = _mm256_sub_pd(r, _mm256_mul_pd(n, _mm256_set1_pd(1.9082149292705877e-10)));
    __m256d p = _mm256_set1_pd(kExp[0]);
    for (int i = 1; i < 14; ++i) p = _mm256_add_pd(_mm256_mul_pd(p, r), _mm256_set1_pd(kExp[i]));
    const __m256i bits = _mm256_add_epi64(_mm256_castpd_si256(moved), _mm256_set1_epi64x(1023));
    const __m256d y = _mm256_mul_pd(p, _mm256_castsi256_pd(_mm256_slli_epi64(bits, 52)));
    return _mm256_and_pd(_mm256_cmp_pd(x, _mm256_set1_pd(-708.0), _CMP_NLT_UQ), y);  // NaN stays NaN
}

// tanh (Cephes tanhf): an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
AVX_INLINE __m256 tanh8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), z = _mm256_mul_ps(x, x);
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    __m256 p = _mm256_set1_ps(-5.70498872745e-3f);
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(2.06390887954e-2f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(-5.37397155531e-2f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(1.33314422036e-1f));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(-3.33332819422e-1f));
    const __m256 near = _mm256_fmadd_ps(_mm256_mul_ps(p, z), x, x);
    const __m256 e = exp8(_mm256_add_ps(size, size));
    __m256 far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(e, one)));
    far = _mm256_or_ps(far, _mm256_and_ps(_mm256_set1_ps(-0.0f), x));
    return _mm256_blendv_ps(near, far, _mm256_cmp_ps(size, _mm256_set1_ps(0.625f), _CMP_GT_OQ));
}

AVX_INLINE float sum8(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

AVX_INLINE float max8(__m256 v) {
    float t[8], best;
    _mm256_storeu_ps(t, v);
    best = t[0];
    for (int i = 1; i < 8; ++i) best = t[i] > best ? t[i] : best;
    return best;
}

}  // namespace
#endif  // HAAST_X86
