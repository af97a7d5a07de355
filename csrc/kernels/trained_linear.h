// trained_linear: a linear map of rows whose weights learn, by products of bf16 with sums in f32.
//
// Rows are read where they are, by runs of 16 values; the products are those of side_products.h.

#if FPT_BF16

// Elements from row to row: an odd number of lines of a cache, so that rows of a tile do not displace
// one another.
FPT_INLINE int64_t odd_stride(int64_t depth) { return depth + 32 - depth % 64; }

FPT_INLINE __m256i run_of(const TrainedRows& x, int64_t row, int64_t run) {
  const char* at = x.base + x.row[row] + x.run[run];
  if (x.narrow) return _mm256_loadu_si256((const __m256i*)at);
  return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(at));
}

// The same of two neighbours of depth, side by side; zeros for a row that is not there.
FPT_INLINE __m512i pair_of(const TrainedRows& x, int64_t row, int64_t rows, int64_t run) {
  const char* at = x.base + x.run[run];
  const bool both = row + 1 < rows;
  if (row >= rows) return _mm512_setzero_si512();
  if (x.narrow) {
    const auto load_bits = [&](int64_t r) {
      return wide_bits(_mm256_loadu_si256((const __m256i*)(at + x.row[r])));
    };
    return (__m512i)(load_bits(row) | (both ? load_bits(row + 1) << 16 : U{}));
  }
  __m512i pair;
  pair_parts<1>((F)_mm512_loadu_ps(at + x.row[row]),
                both ? (F)_mm512_loadu_ps(at + x.row[row + 1]) : F{}, &pair);
  return pair;
}

// `count` rows of the input as the products want them: where they are, or copied, with zeros up to a
// whole tile of rows.
static PartRows rows_of(const TrainedRows& x, int64_t first, int64_t count, uint16_t* to) {
  // Rows of a tile that are 2 KB apart would displace one another.
  if (x.stride && x.stride % 1024 && count == padded(count))
    return {reinterpret_cast<const uint16_t*>(x.base + x.row[first]), x.stride, 0};
  const int64_t stride = odd_stride(16 * x.runs);
  for (int64_t row = 0; row < count; ++row)
    for (int64_t run = 0; run < x.runs; ++run)
      put(to + row * stride + 16 * run, run_of(x, first + row, run));
  __builtin_memset(to + count * stride, 0, 2 * stride * (padded(count) - count));
  return {to, stride, 0};
}

// Deeper than those of part_product: fewer and longer rows, whose sums are loaded less often.
constexpr int64_t TRAINED_DEPTH = 384;
constexpr int64_t TRAINED_ROWS = ROW_TILE * TILE_ROWS_AT_ONCE;

static void trained_product(const PartRows& a, int64_t rows, const PartPanels& b, int64_t depth,
                            int64_t columns, const Target& c) {
  part_product<1, TRAINED_DEPTH>(a, rows, b, depth, columns, c);
}

static TrainedNeeds trained_needs(int64_t rows, int64_t depth, int64_t columns, int64_t at_once,
                                  int64_t runs_at_once) {
  using P = Parts<1>;
  const int64_t deep = whole_depth(rows), tall = padded(at_once);
  return {
      .forward = P::packed_size(depth, columns),
      .backward = P::packed_size(columns, depth),
      .turned = odd_stride(deep) * padded(columns),
      .forward_scratch = tall * odd_stride(depth) + 2 * tall * columns,
      .input_scratch = P::rows_size(at_once, columns) + 2 * 2 * TRAINED_ROWS * 32,
      .weight_scratch = 16 * runs_at_once * (deep < TRAINED_DEPTH ? deep : TRAINED_DEPTH),
  };
}

static void trained_pack(const float* weight, int64_t depth, int64_t columns, bool backward,
                         uint16_t* to) {
  if (backward) Parts<1>::pack(weight, depth, 1, columns, depth, to);
  else Parts<1>::pack(weight, 1, depth, depth, columns, to);
}

// Rows first .. first + count of the output; `out` begins with the first of them, and holds what is
// added to them where there is `more`.
static void trained_forward(const TrainedRows& x, int64_t first, int64_t count,
                            const uint16_t* packed, const float* bias, bool more, int64_t columns,
                            float* out, uint16_t* scratch) {
#if FPT_AMX
  const Tiles tiles;
#endif
  const int64_t depth = 16 * x.runs, tall = padded(count);
  // Whole tiles are written: where the last one is not whole, beside the output.
  float* to = count == tall ? out : reinterpret_cast<float*>(scratch + tall * odd_stride(depth));
  if (more && to != out) __builtin_memcpy(to, out, 4 * count * columns);
  trained_product(rows_of(x, first, count, scratch), count, {packed, 16 * depth, 0}, depth, columns,
                  {to, columns, more ? to : bias, more ? columns : 0});
  if (to != out) __builtin_memcpy(out, to, 4 * count * columns);
}

// Sums of up to TRAINED_ROWS rows and 32 columns, which belong `at` elements behind the output's first.
struct TrainedBlock {
  const float* sums;
  int64_t at, rows;
};

FPT_INLINE void put_block(const TrainedBlock& block, int64_t stride, bool narrow, void* out) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const __m512 low = _mm512_loadu_ps(block.sums + 32 * row);
    const __m512 high = _mm512_loadu_ps(block.sums + 32 * row + 16);
    const int64_t at = block.at + row * stride;
    if (narrow) {
      _mm512_storeu_si512(static_cast<uint16_t*>(out) + at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else {
      _mm512_storeu_ps(static_cast<float*>(out) + at, low);
      _mm512_storeu_ps(static_cast<float*>(out) + at + 16, high);
    }
  }
}

// The lines that put_block will write, fetched to be written.
FPT_INLINE void fetch_block(const TrainedBlock& block, int64_t stride, bool narrow, void* out) {
  const int64_t bytes = narrow ? 2 : 4;
  for (int64_t row = 0; row < block.rows; ++row) {
    const char* at = static_cast<char*>(out) + (block.at + row * stride) * bytes;
    __builtin_prefetch(at, 1);
    if (!narrow) __builtin_prefetch(at + 64, 1);
  }
}

// The gradient to `count` rows of the input, in bf16 where `narrow`: contiguous rows of `depth`.
static void trained_input(const float* grad, int64_t count, int64_t columns, const uint16_t* packed,
                          int64_t depth, bool narrow, void* out, uint16_t* scratch) {
#if FPT_AMX
  const Tiles tiles;
#endif
  const auto ready = Parts<1>::ready(grad, columns, count, columns, scratch);
  const PartRows& rows = ready.rows;
  auto* blocks = reinterpret_cast<float*>(scratch + Parts<1>::rows_size(count, columns));
  // Two panels at a time, which stay in the cache for all rows.  A block is put where it belongs
  // beside the products of the next one, which do not wait for it.
  TrainedBlock done{};
  int64_t turn = 0;
  for (int64_t column = 0; column < depth; column += 32)
    for (int64_t row = 0; row < count; row += TRAINED_ROWS, turn = 1 - turn) {
      float* block = blocks + turn * TRAINED_ROWS * 32;
      const int64_t left = count - row;
      const TrainedBlock next{block, row * depth + column, left < TRAINED_ROWS ? left : TRAINED_ROWS};
      fetch_block(next, depth, narrow, out);
      part_block<1>({rows.data + row * rows.stride, rows.stride, 0}, count - row,
                    {packed + column * ready.depth, 16 * ready.depth, 0}, 32, ready.depth,
                    {block, 32, nullptr, 0});
      put_block(done, depth, narrow, out);
      done = next;
    }
  put_block(done, depth, narrow, out);
}

// Rows first .. first + at_once of the output's gradient [rows, columns] -> [columns, rows] in bf16, zeros
// up to a whole depth; and the sums of these rows.
static void trained_turn(const float* grad, int64_t rows, int64_t columns, int64_t first,
                         int64_t at_once, uint16_t* to, float* sums) {
  const int64_t deep = whole_depth(rows), stride = odd_stride(deep);
  const int64_t end = first + at_once < deep ? first + at_once : deep;
  for (int64_t column = 0; column < columns; column += 16) {
    F sum{};
    for (int64_t row = first; row < end; row += 16) {
      F block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = row + i < rows ? load(grad + (row + i) * columns + column) : F{};
        sum += block[i];
      }
      transpose(block);
      for (int i = 0; i < 16; ++i)
        put(to + (column + i) * stride + row, (__m256i)_mm512_cvtneps_pbh((__m512)block[i]));
    }
    store(sums + column, sum);
  }
}

// Runs first .. first + count of the weights' gradient [columns, depth], over all rows; added to what
// is there where there is `more`.
static void trained_weight(const TrainedRows& x, const uint16_t* turned, int64_t rows,
                           int64_t columns, int64_t first, int64_t count, bool more, float* grad,
                           uint16_t* scratch) {
#if FPT_AMX
  const Tiles tiles;
#endif
  const int64_t deep = whole_depth(rows), depth = 16 * x.runs;
  float* to = grad + 16 * first;
  for (int64_t begin = 0; begin < deep; begin += TRAINED_DEPTH) {
    const int64_t steps = deep - begin < TRAINED_DEPTH ? deep - begin : TRAINED_DEPTH;
    for (int64_t step = 0; step < steps; step += 2)
      for (int64_t run = 0; run < count; ++run)
        _mm512_storeu_si512(scratch + 16 * (run * steps + step),
                            pair_of(x, begin + step, rows, first + run));
    trained_product({turned + begin, odd_stride(deep), 0}, columns, {scratch, 16 * steps, 0}, steps, 16 * count,
                    {to, depth, more || begin ? to : nullptr, depth});
  }
}

#else

constexpr TrainedNeeds (*trained_needs)(int64_t, int64_t, int64_t, int64_t, int64_t) = nullptr;
constexpr void (*trained_pack)(const float*, int64_t, int64_t, bool, uint16_t*) = nullptr;
constexpr void (*trained_forward)(const TrainedRows&, int64_t, int64_t, const uint16_t*,
                                  const float*, bool, int64_t, float*, uint16_t*) = nullptr;
constexpr void (*trained_input)(const float*, int64_t, int64_t, const uint16_t*, int64_t, bool,
                                void*, uint16_t*) = nullptr;
constexpr void (*trained_turn)(const float*, int64_t, int64_t, int64_t, int64_t, uint16_t*,
                               float*) = nullptr;
constexpr void (*trained_weight)(const TrainedRows&, const uint16_t*, int64_t, int64_t, int64_t,
                                 int64_t, bool, float*, uint16_t*) = nullptr;

#endif
