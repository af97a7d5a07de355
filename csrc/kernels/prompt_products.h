// The two products of prompts and tokens: rows by packed prompts, and weighted sums of rows.
//
// A lane is a prompt in the first and a channel in the second, so neither needs a sum across lanes.
// Both keep as many running sums as hide the latency of a multiply-add.

struct I8 {
  using Value = int8_t;
  typedef int8_t Memory __attribute__((vector_size(W), aligned(1), may_alias));
  static FPT_INLINE F some(const Value* p) {
#if FPT_WIDTH == 16
    return (F)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p)));
#elif FPT_WIDTH == 8
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const Memory*>(p), F);
#endif
  }
};

constexpr int ROWS = W == 16 ? 24 : 12;  // running sums of the first product
constexpr int TILE_COLUMNS = 64;         // of a tile of ROWS rows: 3 or 6 KB
constexpr int STEP = ROWS / 3;           // the tile's rest is rounded up to it

FPT_INLINE int64_t up_to(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// W values at p, of which `wanted` matter.
template <class T>
FPT_INLINE F some_of(const typename T::Value* p, int64_t wanted, const char* end) {
  if (wanted >= W || reinterpret_cast<const char*>(p + W) <= end) return T::some(p);
  typename T::Value copy[W] = {};
  __builtin_memcpy(copy, p, wanted * sizeof(copy[0]));
  return T::some(copy);
}

template <class T>
FPT_INLINE const typename T::Value* row_of(const TokenRows& tokens, int64_t t) {
  return reinterpret_cast<const typename T::Value*>(tokens.base + tokens.rows[t]);
}

// Memory that is wanted next, to be fetched evenly while products run: `step` bytes at a time, from two
// places side by side, since the processor runs ahead in each.
struct Ahead {
  const char* from;
  int64_t step;
  int64_t apart;  // from one place to the other
  FPT_INLINE void fetch(int64_t i) const {
    __builtin_prefetch(from + i * step, 0, 2);
    __builtin_prefetch(from + apart + i * step, 0, 2);
  }
};

// Nothing: the same line over and over.
FPT_INLINE Ahead no_ahead(const float* any) { return {reinterpret_cast<const char*>(any), 0, 0}; }

// How often to fetch beside two columns of a tile or four tokens, so that no line is fetched much more
// than once.
template <class T>
constexpr int FETCHES = sizeof(typename T::Value) == 4 ? 2 : 1;

// to[r] (+)= sum over d < columns of tile[r][d] * packed[d], where a row holds what was of type T
template <class T, int R>
static void tile_product(const float* tile, const float* packed, int64_t columns, float* to,
                         bool add, Ahead ahead) {
  F sum[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) sum[r] = F{};
  const auto add_column = [&](int64_t d) {
    const F lanes = load(packed + d * W);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) sum[r] += lanes * tile[r * TILE_COLUMNS + d];
  };
  int64_t d = 0;
  for (; d + 2 <= columns; d += 2) {
    ahead.fetch(d);
    add_column(d);
    if (FETCHES<T> == 2) ahead.fetch(d + 1);
    add_column(d + 1);
  }
  if (d < columns) add_column(d);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) store(to + r * W, add ? load(to + r * W) + sum[r] : sum[r]);
}

// Where tokens are a tile as they stand, that tile: floats, side by side and as wide as it.  Else null.
template <class T>
FPT_INLINE const float* tile_in_place(
    const TokenRows& tokens, int64_t first, int64_t rows, int64_t width) {
  if (sizeof(typename T::Value) < sizeof(float)) return nullptr;
  if (!tokens.side_by_side || width != TILE_COLUMNS || rows < ROWS) return nullptr;
  return reinterpret_cast<const float*>(row_of<T>(tokens, first));
}

// Rows first .. first + rows, columns d .. d + columns -> tile.
template <class T>
static void fill_tile(const TokenRows& tokens, int64_t first, int64_t rows, int64_t d,
                      int64_t columns, float* tile) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto* row = row_of<T>(tokens, first + r) + d;
    float* to = tile + r * TILE_COLUMNS;
    if (columns == TILE_COLUMNS) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < TILE_COLUMNS; i += W) store(to + i, T::some(row + i));
    } else {
      for (int64_t i = 0; i < columns; i += W)
        store(to + i, some_of<T>(row + i, columns - i, tokens.end));
    }
  }
}

// products[block][t] = sum over d of row t [d] * packed[block][d], for all tokens.  Meanwhile as many
// bytes are fetched from `wanted`, unless that is null.
template <class T>
static void row_products(const TokenRows& tokens, const char* wanted, int64_t kept, int64_t width,
                         const float* packed, int64_t blocks, float* products, float* tile) {
  const int64_t padded = up_to(kept, ROWS), element = sizeof(typename T::Value);
  for (int64_t first = 0; first < kept; first += ROWS) {
    const int64_t rows = kept - first < ROWS ? kept - first : ROWS;
    for (int64_t d = 0; d < width; d += TILE_COLUMNS) {
      const int64_t columns = width - d < TILE_COLUMNS ? width - d : TILE_COLUMNS;
      const float* source = tile_in_place<T>(tokens, first, rows, width);
      if (!source) source = tile, fill_tile<T>(tokens, first, rows, d, columns, tile);
      Ahead ahead = no_ahead(tile);
      if (wanted)
        ahead = {wanted + (first * width + d * ROWS) * element / 2, ROWS * element / 2,
                 kept * width * element / 2};
      for (int64_t block = 0; block < blocks; ++block, ahead = no_ahead(tile)) {
        const float* lanes = packed + (block * width + d) * W;
        float* to = products + (block * padded + first) * W;
        if (rows > 2 * STEP) tile_product<T, 3 * STEP>(source, lanes, columns, to, d > 0, ahead);
        else if (rows > STEP) tile_product<T, 2 * STEP>(source, lanes, columns, to, d > 0, ahead);
        else tile_product<T, STEP>(source, lanes, columns, to, d > 0, ahead);
      }
    }
  }
}

constexpr int64_t RUN = 52;  // tokens of one running sum: long ones would gather rounding errors

// sum[p] += sum over t of weights[t][p] * row t [W channels from d], of which `wanted` matter.
template <class T, bool WHOLE>
static FPT_INLINE void weighted_sum(const TokenRows& tokens, int64_t kept, int64_t d,
                                    int64_t wanted, const float* weights, Ahead ahead,
                                    float* sum) {
  for (int64_t first = 0; first < kept; first += RUN) {
    F part[W] = {};
    const int64_t end = first + RUN < kept ? first + RUN : kept;
    const auto add_token = [&](int64_t t) {
      const auto* row = row_of<T>(tokens, t) + d;
      const F channels = WHOLE ? T::some(row) : some_of<T>(row, wanted, tokens.end);
#pragma GCC unroll 16
      for (int p = 0; p < W; ++p) part[p] += channels * weights[t * W + p];
    };
    int64_t t = first;
    for (; t + 4 <= end; t += 4) {
      ahead.fetch(t / 2);
      add_token(t), add_token(t + 1);
      if (FETCHES<T> == 2) ahead.fetch(t / 2 + 1);
      add_token(t + 2), add_token(t + 3);
    }
    for (; t < end; ++t) add_token(t);
#pragma GCC unroll 16
    for (int p = 0; p < W; ++p)
      store(sum + p * W, load(sum + p * W) + part[p]);
  }
}
