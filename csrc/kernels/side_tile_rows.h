// What side_tiles.h multiplies: the heads of an image, rounded to bf16 and laid out for tiles.

#if FPT_AMX

// Of a tile: 16 rows of 16 floats or 32 bf16 (0, 1), of DP bf16 (2), DP / 2 rows of pairs (3), DP rows
// (4, 5), and 16 rows of DP floats or pairs (6, 7).
template <int DP>
static TileShapes head_shapes() {
  TileShapes shapes;
  shapes.bytes[2] = 2 * DP;
  shapes.rows[3] = DP / 2;
  shapes.rows[4] = shapes.rows[5] = DP;
  shapes.bytes[6] = shapes.bytes[7] = 4 * DP;
  return shapes;
}

// The heads of one image, and one of them by `head`.  Every head has DP channels, zeros where it has
// none, and so are rows that are missing to a whole chunk of queries or keys.
template <int DP>
struct TiledHeads {
  int64_t queries, keys;       // whole chunks
  int64_t channels;            // of all heads, up to whole vectors
  uint16_t *q_rows, *grad_rows, *key_rows, *value_rows;  // [rows, channels]
  uint16_t* turned;            // [keys / 32, channels, 32], of the values forward, of the keys backward
  uint16_t *q_lanes, *grad_lanes;  // [queries / 16, channels / 2, 16] pairs of channels
  uint16_t *q_pairs, *grad_pairs;  // [queries / 2, channels] pairs of queries
  uint16_t* key_pairs;             // [16, channels]
  float* minus_means;              // [heads, queries]
  float* minus_lses;               // [queries], of one head
  float* logits;                   // [2, keys, 16]: forward, of two blocks of queries
  float *tiles, *grad_tiles;       // backward [2, 2, 32, 16]: of two chunks by two blocks
  uint16_t *weights, *slopes;      // [queries / 32, 32 keys, 32]
  uint16_t* pairs;                 // [2, 16, 16] pairs of keys, of two blocks
  float *grad_k, *grad_v;          // [keys, DP]
  float* sums;                     // [queries / 16, DP, 16]
  uint32_t *q_blocks, *grad_blocks;  // [channels / 32, 16, 16], of one query: see side_single.h
  int64_t floats = 0;

  TiledHeads(const SideSizes& s, float* base)
      : queries(up_to(s.queries, CHUNK)),
        keys(up_to(s.tokens + s.prompts, CHUNK)),
        channels(up_to(s.heads * DP, CHUNK)) {
    take(base, queries * channels, q_rows, grad_rows, q_lanes, grad_lanes, q_pairs, grad_pairs);
    take(base, keys * channels, key_rows, value_rows, turned);
    take(base, CHUNK * channels, key_pairs);
    take(base, s.heads * queries, minus_means), take(base, queries, minus_lses);
    take(base, 2 * keys * SIDE, logits);
    take(base, 4 * CHUNK * SIDE, tiles, grad_tiles);
    take(base, queries * CHUNK, weights, slopes), take(base, 2 * CHUNK * SIDE, pairs);
    take(base, keys * DP, grad_k, grad_v), take(base, queries * DP, sums);
    take(base, channels / CHUNK * FLOATS, q_blocks, grad_blocks);
  }

  TiledHeads head(int64_t number) const {
    TiledHeads one = *this;
    const int64_t first = number * DP;
    one.key_rows += first, one.value_rows += first, one.turned += first * CHUNK;
    one.q_lanes += first * SIDE, one.grad_lanes += first * SIDE;
    one.q_pairs += 2 * first, one.grad_pairs += 2 * first;
    one.minus_means += number * queries;
    return one;
  }

 private:
  // `count` elements each.
  template <class T, class... Parts>
  void take(float* base, int64_t count, T*& first, Parts*&... rest) {
    first = reinterpret_cast<T*>(base + floats);
    floats += up_to(count * int64_t(sizeof(T)), 64) / 4;
    if constexpr (sizeof...(rest) > 0) take(base, count, rest...);
  }
};

// What a head's rows do not say.  Logits, and their tops, are exponents of two.
struct TiledTask {
  int64_t queries, tokens, width;
  float *tops, *shares;
};

FPT_INLINE __m512i rounded(F low, F high) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

FPT_INLINE F load_first(const float* from, int64_t count) {
  const __mmask16 wanted = count >= W ? 0xffff : count > 0 ? __mmask16((1u << count) - 1) : 0;
  return (F)_mm512_maskz_loadu_ps(wanted, from);
}

// Rows of heads of `width` floats, `stride` apart -> rows of heads of DP bf16, scaled.
template <int DP>
static void round_heads(const float* from, int64_t stride, int64_t rows, const SideSizes& s,
                        float scale, int64_t channels, uint16_t* to) {
  const int64_t width = s.width / s.heads;
  for (int64_t row = 0; row < rows; ++row, from += stride, to += channels) {
    if (width == DP) {
      for (int64_t i = 0; i < channels; i += CHUNK)
        _mm512_storeu_si512(to + i, rounded(load_first(from + i, s.width - i) * scale,
                                            load_first(from + i + W, s.width - i - W) * scale));
      continue;
    }
    __builtin_memset(to, 0, 2 * channels);
    for (int64_t head = 0; head < s.heads; ++head) {
      const __m512i bits = rounded(load_first(from + head * width, width) * scale, F{});
      __builtin_memcpy(to + head * DP, &bits, 2 * DP);
    }
  }
}

// Two rows of 32, elements side by side.
FPT_INLINE void pair_two_rows(const uint16_t* first, const uint16_t* second, __m512i* pairs) {
  const __m512i low = _mm512_loadu_si512(first), high = _mm512_loadu_si512(second);
  const __m512i even = _mm512_maskz_unpacklo_epi16(~0u, low, high);
  const __m512i odd = _mm512_maskz_unpackhi_epi16(~0u, low, high);
  const __m512i lower = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i upper = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  pairs[0] = _mm512_permutex2var_epi64(even, lower, odd);
  pairs[1] = _mm512_permutex2var_epi64(even, upper, odd);
}

// Rows -> pairs of rows.
static void pair_rows(const uint16_t* from, int64_t rows, int64_t channels, uint16_t* to) {
  for (int64_t row = 0; row < rows; row += 2, from += 2 * channels, to += 2 * channels)
    for (int64_t i = 0; i < channels; i += CHUNK) {
      __m512i pairs[2];
      pair_two_rows(from + i, from + channels + i, pairs);
      _mm512_storeu_si512(to + 2 * i, pairs[0]);
      _mm512_storeu_si512(to + 2 * i + CHUNK, pairs[1]);
    }
}

// Rows, 16 by 16 -> pairs of channels.
static void pair_channels(const uint16_t* from, int64_t rows, int64_t channels, uint16_t* to) {
  for (int64_t row = 0; row < rows; row += SIDE)
    for (int64_t i = 0; i < channels; i += CHUNK)
      transpose_words(from + row * channels + i, 2 * channels, to + (row * channels + i * SIDE));
}

// Rows, 32 by 32 -> [channels, 32].
static void turn_rows(const uint16_t* from, int64_t rows, int64_t channels, uint16_t* pairs,
                      uint16_t* to) {
  for (int64_t row = 0; row < rows; row += CHUNK) {
    pair_rows(from + row * channels, CHUNK, channels, pairs);
    for (int64_t i = 0; i < channels; i += SIDE)
      transpose_words(pairs + 2 * i, 4 * channels, to + row * channels + i * CHUNK);
  }
}

// [heads, queries]: products of a head's rows of the output and of its gradient, `stride` apart, with
// the other sign.
template <int DP>
static void minus_means_of(const SideSizes& s, const float* out, const float* grads, int64_t stride,
                     const TiledHeads<DP>& h) {
  const int64_t width = s.width / s.heads, together = W / width;
  for (int64_t first = 0; first < s.heads; first += together)
    for (int64_t row = 0; row < s.queries; row += W) {
      const int64_t heads = s.heads - first < together ? s.heads - first : together;
      const int64_t rows = s.queries - row < W ? s.queries - row : W;
      F block[W] = {};
      for (int64_t i = 0, at = row * stride + first * width; i < rows; ++i, at += stride)
        block[i] = load_first(out + at, heads * width) * load_first(grads + at, heads * width);
      transpose(block);
      for (int64_t head = 0; head < heads; ++head) {
        F sum{};
        for (int64_t d = 0; d < width; ++d) sum -= block[head * width + d];
        store(h.minus_means + (first + head) * h.queries + row, sum);
      }
    }
}

#endif
