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
