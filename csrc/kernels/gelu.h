// The exact GELU, x Phi(x), and its slope Phi(x) + x phi(x), of one exponential.
//
// Phi(-a) = e^(-a^2 / 2) R(a) for a >= 0, where R is half of erfcx(a / sqrt 2): smooth, and here a
// polynomial in 1 / (1 + 0.3 a) of relative error 6e-8 up to a = 13.5, beyond which all is 0 in f32.

FPT_INLINE F reciprocal(F x) {
#if FPT_WIDTH == 16
  const F y = reinterpret_cast<F>(_mm512_maskz_rcp14_ps(0xffff, (__m512)x));
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

struct Gelu {
  F value, slope;
};

FPT_INLINE Gelu gelu_and_slope(F x) {
  const F a = x < 0.0f ? -x : x;
  const auto far = a > splat(13.5f);
  const F near = far ? splat(13.5f) : a;
  const F t = reciprocal(near * 0.3f + 1.0f);
  F r = splat(0.03833437711f);
  r = r * t - 0.16895247996f;
  r = r * t + 0.22821834683f;
  r = r * t - 0.07600074261f;
  r = r * t + 0.14218582213f;
  r = r * t + 0.09483267367f;
  r = r * t + 0.12188212574f;
  r = r * t + 0.11949305237f;
  r = r * t + 6.853438663e-6f;
  const F density = far ? F{} : exponential_of_negative(near * near * -0.5f);
  const F tail = density * r;
  const F phi = x < 0.0f ? tail : 1.0f - tail;
  // x density is NaN for an infinite x, and 0 in the limit.
  const F bounded = density > 0.0f ? x : F{};
  return {x * phi, phi + bounded * density * 0.39894228f};
}

// The same where all products are of bf16: Phi and the slope by the pieces of gelu_table.h, up to
// |x| = 4.25, where their errors are below 6e-6 and 3e-5, and as at that end beyond, below 1.3e-5 and
// 2e-4 (a bf16 near 1 is rounded by 2e-3); tests/native/test_rough_gelu.py has the figures.

#if FPT_BF16

#include "gelu_table.h"

// Where an x is: the piece of |x|, the distance from its place, and what x says beside |x|.
struct Place {
  __m512i piece, sign;
  F distance;
  __mmask16 above;  // not below the pieces
};

FPT_INLINE Place place_of(F x) {
  const __m512i sign = _mm512_set1_epi32(int(0x80000000u)), bits = (__m512i)x;
  const F a = (F)_mm512_maskz_andnot_epi32(0xffff, sign, bits);
  // A NaN comes out of the smaller as the second is.
  const F near = (F)_mm512_maskz_min_ps(0xffff, (__m512)splat(GELU_END), (__m512)a);
  const F magic = splat(0x1.8p23f);  // adding it rounds to a whole number, in the last bits
  const F shifted = near * splat(GELU_STEPS) + magic;
  const F distance = near * splat(GELU_STEPS) - (shifted - magic);
  return {(__m512i)shifted, _mm512_and_epi32(sign, bits), distance,
          _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-GELU_END), _CMP_NLE_UQ)};
}

FPT_INLINE F factors_of(const Place& at, const float (&pieces)[32]) {
  return (F)_mm512_permutex2var_ps(_mm512_load_ps(pieces), at.piece, _mm512_load_ps(pieces + 16));
}

// 0 below the pieces.
FPT_INLINE F by_pieces(const Place& at, const float (&pieces)[3][32]) {
  const F r = at.distance;
  const F half = (factors_of(at, pieces[2]) * r + factors_of(at, pieces[1])) * r +
                 factors_of(at, pieces[0]);
  const __m512 turned = (__m512)_mm512_xor_epi32((__m512i)half, at.sign);
  return (F)_mm512_maskz_add_ps(at.above, turned, (__m512)splat(0.5f));
}

FPT_INLINE F rough_gelu(F x) { return x * by_pieces(place_of(x), PHI_PIECES); }

FPT_INLINE Gelu rough_gelu_and_slope(F x) {
  const Place at = place_of(x);
  return {x * by_pieces(at, PHI_PIECES), by_pieces(at, SLOPE_PIECES)};
}

#endif

template <bool ROUGH>
FPT_INLINE F gelu(F x) {
#if FPT_BF16
  if constexpr (ROUGH) return rough_gelu(x);
#endif
  return gelu_and_slope(x).value;
}

template <bool ROUGH>
FPT_INLINE Gelu gelu_with_slope(F x) {
#if FPT_BF16
  if constexpr (ROUGH) return rough_gelu_and_slope(x);
#endif
  return gelu_and_slope(x);
}
