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

// The same where all products are of bf16: Phi and the slope as polynomials, x P(x^2) + 1/2, up to
// |x| = 4.25, where their errors are below 2e-6 and 4e-5, and as at that end beyond, below 1.3e-5 and
// 2e-4 (a bf16 near 1 is rounded by 2e-3); tests/native/test_rough_gelu.py has the figures.
// x, but no further from zero than the polynomials reach; a NaN stays.
FPT_INLINE F near_zero(F x) {
  const F below = splat(4.25f) < x ? splat(4.25f) : x;
  return splat(-4.25f) > below ? splat(-4.25f) : below;
}

// 0 where `near` is the lower end.
template <int COUNT>
FPT_INLINE F odd_polynomial(F near, const float (&factors)[COUNT]) {
  const F square = near * near;
  F sum = splat(factors[COUNT - 1]);
#pragma GCC unroll 16
  for (int i = COUNT - 2; i >= 0; --i) sum = sum * square + factors[i];
  return near <= splat(-4.25f) ? F{} : sum * near + 0.5f;
}

FPT_INLINE F rough_phi(F near) {
  static constexpr float factors[] = {
      0.398933887f,    -0.0664535165f,   0.00992559548f,   -0.00115837331f,  0.000105625739f,
      -7.37780647e-6f, 3.770175e-7f,     -1.30972815e-8f,  2.73222611e-10f,  -2.56186934e-12f};
  return odd_polynomial(near, factors);
}

FPT_INLINE F rough_slope(F near) {
  static constexpr float factors[] = {
      0.797756374f,    -0.265392482f,   0.0590924174f,    -0.00904040039f,  0.000996534014f,
      -7.93607978e-5f, 4.43249428e-6f,  -1.63482412e-7f,  3.55221852e-9f,   -3.42648271e-11f};
  return odd_polynomial(near, factors);
}

template <bool ROUGH>
FPT_INLINE F gelu(F x) {
  if constexpr (ROUGH) return x * rough_phi(near_zero(x));
  return gelu_and_slope(x).value;
}

template <bool ROUGH>
FPT_INLINE Gelu gelu_with_slope(F x) {
  if constexpr (!ROUGH) return gelu_and_slope(x);
  const F near = near_zero(x);
  return {x * rough_phi(near), rough_slope(near)};
}
