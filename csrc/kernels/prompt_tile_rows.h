// What prompt_tile_products.h multiplies: tokens, prompts and weights in tiles of bf16.
//
// Two rows of tokens interleaved are a row of the factor of weighted sums: where both products need
// the same tokens, those are converted once.

#if FPT_AMX

constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t PAIRED = 2 * W;    // elements of a row of a tile
constexpr int64_t COLUMN_TILES = 4;  // of channels, summed up at a time
constexpr int64_t MOST_COLUMNS = COLUMN_TILES * W;
constexpr int MOST_PARTS = 3;        // of a prompt

// Tokens of type T, of which one bf16 holds or rounds an element, times prompts or weights in PARTS.
template <class Token, int PARTS>
struct Tiling {
  using T = Token;
  static constexpr int parts = PARTS;
  // What is rounded; a pair then holds neighbours, as rounding leaves them, else channels x and x + 16,
  // which takes no shuffle.
  static constexpr bool rounded = __is_same(T, F16);
};

FPT_INLINE F first_bits(F x) { return as_float(as_bits(x) & 0xffff0000u); }

FPT_INLINE __m512i pairs_of(F low, F high) {
  const __m512i below = _mm512_maskz_srli_epi32(0xffff, (__m512i)low, 16);
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  return _mm512_ternarylogic_epi32(below, (__m512i)high, upper, 0xf8);
}

FPT_INLINE void put_pairs(char* to, F low, F high) { _mm512_storeu_si512(to, pairs_of(low, high)); }

FPT_INLINE __m512i rounded_pairs(F low, F high) {
  alignas(64) static constexpr uint16_t places[PAIRED] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return _mm512_permutexvar_epi16(_mm512_load_si512(places), bits);
}

FPT_INLINE void put_rounded_pairs(char* to, F low, F high) {
  _mm512_storeu_si512(to, rounded_pairs(low, high));
}

// The pairs of (low, high) in PARTS parts, a tile apart: each has the first bits of what those before
// it leave, and a single one is rounded.
template <int PARTS>
FPT_INLINE void put_parts(F low, F high, char* to) {
  if constexpr (PARTS == 1) return put_rounded_pairs(to, low, high);
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; ++part, to += TILE_BYTES) {
    put_pairs(to, low, high);
    low -= first_bits(low);
    high -= first_bits(high);
  }
}

// 32 channels of a token.
template <class S>
FPT_INLINE __m512i bits_of_token(const typename S::T::Value* row) {
  const F low = S::T::some(row), high = S::T::some(row + W);
  if constexpr (S::rounded) return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return pairs_of(low, high);
}

// Packed prompts [blocks, D, lanes] -> pairs along D, as rows have them: [blocks, D / 32, parts] tiles.
template <class S>
static void split_prompts(const float* packed, int64_t blocks, int64_t width, char* to) {
  constexpr int64_t step = S::rounded ? 2 : 1, apart = S::rounded ? 1 : W;
  for (int64_t d = 0; d < blocks * width; d += PAIRED, to += S::parts * TILE_BYTES)
    for (int64_t r = 0; r < W; ++r) {
      const float* from = packed + (d + r * step) * W;
      put_parts<S::parts>(load(from), load(from + apart * W), to + r * 64);
    }
}

// Weights [32 tokens, lanes] -> rows of prompts, a pair of which holds tokens t and t + 16: tiles of
// the parts.
template <int PARTS>
static void split_weights(const float* weights, char* to) {
  if constexpr (PARTS == 1) {  // a pair is a word
    F pairs[W];
#pragma GCC unroll 16
    for (int t = 0; t < W; ++t)
      pairs[t] = (F)rounded_pairs(load(weights + t * W), load(weights + (W + t) * W));
    transpose(pairs);
#pragma GCC unroll 16
    for (int p = 0; p < W; ++p) store(reinterpret_cast<float*>(to + p * 64), pairs[p]);
    return;
  }
  F above[W], below[W];
#pragma GCC unroll 16
  for (int t = 0; t < W; ++t) above[t] = load(weights + t * W), below[t] = load(weights + (W + t) * W);
  transpose(above);
  transpose(below);
#pragma GCC unroll 16
  for (int p = 0; p < W; ++p) put_parts<PARTS>(above[p], below[p], to + p * 64);
}

// Half of the next task's keys or of its values, fetched evenly: so much of each beside the work on
// 32 channels of two tokens, or on one token.  From several places in turn: the processor runs ahead in
// each of them (20 GB/s for 15 on a Sapphire Rapids).  Two words, so that it travels in registers.
struct Wanted {
  const char* from;
  int32_t step;  // bytes beside a token
  int32_t tokens;

  FPT_INLINE void operator()(int64_t t) const {
    const int64_t bytes = step, at = (t / 2 + t % 2 * ((tokens + 1) / 2)) * bytes;
    for (int64_t line = at; line < at + bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
  }
};

// Of 32 tokens the channels d .. end.  To `rows`, unless that is null: [2 of tokens, D / 32] tiles; to
// `pairs`, likewise: [D / 16] tiles of pairs along the tokens, of which the first of two has the first
// halves of every 8 channels.  Meanwhile HALVES of what is wanted are fetched.
template <class S, bool ROWS, bool PAIRS, int HALVES>
static void convert_tokens(const TokenRows& tokens, int64_t first, int64_t kept, int64_t width,
                           int64_t d, int64_t end, Wanted wanted, char* rows, char* pairs) {
  using T = typename S::T;
  const int64_t apart = width / PAIRED * TILE_BYTES;
  const int64_t line = wanted.step ? PAIRED * int64_t(sizeof(typename T::Value)) : 0;
  const int64_t place = (kept + 1) / 2 * line, half = kept * wanted.step;  // from one to the next
  const char* next = wanted.from + first / 2 * line + d / PAIRED * place;
  const auto put = [&](int64_t r, int64_t c, __m512i above, __m512i below) {
    if (ROWS) {
      char* to = rows + c / PAIRED * TILE_BYTES + r * 64;
      _mm512_storeu_si512(to, above);
      _mm512_storeu_si512(to + apart, below);
    }
    if (PAIRS) {
      char* to = pairs + (c - d) / W * TILE_BYTES + r * 64;
      _mm512_storeu_si512(to, _mm512_maskz_unpacklo_epi16(~0u, above, below));
      _mm512_storeu_si512(to + TILE_BYTES, _mm512_maskz_unpackhi_epi16(~0u, above, below));
    }
  };
  for (int64_t r = 0; r < W; ++r, next += line) {
    if (S::parts == 1 && sizeof(typename T::Value) == 2 && HALVES == 2 && r == W / 2)
      keep_awake<5, 4, 7>();
    const bool is_above = first + r < kept, is_below = first + W + r < kept;
    const auto* above = is_above ? row_of<T>(tokens, first + r) : nullptr;
    const auto* below = is_below ? row_of<T>(tokens, first + W + r) : nullptr;
    if (is_below) {
#pragma GCC unroll 2
      for (int64_t c = d; c < end; c += PAIRED) {
        const char* from = next + (c - d) / PAIRED * place;
        __builtin_prefetch(from, 0, 2);
        if (HALVES == 2) __builtin_prefetch(from + half, 0, 2);
        put(r, c, bits_of_token<S>(above + c), bits_of_token<S>(below + c));
      }
    } else {
      for (int64_t c = d; c < end; c += PAIRED)
        put(r, c, is_above ? bits_of_token<S>(above + c) : __m512i{}, __m512i{});
    }
  }
}

// Where channel c of 32 is in the sums of two such tiles, side by side.
template <class S>
FPT_INLINE constexpr int place_of_channel(int c) {
  const int element = S::rounded ? c : c < W ? 2 * c : 2 * (c - W) + 1;
  return element % 8 / 4 * W + element / 8 * 4 + element % 4;
}

template <class S>
struct ChannelPlaces {
  alignas(64) int32_t place[2 * W];
  constexpr ChannelPlaces() : place{} {
    for (int c = 0; c < 2 * W; ++c) place[c] = place_of_channel<S>(c);
  }
};

// Channels 16 * HALF .. of 32 sums, in order.
template <class S, int HALF>
FPT_INLINE F channels_in_order(const float* sums) {
  static constexpr ChannelPlaces<S> places;
  return (F)_mm512_permutex2var_ps((__m512)load(sums),
                                   _mm512_load_si512(places.place + HALF * W),
                                   (__m512)load(sums + W));
}

#endif
