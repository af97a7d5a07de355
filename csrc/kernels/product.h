// Matrix products of a few rows with a packed matrix: C = A B.
//
// B is cut into panels of up to PANEL vectors of columns; a panel holds, for each step of the depth,
// its columns side by side.  A step is one value of f32, or a pair of bf16 where the processor
// multiplies those: two values of depth to a word, added up in f32.

constexpr int PANEL = FPT_WIDTH == 16 ? 4 : 2;
// Rows of a tile: its sums, a row of B and a value of A fill the registers.
constexpr int TILE = 6;

// `steps` of depth are summed up by themselves: rounding grows with their number and with that of the
// sums, not with the product of the two, and so much of a panel stays in the first-level cache.

struct Singles {
  using Step = float;
  static constexpr int values = 1;
  static constexpr int64_t steps = 16;
  static FPT_INLINE F multiply_add(Step a, const Step* b, F sum) {
    return splat(a) * load(b) + sum;
  }
};

#if FPT_BF16
struct Pairs {
  using Step = uint32_t;
  static constexpr int values = 2;
  static constexpr int64_t steps = 64;
  static FPT_INLINE F multiply_add(Step a, const Step* b, F sum) {
    return reinterpret_cast<F>(_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)),
                                                (__m512bh)_mm512_loadu_si512(b)));
  }
};
#endif

// C [TILE, VECTORS * W] = A [TILE, depth] times a panel; added to C where `more`.
template <class Product, int VECTORS>
FPT_INLINE void multiply_tile(const typename Product::Step* a, int64_t a_stride,
                              const typename Product::Step* panel, int64_t depth, float* c,
                              int64_t c_stride, bool more) {
  F sums[TILE][VECTORS];
  for (int row = 0; row < TILE; ++row)
    for (int vector = 0; vector < VECTORS; ++vector)
      sums[row][vector] = F{};
  for (int64_t step = 0; step < depth; ++step) {
#pragma GCC unroll 6
    for (int row = 0; row < TILE; ++row)
#pragma GCC unroll 4
      for (int vector = 0; vector < VECTORS; ++vector)
        sums[row][vector] = Product::multiply_add(
            a[row * a_stride + step], panel + (step * VECTORS + vector) * W, sums[row][vector]);
  }
  for (int row = 0; row < TILE; ++row)
    for (int vector = 0; vector < VECTORS; ++vector) {
      float* to = c + row * c_stride + vector * W;
      store(to, more ? load(to) + sums[row][vector] : sums[row][vector]);
    }
}

// C [rows, VECTORS * W] = A [rows, depth] times a panel; `rows` is a multiple of TILE.
template <class Product, int VECTORS>
static void multiply_panel(const typename Product::Step* a, int64_t a_stride,
                           const typename Product::Step* panel, int64_t depth, float* c,
                           int64_t c_stride, int64_t rows) {
  for (int64_t first = 0; first < depth; first += Product::steps) {
    const int64_t steps = depth - first < Product::steps ? depth - first : Product::steps;
    for (int64_t row = 0; row < rows; row += TILE)
      multiply_tile<Product, VECTORS>(a + row * a_stride + first, a_stride,
                                      panel + first * VECTORS * W, steps, c + row * c_stride,
                                      c_stride, first > 0);
  }
}

// C [rows, columns] = A [rows, depth] times B [depth, columns], which is packed.  `columns` is a
// multiple of W, and `rows` of TILE.
template <class Product>
static void multiply(const typename Product::Step* a, int64_t a_stride,
                     const typename Product::Step* b, int64_t depth, int64_t columns, float* c,
                     int64_t c_stride, int64_t rows) {
  int64_t column = 0;
  for (; column + PANEL * W <= columns; column += PANEL * W)
    multiply_panel<Product, PANEL>(a, a_stride, b + column * depth, depth, c + column, c_stride,
                                   rows);
  switch ((columns - column) / W) {
    case 1:
      return multiply_panel<Product, 1>(a, a_stride, b + column * depth, depth, c + column,
                                        c_stride, rows);
    case 2:
      return multiply_panel<Product, PANEL == 4 ? 2 : 1>(a, a_stride, b + column * depth, depth,
                                                         c + column, c_stride, rows);
    case 3:
      return multiply_panel<Product, PANEL == 4 ? 3 : 1>(a, a_stride, b + column * depth, depth,
                                                         c + column, c_stride, rows);
  }
}

// Where element (step, column) of a packed matrix of `columns` columns stands.
FPT_INLINE int64_t packed_at(int64_t step, int64_t column, int64_t depth, int64_t columns) {
  const int64_t first = column / (PANEL * W) * (PANEL * W);
  const int64_t wide = columns - first < PANEL * W ? columns - first : PANEL * W;
  return first * depth + step * wide + (column - first);
}
