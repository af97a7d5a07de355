// The products of prompt_attention by tiles of bf16, where one bf16 is enough for an element of the
// tokens: all of int8 and bf16, and what is beside prompts in bf16.  D is a multiple of 32.
//
// Prompts and weights are split into PARTS of bf16: one, or the three that an f32 is the sum of.  Two
// parts of f16 tokens are not here: on a Sapphire Rapids they took as long as AVX-512's products.
//
// A pair holds elements x and x + 16 of a row, or of a column: splitting takes no shuffle, and both
// sides of a product are laid out alike.  Rows of f16, which are rounded and not split, are the
// exception: a pair of theirs holds neighbours, as rounding leaves them.

#if FPT_AMX

constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t PAIRED = 2 * W;    // elements of a row of a tile
constexpr int64_t ROW_TILES = 4;     // of tokens, converted at a time
constexpr int64_t COLUMN_TILES = 4;  // of channels, summed up at a time
constexpr int64_t MOST_COLUMNS = COLUMN_TILES * W;

FPT_INLINE F first_bits(F x) { return as_float(as_bits(x) & 0xffff0000u); }

FPT_INLINE void put_pairs(char* to, F low, F high) {
  const __m512i below = _mm512_maskz_srli_epi32(0xffff, (__m512i)low, 16);
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(below, (__m512i)high, upper, 0xf8));
}

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

// The pairs of tokens: f16 is rounded, the others are bf16 as they are.
template <class T>
FPT_INLINE void put_tokens(F low, F high, char* to) {
  if constexpr (__is_same(T, F16)) put_rounded_pairs(to, low, high);
  else put_pairs(to, low, high);
}

// The pairs of a row of tokens.
template <class T>
FPT_INLINE void put_row_of_tokens(F low, F high, char* to) {
  if constexpr (__is_same(T, F16))
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  else put_pairs(to, low, high);
}

// Packed prompts [D, lanes] -> pairs along D, as rows of T have them: [D / 32, PARTS] tiles.
template <class T, int PARTS>
static void split_prompts(const float* packed, int64_t width, char* to) {
  constexpr int64_t step = __is_same(T, F16) ? 2 : 1, apart = __is_same(T, F16) ? 1 : W;
  for (int64_t d = 0; d < width; d += PAIRED, to += PARTS * TILE_BYTES)
    for (int64_t r = 0; r < W; ++r) {
      const float* from = packed + (d + r * step) * W;
      put_parts<PARTS>(load(from), load(from + apart * W), to + r * 64);
    }
}

FPT_INLINE void fetch_lines(const char* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

// Rows of tokens -> [tiles, D / 32] tiles; zeros after the last.
template <class T>
static void convert_rows(const TokenRows& tokens, const char* wanted, int64_t first, int64_t kept,
                         int64_t width, int64_t tiles, char* to) {
  const int64_t chunks = width / PAIRED, row_bytes = width * int64_t(sizeof(typename T::Value));
  const int64_t last = first + tiles * W;
  const auto place = [&](int64_t t) {
    return to + (t - first) / W * chunks * TILE_BYTES + (t - first) % W * 64;
  };
  int64_t t = first;
  for (; t < last && t < kept; ++t) {
    char* at = place(t);
    const auto* row = row_of<T>(tokens, t);
    if (wanted) fetch_lines(wanted + t * row_bytes, row_bytes);
    for (int64_t c = 0; c < chunks; ++c, at += TILE_BYTES)
      put_row_of_tokens<T>(T::some(row + c * PAIRED), T::some(row + c * PAIRED + W), at);
  }
  for (; t < last; ++t)
    for (int64_t c = 0; c < chunks; ++c) __builtin_memset(place(t) + c * TILE_BYTES, 0, 64);
}

// Channels d .. d + 16 * N of 32 tokens -> pairs along the tokens: N tiles.
template <class T, int N>
static void convert_columns(const TokenRows& tokens, const char* wanted, int64_t first,
                            int64_t kept, int64_t width, int64_t d, char* to) {
  const int64_t row_bytes = width * int64_t(sizeof(typename T::Value));
  for (int64_t r = 0; r < W; ++r) {
    const auto* above = first + r < kept ? row_of<T>(tokens, first + r) + d : nullptr;
    const auto* below = first + r + W < kept ? row_of<T>(tokens, first + r + W) + d : nullptr;
    if (wanted && below) fetch_lines(wanted + (first + 2 * r) * row_bytes, 2 * row_bytes);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const F low = above ? T::some(above + n * W) : F{};
      const F high = below ? T::some(below + n * W) : F{};
      put_tokens<T>(low, high, to + n * TILE_BYTES + r * 64);
    }
  }
}

// Weights [32 tokens, lanes] -> rows of prompts: PARTS tiles.
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

// Products run one after the other into the same sum, which costs no wait, with all parts of one
// side in tiles: loading a tile for each product would take as long as the product.

// Tiles FIRST .. FIRST + N.
template <int FIRST, int N>
FPT_INLINE void load_parts(const char* from) {
  tile_load<FIRST>(from, 64);
  if constexpr (N > 1) load_parts<FIRST + 1, N - 1>(from + TILE_BYTES);
}

// Sum 0 += a tile of tokens times the prompts' parts in tiles FIRST and following.
template <int PARTS, int FIRST>
FPT_INLINE void add_rows(const char* tokens) {
  tile_load<7>(tokens, 64);
  tile_product<0, 7, FIRST>();
  if constexpr (PARTS == 3) {
    tile_product<0, 7, FIRST + 1>();
    tile_product<0, 7, FIRST + 2>();
  }
}

// Sums 0 .. N += the weights' parts in tiles 4 to 6 times N tiles of tokens.
template <int PARTS, int N>
FPT_INLINE void add_columns(const char* tokens) {
  if constexpr (N > 1) add_columns<PARTS, N - 1>(tokens);
  tile_load<7>(tokens + (N - 1) * TILE_BYTES, 64);
  tile_product<N - 1, 4, 7>();
  if constexpr (PARTS == 3) {
    tile_product<N - 1, 5, 7>();
    tile_product<N - 1, 6, 7>();
  }
}

template <int N>
FPT_INLINE void zero_sums() {
  tile_zero<N - 1>();
  if constexpr (N > 1) zero_sums<N - 1>();
}

// Side by side, in rows of MOST_COLUMNS.
template <int N>
FPT_INLINE void store_sums(float* to) {
  tile_store<N - 1>(to + (N - 1) * W, MOST_COLUMNS * 4);
  if constexpr (N > 1) store_sums<N - 1>(to);
}

// Some tiles of tokens times one block of prompts, along CHUNKS * 32 channels; added to what is there
// where `more`.
template <int PARTS, int CHUNKS>
static void multiply_rows(const char* tokens, int64_t tiles, int64_t step, const char* prompts,
                          float* to, bool more) {
  load_parts<1, CHUNKS * PARTS>(prompts);
  for (int64_t tile = 0; tile < tiles; ++tile, tokens += step, to += W * W) {
    if (more) tile_load<0>(to, 64);
    else tile_zero<0>();
    add_rows<PARTS, 1>(tokens);
    if constexpr (CHUNKS == 2) add_rows<PARTS, 1 + PARTS>(tokens + TILE_BYTES);
    tile_store<0>(to, 64);
  }
}

// As row_products.  `buffer` holds two groups of tiles: one is converted while products of the other
// run.
template <class T, int PARTS>
static void tile_row_products(const TokenRows& tokens, const char* wanted, int64_t kept,
                              int64_t width, const char* prompts, int64_t blocks, float* products,
                              char* buffer) {
  const int64_t tiles = up_to(kept, W) / W, padded = up_to(kept, PAIRED), chunks = width / PAIRED;
  const int64_t step = chunks * TILE_BYTES;
  const auto count = [&](int64_t first) { return tiles - first < ROW_TILES ? tiles - first : ROW_TILES; };
  const auto place = [&](int64_t first) { return buffer + first / ROW_TILES % 2 * ROW_TILES * step; };
  const auto convert = [&](int64_t first) {
    if (first < tiles)
      convert_rows<T>(tokens, wanted, first * W, kept, width, count(first), place(first));
  };
  convert(0);
  for (int64_t first = 0; first < tiles; first += ROW_TILES) {
    convert(first + ROW_TILES);
    for (int64_t block = 0; block < blocks; ++block) {
      float* to = products + (block * padded + first * W) * W;
      for (int64_t c = 0; c < chunks; c += 2) {
        const char* part = prompts + (block * chunks + c) * PARTS * TILE_BYTES;
        const char* from = place(first) + c * TILE_BYTES;
        if (c + 1 < chunks) multiply_rows<PARTS, 2>(from, count(first), step, part, to, c > 0);
        else multiply_rows<PARTS, 1>(from, count(first), step, part, to, c > 0);
      }
    }
  }
}

// sums[p][channel] = sum over t of weights[t][p] * row t [d + channel], of 16 * N channels.
template <class T, int PARTS, int N>
static void tile_weighted_sum(const TokenRows& tokens, const char* wanted, int64_t kept,
                              int64_t width, int64_t d, const char* weights, float* sums,
                              char* buffer) {
  convert_columns<T, N>(tokens, wanted, 0, kept, width, d, buffer);
  zero_sums<N>();
  for (int64_t first = 0, turn = 0; first < kept; first += PAIRED, turn = 1 - turn) {
    if (first + PAIRED < kept)
      convert_columns<T, N>(tokens, wanted, first + PAIRED, kept, width, d,
                            buffer + (1 - turn) * N * TILE_BYTES);
    load_parts<4, PARTS>(weights);
    weights += PARTS * TILE_BYTES;
    add_columns<PARTS, N>(buffer + turn * N * TILE_BYTES);
  }
  store_sums<N>(sums);
}

// As weighted_rows; `use(sums, d, columns)` gets rows of prompts, MOST_COLUMNS apart.
template <class T, int PARTS, class Use>
FPT_INLINE void tile_weighted_rows(const TokenRows& tokens, const PromptTask& task, float* weights,
                                   char* buffer, Use use) {
  alignas(64) float sums[W * MOST_COLUMNS];
  char* split = buffer + 2 * COLUMN_TILES * TILE_BYTES;
  for (int64_t t = task.kept; t < up_to(task.kept, PAIRED); ++t) store(weights + t * W, F{});
  for (int64_t t = 0, at = 0; t < task.kept; t += PAIRED, at += PARTS * TILE_BYTES)
    split_weights<PARTS>(weights + t * W, split + at);
  const char* wanted = task.next;
  for (int64_t d = 0; d < task.width; d += MOST_COLUMNS, wanted = nullptr) {
    const bool whole = task.width - d >= MOST_COLUMNS;
    const auto sum = whole ? tile_weighted_sum<T, PARTS, COLUMN_TILES> : tile_weighted_sum<T, PARTS, 2>;
    sum(tokens, wanted, task.kept, task.width, d, split, sums, buffer);
    use(sums, d, whole ? MOST_COLUMNS : PAIRED);
  }
}

struct PromptScratch {
  explicit PromptScratch(const PromptTask& task) {
    const int64_t padded = up_to(task.kept, PAIRED);
    const auto address = reinterpret_cast<uintptr_t>(task.scratch);
    logits = reinterpret_cast<float*>((address + 63) & ~uintptr_t(63));
    grads = logits + GROUP * padded * W;
    scaled = grads + GROUP * padded * W;
    prompts = reinterpret_cast<char*>(scaled + GROUP * W * task.width);
    buffer = prompts + GROUP * task.width / PAIRED * 3 * TILE_BYTES;
  }

  float* logits;
  float* grads;
  float* scaled;
  char* prompts;
  char* buffer;
};

// Floats of a PromptScratch of three parts.
FPT_INLINE int64_t tile_scratch(int64_t kept, int64_t width) {
  const int64_t padded = up_to(kept, PAIRED), chunks = up_to(width, PAIRED) / PAIRED;
  const int64_t rows = 2 * ROW_TILES * chunks, columns = 2 * COLUMN_TILES + padded / PAIRED * 3;
  const int64_t tiles = GROUP * chunks * 3 + (rows > columns ? rows : columns);
  return 16 + GROUP * W * (2 * padded + width) + tiles * TILE_BYTES / 4;
}

template <class T, int PARTS>
static void split_blocks(const float* packed, int64_t blocks, int64_t width, char* to) {
  for (int64_t block = 0; block < blocks; ++block)
    split_prompts<T, PARTS>(packed + block * width * W, width,
                         to + block * width / PAIRED * PARTS * TILE_BYTES);
}

template <class T, int PARTS>
static void forward_by_tiles(const PromptTask& task, const PromptForward& output) {
  const Tiles shapes;
  const PromptScratch at(task);
  const int64_t padded = up_to(task.kept, PAIRED), all = up_to(task.prompts, W) / W;
  for (int64_t first = 0; first < all; first += GROUP) {
    const int64_t blocks = all - first < GROUP ? all - first : GROUP;
    const float* packed = task.queries + first * task.width * W;
    split_blocks<T, PARTS>(scaled_queries(task, packed, blocks, at.scaled), blocks, task.width,
                        at.prompts);
    tile_row_products<T, PARTS>(task.k, task.v_ahead, task.kept, task.width, at.prompts, blocks,
                                at.logits, at.buffer);
    for (int64_t block = 0; block < blocks; ++block) {
      float* weights = at.logits + block * padded * W;
      const int64_t prompt = (first + block) * W;
      const int64_t lanes = task.prompts - prompt < W ? task.prompts - prompt : W;
      F top, total;
      softmax_lanes<PARTS == 1>(task, weights, top, total);
      const F share = 1.0f / total;
      const auto put = [&](const float* sums, int64_t d, int64_t columns) {
        for (int64_t p = 0; p < lanes; ++p)
          for (int64_t i = 0; i < columns; i += W)
            put_row(output, (prompt + p) * output.stride + d + i,
                    load(sums + p * MOST_COLUMNS + i) * share[p], W);
      };
      tile_weighted_rows<T, PARTS>(task.v, task, weights, at.buffer, put);
      for (int64_t p = 0; p < lanes; ++p)
        task.lse[prompt + p] = top[p] + __builtin_logf(total[p]);
    }
  }
}

template <class T, int PARTS>
static void backward_by_tiles(const PromptTask& task, const PromptBackward& gradient) {
  const Tiles shapes;
  const PromptScratch at(task);
  const int64_t padded = up_to(task.kept, PAIRED), all = up_to(task.prompts, W) / W;
  const F scale = splat(root_scale(task.width));
  for (int64_t first = 0; first < all; first += GROUP) {
    const int64_t blocks = all - first < GROUP ? all - first : GROUP;
    const int64_t offset = first * task.width * W;
    const float* packed = scaled_queries(task, task.queries + offset, blocks, at.scaled);
    split_blocks<T, PARTS>(packed, blocks, task.width, at.prompts);
    tile_row_products<T, PARTS>(task.k, task.v_ahead, task.kept, task.width, at.prompts, blocks,
                                at.logits, at.buffer);
    split_blocks<T, PARTS>(gradient.grads + offset, blocks, task.width, at.prompts);
    tile_row_products<T, PARTS>(task.v, nullptr, task.kept, task.width, at.prompts, blocks,
                                at.grads, at.buffer);
    for (int64_t block = 0; block < blocks; ++block) {
      float* weights = at.logits + block * padded * W;
      const int64_t prompt = (first + block) * W;
      softmax_backward<PARTS == 1>(task, lse_of(task, prompt), weights, at.grads + block * padded * W);
      const auto add = [&](const float* sums, int64_t d, int64_t columns) {
        for (int64_t i = d; i < d + columns; i += W) {
          const F factor = task.k_scales ? load(task.k_scales + i) * scale : scale;
          for (int64_t p = 0; p < W; ++p) {
            float* to = gradient.grad_q + (prompt + p) * task.width + i;
            store(to, load(to) + load(sums + p * MOST_COLUMNS + i - d) * factor);
          }
        }
      };
      tile_weighted_rows<T, PARTS>(task.k, task, weights, at.buffer, add);
    }
  }
}

static bool suits_tiles(const PromptTask& task) {
  if (task.width % PAIRED) return false;
  if (task.stored == Stored::f16) return task.narrow;
  return task.stored != Stored::f32;
}

static void tile_forward(const PromptTask& task, const PromptForward& output) {
  const auto run = [&](auto one, auto three) { task.narrow ? one(task, output) : three(task, output); };
  switch (task.stored) {
    case Stored::f16: return forward_by_tiles<F16, 1>(task, output);
    case Stored::bf16: return run(forward_by_tiles<BF16, 1>, forward_by_tiles<BF16, 3>);
    case Stored::i8: return run(forward_by_tiles<I8, 1>, forward_by_tiles<I8, 3>);
    case Stored::f32: return;  // does not suit
  }
}

static void tile_backward(const PromptTask& task, const PromptBackward& gradient) {
  const auto run = [&](auto one, auto three) { task.narrow ? one(task, gradient) : three(task, gradient); };
  switch (task.stored) {
    case Stored::f16: return backward_by_tiles<F16, 1>(task, gradient);
    case Stored::bf16: return run(backward_by_tiles<BF16, 1>, backward_by_tiles<BF16, 3>);
    case Stored::i8: return run(backward_by_tiles<I8, 1>, backward_by_tiles<I8, 3>);
    case Stored::f32: return;
  }
}

#endif
