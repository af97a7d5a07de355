// Matrix products of the side network: many rows, both factors used again and again.
//
// A product is C = A B + `start`, whose rows stand `start_stride` apart: 0 for a bias, C's own rows to
// add to C.  All rows of floats are padded to whole vectors of 16, with zeros.  Two kinds of product
// share one interface: f32 (`Floats`), and bf16 factors with sums in f32 (`Parts`).  Three bf16 parts
// hold a float as it is, and six products of theirs are a product of floats up to its own rounding:
// what is left out is below 2^-24 of it.

constexpr int64_t PAD = 16;
FPT_INLINE int64_t padded(int64_t width) { return (width + PAD - 1) / PAD * PAD; }

struct Target {
  float* to;
  int64_t stride;
  const float* start;  // null: zeros
  int64_t start_stride;
};

// Rows of a factor of left^T right, `stride` floats apart and wide, which stand at row `at` of the
// factor; zeros from `count` to `span`.
struct KeptRows {
  const float* data;
  int64_t stride, count, at, span;
};

// f32 ---------------------------------------------------------------------------------------------

struct StridedRows {
  const float* data;
  int64_t row, step;  // strides of A
};

// Steps of depth that are summed up by themselves: see product.h.
constexpr int64_t FLOAT_STEPS = 48;

template <int ROWS, int VECTORS>
static void float_tile(const StridedRows& a, const float* b, int64_t b_stride, int64_t depth,
                       const Target& c) {
  for (int64_t first = 0; first < depth || first == 0; first += FLOAT_STEPS) {
    F sums[ROWS][VECTORS] = {};
    const int64_t end = first + FLOAT_STEPS < depth ? first + FLOAT_STEPS : depth;
    for (int64_t step = first; step < end; ++step) {
      F columns[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) columns[v] = load(b + step * b_stride + v * W);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const F value = splat(a.data[r * a.row + step * a.step]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = value * columns[v] + sums[r][v];
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) {
        float* to = c.to + r * c.stride + v * W;
        const F before = first ? load(to)
                         : c.start ? load(c.start + r * c.start_stride + v * W)
                                   : F{};
        store(to, before + sums[r][v]);
      }
  }
}

template <int VECTORS>
static void float_columns(const StridedRows& a, int64_t rows, const float* b, int64_t b_stride,
                          int64_t depth, const Target& c) {
  int64_t row = 0;
  const auto at = [&](int64_t r) { return StridedRows{a.data + r * a.row, a.row, a.step}; };
  const auto to = [&](int64_t r) {
    const float* start = c.start ? c.start + r * c.start_stride : nullptr;
    return Target{c.to + r * c.stride, c.stride, start, c.start_stride};
  };
  for (; row + TILE <= rows; row += TILE)
    float_tile<TILE, VECTORS>(at(row), b, b_stride, depth, to(row));
  for (; row + 2 <= rows; row += 2) float_tile<2, VECTORS>(at(row), b, b_stride, depth, to(row));
  if (row < rows) float_tile<1, VECTORS>(at(row), b, b_stride, depth, to(row));
}

static void float_product(const StridedRows& a, int64_t rows, const float* b, int64_t b_stride,
                          int64_t depth, int64_t columns, const Target& c) {
  const auto to = [&](int64_t column) {
    return Target{c.to + column, c.stride, c.start ? c.start + column : nullptr, c.start_stride};
  };
  int64_t column = 0;
  for (; column + PANEL * W <= columns; column += PANEL * W)
    float_columns<PANEL>(a, rows, b + column, b_stride, depth, to(column));
  for (; column < columns; column += W)
    float_columns<1>(a, rows, b + column, b_stride, depth, to(column));
}

struct Floats {
  using Element = float;
  static constexpr bool NARROW = false;  // whether factors are rounded to bf16
  // Elements of a packed matrix [depth, columns], and of rows that are made ready.
  static int64_t packed_size(int64_t depth, int64_t columns) { return depth * padded(columns); }
  static int64_t rows_size(int64_t, int64_t) { return 0; }

  // B of element (step, column) at from[step * step_stride + column * column_stride].
  static void pack(const float* from, int64_t step_stride, int64_t column_stride, int64_t depth,
                   int64_t columns, Element* to) {
    const int64_t wide = padded(columns);
    for (int64_t step = 0; step < depth; ++step)
      for (int64_t column = 0; column < wide; ++column)
        to[step * wide + column] =
            column < columns ? from[step * step_stride + column * column_stride] : 0.0f;
  }

  struct Rows {
    const float* data;
    int64_t stride, width;
  };
  static Rows ready(const float* rows, int64_t stride, int64_t, int64_t width, Element*) {
    return {rows, stride, width};
  }

  // The first `rows` of A; C has room for padded(rows).
  static void multiply(const Rows& a, int64_t rows, const Element* b, int64_t columns,
                       const Target& c) {
    const int64_t wide = padded(columns);
    float_product({a.data, a.stride, 1}, rows, b, wide, a.width, wide, c);
  }

  // Factors of left^T right, whose rows are kept group by group: see side_factors.h.
  static int64_t whole_rows(int64_t rows) { return rows; }
  static int64_t whole_deep(int64_t rows) { return rows; }
  static int64_t left_size(int64_t deep, int64_t tall) { return deep * tall; }
  static int64_t right_size(int64_t deep, int64_t wide) { return deep * wide; }

  static void keep_left(const KeptRows& rows, int64_t deep, int64_t tall, Element* to) {
    keep_right(rows, deep, tall, 0, to);
  }

  static void keep_right(const KeptRows& rows, int64_t, int64_t wide, int64_t column, Element* to) {
    for (int64_t row = 0; row < rows.span; ++row) {
      float* at = to + (rows.at + row) * wide + column;
      if (row < rows.count) __builtin_memcpy(at, rows.data + row * rows.stride, 4 * rows.stride);
      else __builtin_memset(at, 0, 4 * rows.stride);
    }
  }

  static void multiply_kept(const Element* left, const Element* right, int64_t deep, int64_t tall,
                            int64_t wide, int64_t column, int64_t columns, bool more, float* to) {
    float_product({left, 1, tall}, tall, right + column, wide, deep, columns,
                  {to + column, wide, more ? to + column : nullptr, wide});
  }
};
