// Softmax attention of a block of queries, its column sums and its row log-sum-exp from one product.
//
// Logits of a block stay in the caches: one product makes them, a pass takes the row's maximum, a pass
// the exponentials, and from these come the output and the sums over the queries.  Exponentials and
// sums are f32; weights are rounded to bf16 for the second product only, as in torch's attention.

// The parts of the scratch.  A step is 4 bytes, whatever the product.
template <class Product>
struct AttentionScratch {
  using Step = typename Product::Step;
  int64_t block;        // rows of a block
  int64_t tokens;       // padded to whole vectors
  int64_t width;        // likewise
  int64_t key_steps;    // depth of the first product
  int64_t value_steps;  // depth of the second
  Step *keys, *values, *queries, *row, *other_row, *weights;
  float *logits, *out, *columns, *inverse;
  int64_t bytes = 0;

  explicit AttentionScratch(const AttentionTask& task) {
    tokens = round_up(task.tokens, W);
    width = round_up(task.width, W);
    key_steps = (task.width + Product::values - 1) / Product::values;
    value_steps = (task.tokens + Product::values - 1) / Product::values;
    // A quarter of a million bytes of logits, so that they and k stay in a second-level cache.
    block = (1 << 16) / tokens / TILE * TILE;
    block = block < TILE ? TILE : block > 10 * TILE ? 10 * TILE : block;
    const bool pairs = Product::values == 2;
    char* at = static_cast<char*>(task.scratch);
    keys = take<Step>(at, tokens * key_steps);
    values = take<Step>(at, task.v.data ? width * value_steps : 0);
    queries = take<Step>(at, block * key_steps);
    row = take<Step>(at, width);
    other_row = take<Step>(at, width);
    weights = take<Step>(at, pairs && task.v.data ? block * tokens / 2 : 0);
    logits = take<float>(at, block * tokens);
    out = take<float>(at, task.v.data ? block * width : 0);
    columns = take<float>(at, tokens);
    inverse = take<float>(at, block);
  }

  template <class T>
  T* take(char* base, int64_t count) {
    T* part = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * sizeof(T), 64);
    return part;
  }
};

// Columns of B are tokens: every row of k is spread over the steps of its column.
template <class Product>
static void pack_keys(const AttentionTask& task, const AttentionScratch<Product>& s) {
  for (int64_t token = 0; token < s.tokens; ++token) {
    if (token < task.tokens) {
      unpack(task.k, task.kind, token, task.width, s.row, s.key_steps);
    } else {
      __builtin_memset(s.row, 0, 4 * s.key_steps);
    }
    const int64_t stride = packed_at(1, token, s.key_steps, s.tokens) -
                           packed_at(0, token, s.key_steps, s.tokens);
    auto* to = s.keys + packed_at(0, token, s.key_steps, s.tokens);
    for (int64_t step = 0; step < s.key_steps; ++step) to[step * stride] = s.row[step];
  }
}

// Steps of B are tokens, or pairs of neighbours.
static void pack_values(const AttentionTask& task, const AttentionScratch<Singles>& s) {
  for (int64_t token = 0; token < task.tokens; ++token) {
    unpack(task.v, task.kind, token, task.width, s.row, s.width);
    for (int64_t column = 0; column < s.width; column += W)
      store(s.values + packed_at(token, column, s.value_steps, s.width), load(s.row + column));
  }
}

#if FPT_BF16 && !FPT_AMX
static void pack_values(const AttentionTask& task, const AttentionScratch<Pairs>& s) {
  uint16_t first[W], second[W];
  for (int64_t step = 0; step < s.value_steps; ++step) {
    unpack(task.v, task.kind, 2 * step, task.width, s.row, s.width / 2);
    if (2 * step + 1 < task.tokens) {
      unpack(task.v, task.kind, 2 * step + 1, task.width, s.other_row, s.width / 2);
    } else {
      __builtin_memset(s.other_row, 0, 2 * s.width);
    }
    for (int64_t column = 0; column < s.width; column += W) {
      __builtin_memcpy(first, reinterpret_cast<const char*>(s.row) + 2 * column, sizeof first);
      __builtin_memcpy(second, reinterpret_cast<const char*>(s.other_row) + 2 * column,
                       sizeof second);
      auto* to = s.values + packed_at(step, column, s.value_steps, s.width);
      for (int i = 0; i < W; ++i) to[i] = first[i] | uint32_t(second[i]) << 16;
    }
  }
}
#endif

// Logits of one row become weights; returns their sum.  `top` becomes what was taken off.
FPT_INLINE float exponentiate(float* logits, int64_t tokens, float scale, const float* known,
                              float& top) {
  F sums = F{};
  if (known) {
    top = *known;
  } else {
    F highest_logits = load(logits);
    for (int64_t token = W; token < tokens; token += W)
      highest_logits = highest(highest_logits, load(logits + token));
    top = highest_lane(highest_logits) * scale;
  }
  for (int64_t token = 0; token < tokens; token += W) {
    const F weights = exponential(load(logits + token) * splat(scale) - splat(top));
    store(logits + token, weights);
    sums += weights;
  }
  return sum_of_lanes(sums);
}

// Adds the normalised weights of TILE rows to the column sums.
FPT_INLINE void add_columns(const float* weights, int64_t tokens, const float* inverse,
                            float* columns) {
  static_assert(TILE == 6);
  for (int64_t token = 0; token < tokens; token += W) {
    const float* p = weights + token;
    const F first = load(p) * splat(inverse[0]) + load(p + tokens) * splat(inverse[1]);
    const F second = load(p + 2 * tokens) * splat(inverse[2]) + load(p + 3 * tokens) * splat(inverse[3]);
    const F third = load(p + 4 * tokens) * splat(inverse[4]) + load(p + 5 * tokens) * splat(inverse[5]);
    store(columns + token, load(columns + token) + (first + second + third));
  }
}

#if FPT_BF16 && !FPT_AMX
static void narrow(const float* weights, int64_t count, uint32_t* to) {
  auto* halves = reinterpret_cast<__m256i*>(to);
  for (int64_t i = 0; i < count; i += W)
    _mm256_storeu_si256(halves + i / W, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights + i)));
}
#endif

// Rows first .. first + count of the task, and padding up to a whole number of tiles.
template <class Product>
static void attend_block(const AttentionTask& task, const AttentionScratch<Product>& s,
                         int64_t first, int64_t count) {
  const int64_t rows = round_up(count, TILE);
  for (int64_t row = 0; row < rows; ++row) {
    auto* to = s.queries + row * s.key_steps;
    if (row < count) {
      unpack(task.q, task.kind, first + row, task.width, to, s.key_steps);
    } else {
      __builtin_memset(to, 0, 4 * s.key_steps);
    }
  }
  multiply<Product>(s.queries, s.key_steps, s.keys, s.key_steps, s.tokens, s.logits, s.tokens, rows);
  for (int64_t tile = 0; tile < rows; tile += TILE) {
    float* logits = s.logits + tile * s.tokens;
    for (int64_t row = tile; row < tile + TILE; ++row) {
      float* of_row = s.logits + row * s.tokens;
      s.inverse[row] = 0.0f;
      if (row >= count) {  // 0 times an infinite key would be NaN
        __builtin_memset(of_row, 0, 4 * s.tokens);
        continue;
      }
      for (int64_t token = task.tokens; token < s.tokens; ++token) of_row[token] = -__builtin_inff();
      const float* known = task.known_lse ? task.known_lse + first + row : nullptr;
      float top;
      const float sum = exponentiate(of_row, s.tokens, task.scale, known, top);
      s.inverse[row] = known ? 1.0f : 1.0f / sum;
      if (task.lse) task.lse[first + row] = top + __builtin_logf(sum);
    }
    if (task.columns) add_columns(logits, s.tokens, s.inverse + tile, s.columns);
    if constexpr (Product::values == 2)
      if (task.v.data) narrow(logits, TILE * s.tokens, s.weights + tile * s.tokens / 2);
  }
  if (!task.v.data) return;
  const typename Product::Step* left;
  if constexpr (Product::values == 2) {
    left = s.weights;
  } else {
    left = s.logits;
  }
  multiply<Product>(left, s.tokens / Product::values, s.values, s.value_steps, s.width, s.out,
                    s.width, rows);
  for (int64_t row = 0; row < count; ++row)
    write_row(task, first + row, s.out + row * s.width, s.inverse[row]);
}

template <class Product>
static void attend(const AttentionTask& task) {
  const AttentionScratch<Product> s(task);
  if (task.columns)
    for (int64_t token = 0; token < task.tokens; ++token) task.columns[token] = 0.0f;
  for (int64_t first = 0; first < task.rows; first += s.block) {
    const int64_t count = task.rows - first < s.block ? task.rows - first : s.block;
    __builtin_memset(s.columns, 0, 4 * s.tokens);
    attend_block(task, s, first, count);
    if (task.columns)
      for (int64_t token = 0; token < task.tokens; ++token)
        task.columns[token] += s.columns[token];
  }
}

template <class Product>
static void pack(const AttentionTask& task) {
  const AttentionScratch<Product> s(task);
  pack_keys(task, s);
  if (task.v.data) pack_values(task, s);
}

static int64_t attention_scratch(const AttentionTask& task) {
#if FPT_AMX
  if (task.kind == Kind::bf16) return TileScratch(task).bytes;
#elif FPT_BF16
  if (task.kind == Kind::bf16) return AttentionScratch<Pairs>(task).bytes;
#endif
  return AttentionScratch<Singles>(task).bytes;
}

static void attention_pack(const AttentionTask& task) {
#if FPT_AMX
  if (task.kind == Kind::bf16) return pack_in_tiles(task);
#elif FPT_BF16
  if (task.kind == Kind::bf16) return pack<Pairs>(task);
#endif
  pack<Singles>(task);
}

static void attention_rows(const AttentionTask& task) {
#if FPT_AMX
  if (task.kind == Kind::bf16) return attend_in_tiles(task);
#elif FPT_BF16
  if (task.kind == Kind::bf16) return attend<Pairs>(task);
#endif
  attend<Singles>(task);
}
