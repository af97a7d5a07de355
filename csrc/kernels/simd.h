// Vectors of FPT_WIDTH floats, once per level.  GCC's and clang's vector extensions do the arithmetic;
// intrinsics only where those have no word for it.

constexpr int W = FPT_WIDTH;

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
// The same in memory: at any address, over any type.
typedef float FM __attribute__((vector_size(4 * W), aligned(2), may_alias));
typedef uint16_t HM __attribute__((vector_size(2 * W), aligned(2), may_alias));

FPT_INLINE F splat(float x) {
#if FPT_WIDTH == 16
  return reinterpret_cast<F>(_mm512_set1_ps(x));
#elif FPT_WIDTH == 8
  return reinterpret_cast<F>(_mm256_set1_ps(x));
#else
  return F{x, x, x, x};
#endif
}
FPT_INLINE F as_float(U x) { return reinterpret_cast<F>(x); }
FPT_INLINE U as_bits(F x) { return reinterpret_cast<U>(x); }

FPT_INLINE float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

FPT_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// One value of a 16-bit kind.

FPT_INLINE float float_of_bf16(uint16_t x) { return float_of_bits(uint32_t(x) << 16); }

FPT_INLINE uint16_t bf16_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FPT_INLINE float float_of_f16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16;
  const uint32_t rest = x & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // 2^112 moves the exponent, and makes subnormal numbers normal.
  const float magnitude = float_of_bits(rest << 13) * 0x1p112f;
  return float_of_bits(sign | bits_of_float(magnitude));
}

FPT_INLINE uint16_t f16_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (rest < 0x38800000) {
    // Subnormal: adding 0.5 leaves 2^-24, the unit of f16, as the last bit, rounded to even.
    const float shifted = float_of_bits(rest) + 0.5f;
    return sign | uint16_t(bits_of_float(shifted) - 0x3f000000);
  }
  return sign | uint16_t((rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13);
}

// W values from memory and back.

FPT_INLINE F load(const float* p) { return *reinterpret_cast<const FM*>(p); }
FPT_INLINE void store(float* p, F x) { *reinterpret_cast<FM*>(p) = x; }

FPT_INLINE F load_bf16(const uint16_t* p) {
  return as_float(__builtin_convertvector(H(*reinterpret_cast<const HM*>(p)), U) << 16);
}

FPT_INLINE void store_bf16(uint16_t* p, F x) {
  const U bits = as_bits(x);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U kept = x == x ? rounded : U{} + 0x7fc0;
  *reinterpret_cast<HM*>(p) = __builtin_convertvector(kept, H);
}

FPT_INLINE F load_f16(const uint16_t* p) {
#if FPT_WIDTH == 16
  return reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)));
#elif FPT_WIDTH == 8
  return reinterpret_cast<F>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  F x{};
  for (int i = 0; i < W; ++i) x[i] = float_of_f16(p[i]);
  return x;
#endif
}

FPT_INLINE void store_f16(uint16_t* p, F x) {
#if FPT_WIDTH == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
#elif FPT_WIDTH == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < W; ++i) p[i] = f16_of_float(x[i]);
#endif
}

FPT_INLINE F highest(F a, F b) { return a > b ? a : b; }

// The square root; of 16 lanes to a unit in the last place, in half the time of the exact one.
FPT_INLINE F root(F x) {
#if FPT_WIDTH == 16
  const F y = reinterpret_cast<F>(_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x));
  const F near = x * y;
  const F better = near + near * (splat(0.5f) - near * (y * splat(0.5f)));
  return x > splat(0.0f) && x < splat(__builtin_inff()) ? better : x;
#elif FPT_WIDTH == 8
  return reinterpret_cast<F>(_mm256_sqrt_ps((__m256)x));
#else
  return F{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]),
           __builtin_sqrtf(x[3])};
#endif
}

// A NaN in any lane comes out.
FPT_INLINE float highest_lane(F x) {
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  return top;
}

// Neighbours first, then their sums: the rounding of a tree.
FPT_INLINE float sum_of_lanes(F x) {
#if FPT_WIDTH == 16
  __m512 y = (__m512)x;
  y += _mm512_maskz_permute_ps(0xffff, y, 0xb1);
  y += _mm512_maskz_permute_ps(0xffff, y, 0x4e);
  y += _mm512_maskz_shuffle_f32x4(0xffff, y, y, 0xb1);
  y += _mm512_maskz_shuffle_f32x4(0xffff, y, y, 0x4e);
  return y[0];
#else
  float lane[W];
  store(lane, x);
  for (int step = 1; step < W; step *= 2)
    for (int i = 0; i < W; i += 2 * step) lane[i] += lane[i + step];
  return lane[0];
#endif
}

// e^x to about one unit in the last place; -inf gives 0, NaN gives NaN.  Reduced to |r| <= ln2 / 2 in
// two steps; the polynomial is that of Cephes' expf (S. Moshier).
FPT_INLINE F exponential(F x) {
  x = x < splat(-104.0f) ? splat(-104.0f) : x;
  x = x > splat(89.0f) ? splat(89.0f) : x;
  const F magic = splat(0x1.8p23f);  // adding it rounds to a whole number
  const F shifted = x * splat(1.44269504f) + magic;
  const F n = shifted - magic;
  const F r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
  F p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
#if FPT_WIDTH == 16
  return reinterpret_cast<F>(_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n));
#else
  // Two factors, so that neither leaves the normal numbers where the product does.
  const I power = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic);
  const I half = power >> 1;
  return p * reinterpret_cast<F>((half + 127) << 23) *
         reinterpret_cast<F>((power - half + 127) << 23);
#endif
}

// The larger of each pair; b where either is NaN.
FPT_INLINE F larger(F a, F b) {
#if FPT_WIDTH == 16
  return reinterpret_cast<F>(_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b));
#elif FPT_WIDTH == 8
  return reinterpret_cast<F>(_mm256_max_ps((__m256)a, (__m256)b));
#else
  return a > b ? a : b;
#endif
}

// e^x for x of at most 0, with fewer steps than `exponential`; below `least` it stays what it is there:
// of 16 lanes 0 from -104 on, elsewhere no less than -87 will do.
FPT_INLINE F exponential_of_negative(F x, [[maybe_unused]] float least = -87.0f) {
#if FPT_WIDTH == 4
  return exponential(x);  // without a multiply-add the reduction below would round x
#else
  x = larger(splat(least), x);
  const F log2_e = splat(1.44269504f), magic = splat(0x1.8p23f);
  const F shifted = x * log2_e + magic;  // rounds to a whole number
  const F n = shifted - magic;
  const F r = x * log2_e - n;
  F p = splat(1.5403530394e-4f);
  p = p * r + splat(1.3333558146e-3f);
  p = p * r + splat(9.6181291076e-3f);
  p = p * r + splat(5.5504108665e-2f);
  p = p * r + splat(2.4022650696e-1f);
  p = p * r + splat(6.9314718056e-1f);
  p = p * r + splat(1.0f);
#if FPT_WIDTH == 16
  return reinterpret_cast<F>(_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n));
#else
  const I power = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic);
  return p * reinterpret_cast<F>((power + 127) << 23);
#endif
#endif
}

#if FPT_WIDTH == 16
// rows[i][j] <-> rows[j][i] of 16 x 16 floats
FPT_INLINE void transpose(F* rows) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_maskz_unpacklo_ps(0xffff, (__m512)rows[i], (__m512)rows[i + 1]);
    a[i + 1] = _mm512_maskz_unpackhi_ps(0xffff, (__m512)rows[i], (__m512)rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = (__m512)_mm512_maskz_unpacklo_pd(0xff, (__m512d)a[i], (__m512d)a[i + 2]);
    b[i + 1] = (__m512)_mm512_maskz_unpackhi_pd(0xff, (__m512d)a[i], (__m512d)a[i + 2]);
    b[i + 2] = (__m512)_mm512_maskz_unpacklo_pd(0xff, (__m512d)a[i + 1], (__m512d)a[i + 3]);
    b[i + 3] = (__m512)_mm512_maskz_unpackhi_pd(0xff, (__m512d)a[i + 1], (__m512d)a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_maskz_shuffle_f32x4(0xffff, b[i], b[i + 4], 0x88);
    const __m512 high = _mm512_maskz_shuffle_f32x4(0xffff, b[i + 8], b[i + 12], 0x88);
    const __m512 odd_low = _mm512_maskz_shuffle_f32x4(0xffff, b[i], b[i + 4], 0xdd);
    const __m512 odd_high = _mm512_maskz_shuffle_f32x4(0xffff, b[i + 8], b[i + 12], 0xdd);
    rows[i] = (F)_mm512_maskz_shuffle_f32x4(0xffff, low, high, 0x88);
    rows[i + 8] = (F)_mm512_maskz_shuffle_f32x4(0xffff, low, high, 0xdd);
    rows[i + 4] = (F)_mm512_maskz_shuffle_f32x4(0xffff, odd_low, odd_high, 0x88);
    rows[i + 12] = (F)_mm512_maskz_shuffle_f32x4(0xffff, odd_low, odd_high, 0xdd);
  }
}

// 16 rows of 16 words of 4 bytes, `stride` bytes apart -> their columns, one after another.
FPT_INLINE void transpose_words(const void* from, int64_t stride, void* to) {
  F words[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    words[i] = (F)_mm512_loadu_ps(static_cast<const char*>(from) + i * stride);
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(static_cast<char*>(to) + 64 * i, (__m512)words[i]);
}
#endif

// The kinds as types, so that a loop is written once.

struct F16 {
  using Value = uint16_t;
  static FPT_INLINE float one(Value x) { return float_of_f16(x); }
  static FPT_INLINE Value of(float x) { return f16_of_float(x); }
  static FPT_INLINE F some(const Value* p) { return load_f16(p); }
  static FPT_INLINE void put(Value* p, F x) { store_f16(p, x); }
};

struct BF16 {
  using Value = uint16_t;
  static FPT_INLINE float one(Value x) { return float_of_bf16(x); }
  static FPT_INLINE Value of(float x) { return bf16_of_float(x); }
  static FPT_INLINE F some(const Value* p) { return load_bf16(p); }
  static FPT_INLINE void put(Value* p, F x) { store_bf16(p, x); }
};

struct F32 {
  using Value = float;
  static FPT_INLINE float one(Value x) { return x; }
  static FPT_INLINE Value of(float x) { return x; }
  static FPT_INLINE F some(const Value* p) { return load(p); }
  static FPT_INLINE void put(Value* p, F x) { store(p, x); }
};

// f64 is only ever copied and compared.
struct F64 {
  using Value = double;
  static FPT_INLINE double one(Value x) { return x; }
  static FPT_INLINE Value of(double x) { return x; }
};
