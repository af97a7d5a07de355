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

  // to [padded(left_width), padded(right_width)] = left^T right over `rows` rows, added to what is
  // there where `more`.
  static void outer(const float* left, int64_t left_stride, int64_t left_width, const float* right,
                    int64_t right_stride, int64_t right_width, int64_t rows, Element*, bool more,
                    float* to) {
    const int64_t wide = padded(right_width);
    float_product({left, 1, left_stride}, left_width, right, right_stride, rows, wide,
                  {to, wide, more ? to : nullptr, wide});
  }
  static int64_t outer_size(int64_t, int64_t, int64_t) { return 0; }
};

// bf16 --------------------------------------------------------------------------------------------

#if FPT_BF16

FPT_INLINE int64_t whole_depth(int64_t depth) { return (depth + 31) / 32 * 32; }

FPT_INLINE U wide_bits(__m256i x) { return (U)_mm512_maskz_cvtepu16_epi32(0xffff, x); }

// 16 floats as PARTS vectors of bf16, each the rounding of what the ones before it leave.
template <int PARTS>
FPT_INLINE void split(F x, __m256i* parts) {
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; ++part) {
    parts[part] = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    if (part + 1 < PARTS)
      x -= as_float(wide_bits(parts[part]) << 16);
  }
}

FPT_INLINE void put(uint16_t* to, __m256i x) { _mm256_storeu_si256((__m256i*)to, x); }

// Neighbours of depth side by side, as the products want the rows of B.
FPT_INLINE void put_pairs(uint16_t* to, __m256i first, __m256i second) {
  _mm512_storeu_si512(to, (__m512i)(wide_bits(first) | wide_bits(second) << 16));
}

// A: part by part, rows of `stride` bf16.  B: part by part, panels of 16 columns, of which a row holds
// two neighbours of depth for each column.
struct PartRows {
  const uint16_t* data;
  int64_t stride, part;  // elements from row to row, and from part to part
};

struct PartPanels {
  const uint16_t* data;
  int64_t panel, part;
};

#if FPT_AMX

template <int ROWS, int COLUMNS>
FPT_INLINE void load_rows(const uint16_t* a, int64_t stride) {
  tile_load<4>(a, 2 * stride);
  if (ROWS == 2) tile_load<5>(a + 16 * stride, 2 * stride);
}

template <int COLUMNS>
FPT_INLINE void load_panels(const uint16_t* b, int64_t panel) {
  tile_load<6>(b, 64);
  if (COLUMNS == 2) tile_load<7>(b + panel, 64);
}

template <int ROWS, int COLUMNS>
FPT_INLINE void add_products() {
  tile_product<0, 4, 6>();
  if (COLUMNS == 2) tile_product<1, 4, 7>();
  if (ROWS == 2) tile_product<2, 5, 6>();
  if (ROWS == 2 && COLUMNS == 2) tile_product<3, 5, 7>();
}

template <int ROWS, int COLUMNS>
FPT_INLINE void start_tiles(const float* from, int64_t stride) {
  tile_load<0>(from, 4 * stride);
  if (COLUMNS == 2) tile_load<1>(from + 16, 4 * stride);
  if (ROWS == 2) tile_load<2>(from + 16 * stride, 4 * stride);
  if (ROWS == 2 && COLUMNS == 2) tile_load<3>(from + 16 * stride + 16, 4 * stride);
}

// ROWS x COLUMNS tiles of C, 16 x 16 each, from `depth` (a multiple of 32) of A and B.
template <int PARTS, int ROWS, int COLUMNS>
static void part_tiles(const PartRows& a, const PartPanels& b, int64_t depth, const Target& c) {
  if (c.start) {
    start_tiles<ROWS, COLUMNS>(c.start, c.start_stride);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t step = 0; step < depth; step += 32) {
    const uint16_t* rows = a.data + step;
    const uint16_t* panels = b.data + step * 16;
    const auto left = [&](int part) { load_rows<ROWS, COLUMNS>(rows + part * a.part, a.stride); };
    const auto right = [&](int part) { load_panels<COLUMNS>(panels + part * b.part, b.panel); };
    // Neighbours in this order share a factor.
    if constexpr (PARTS == 3) {
      left(0), right(2), add_products<ROWS, COLUMNS>();
      right(1), add_products<ROWS, COLUMNS>();
      right(0), add_products<ROWS, COLUMNS>();
      left(1), add_products<ROWS, COLUMNS>();
      right(1), add_products<ROWS, COLUMNS>();
      left(2), right(0), add_products<ROWS, COLUMNS>();
    } else {
      left(0), right(0), add_products<ROWS, COLUMNS>();
    }
  }
  tile_store<0>(c.to, 4 * c.stride);
  if (COLUMNS == 2) tile_store<1>(c.to + 16, 4 * c.stride);
  if (ROWS == 2) tile_store<2>(c.to + 16 * c.stride, 4 * c.stride);
  if (ROWS == 2 && COLUMNS == 2) tile_store<3>(c.to + 16 * c.stride + 16, 4 * c.stride);
}

constexpr int ROW_TILE = 16, TILE_ROWS_AT_ONCE = 2, PANELS = 2;

#else

// 8 rows and 1 or 2 panels, in vector registers.
template <int PARTS, int ROWS, int COLUMNS>
static void part_tiles(const PartRows& a, const PartPanels& b, int64_t depth, const Target& c) {
  static_assert(PARTS == 1, "without tiles f32 is faster than its parts");
  constexpr int rows = 8 * ROWS;
  F sums[rows][COLUMNS];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < COLUMNS; ++v)
      sums[r][v] = c.start ? load(c.start + r * c.start_stride + 16 * v) : F{};
  for (int64_t step = 0; step < depth; step += 2) {
    __m512bh columns[COLUMNS];
#pragma GCC unroll 2
    for (int v = 0; v < COLUMNS; ++v)
      columns[v] = (__m512bh)_mm512_loadu_si512(b.data + v * b.panel + step * 16);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      int pair;
      __builtin_memcpy(&pair, a.data + r * a.stride + step, 4);
#pragma GCC unroll 2
      for (int v = 0; v < COLUMNS; ++v)
        sums[r][v] = (F)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)_mm512_set1_epi32(pair),
                                         columns[v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < COLUMNS; ++v) store(c.to + r * c.stride + 16 * v, sums[r][v]);
}

constexpr int ROW_TILE = 8, TILE_ROWS_AT_ONCE = 1, PANELS = 2;

#endif

// The depth goes by blocks, so that two panels of B stay in the first-level cache.
constexpr int64_t DEPTH_BLOCK = 128;

template <int PARTS>
static void part_product(const PartRows& a, int64_t rows, const PartPanels& b, int64_t depth,
                         int64_t columns, const Target& c) {
  for (int64_t first = 0; first < depth; first += DEPTH_BLOCK) {
    const int64_t steps = depth - first < DEPTH_BLOCK ? depth - first : DEPTH_BLOCK;
    const float* start = first ? c.to : c.start;
    const int64_t start_stride = first ? c.stride : c.start_stride;
    for (int64_t column = 0; column < columns; column += 16 * PANELS) {
      const PartPanels panels{b.data + column / 16 * b.panel + first * 16, b.panel, b.part};
      const bool one = columns - column <= 16;
      for (int64_t row = 0; row < rows; row += ROW_TILE * TILE_ROWS_AT_ONCE) {
        const PartRows tile{a.data + row * a.stride + first, a.stride, a.part};
        const Target to{c.to + row * c.stride + column, c.stride,
                      start ? start + row * start_stride + column : nullptr, start_stride};
        if (TILE_ROWS_AT_ONCE == 2 && rows - row > ROW_TILE) {
          one ? part_tiles<PARTS, TILE_ROWS_AT_ONCE, 1>(tile, panels, steps, to)
              : part_tiles<PARTS, TILE_ROWS_AT_ONCE, 2>(tile, panels, steps, to);
        } else {
          one ? part_tiles<PARTS, 1, 1>(tile, panels, steps, to)
              : part_tiles<PARTS, 1, 2>(tile, panels, steps, to);
        }
      }
    }
  }
}

template <int PARTS>
struct Parts {
  using Element = uint16_t;
  static constexpr bool NARROW = PARTS == 1;
  static int64_t packed_size(int64_t depth, int64_t columns) {
    return PARTS * whole_depth(depth) * padded(columns);
  }
  static int64_t rows_size(int64_t rows, int64_t width) {
    return PARTS * padded(rows) * whole_depth(width);
  }
  static int64_t outer_size(int64_t rows, int64_t left_width, int64_t right_width) {
    return PARTS * whole_depth(rows) * (padded(left_width) + padded(right_width));
  }

  static void pack(const float* from, int64_t step_stride, int64_t column_stride, int64_t depth,
                   int64_t columns, Element* to) {
    const int64_t wide = padded(columns), deep = whole_depth(depth);
    // Of the two strides one is 1: along it a block is loaded.
    const bool along_depth = step_stride == 1;
    const int64_t stride = along_depth ? column_stride : step_stride;
    for (int64_t panel = 0; panel < wide; panel += 16)
      for (int64_t step = 0; step < deep; step += 16) {
        const int64_t row = along_depth ? panel : step, column = along_depth ? step : panel;
        const int64_t rows = (along_depth ? columns : depth) - row;
        const int64_t left = (along_depth ? depth : columns) - column;
        const __mmask16 wanted = left >= 16 ? 0xffff : left > 0 ? __mmask16((1u << left) - 1) : 0;
        F block[16];
        for (int i = 0; i < 16; ++i)
          block[i] = i < rows ? (F)_mm512_maskz_loadu_ps(wanted, from + (row + i) * stride + column)
                              : F{};
        if (along_depth) transpose(block);
        for (int i = 0; i < 16; i += 2)
          put_parts(block[i], block[i + 1], to + panel * deep + (step + i) * 16, deep * wide);
      }
  }

  struct Rows {
    PartRows rows;
    int64_t depth;
  };
  static Rows ready(const float* rows, int64_t stride, int64_t count, int64_t width, Element* to) {
    const int64_t deep = whole_depth(width), part = padded(count) * deep;
    for (int64_t row = 0; row < count; ++row)
      for (int64_t column = 0; column < deep; column += 16) {
        __m256i parts[PARTS];
        split<PARTS>(column < padded(width) ? load(rows + row * stride + column) : F{}, parts);
        for (int p = 0; p < PARTS; ++p) put(to + p * part + row * deep + column, parts[p]);
      }
    return {{to, deep, part}, deep};
  }

  static void multiply(const Rows& a, int64_t rows, const Element* b, int64_t columns,
                       const Target& c) {
    const int64_t wide = padded(columns);
    part_product<PARTS>(a.rows, rows, {b, 16 * a.depth, a.depth * wide}, a.depth, wide, c);
  }

  static void outer(const float* left, int64_t left_stride, int64_t left_width, const float* right,
                    int64_t right_stride, int64_t right_width, int64_t rows, Element* scratch,
                    bool more, float* to) {
    const int64_t deep = whole_depth(rows), tall = padded(left_width), wide = padded(right_width);
    Element* panels = scratch + PARTS * deep * tall;
    turn(left, left_stride, rows, tall, deep, scratch);
    for (int64_t panel = 0; panel < wide; panel += 16)
      for (int64_t row = 0; row < deep; row += 2) {
        const float* from = right + row * right_stride + panel;
        put_parts(row < rows ? load(from) : F{}, row + 1 < rows ? load(from + right_stride) : F{},
                  panels + panel * deep + row * 16, deep * wide);
      }
    part_product<PARTS>({scratch, deep, deep * tall}, tall, {panels, 16 * deep, deep * wide}, deep,
                        wide, {to, wide, more ? to : nullptr, wide});
  }

 private:
  static FPT_INLINE void put_parts(F first, F second, Element* to, int64_t part) {
    __m256i low[PARTS], high[PARTS];
    split<PARTS>(first, low);
    split<PARTS>(second, high);
    for (int p = 0; p < PARTS; ++p) put_pairs(to + p * part, low[p], high[p]);
  }

  // Columns of `from` [rows, tall] become rows of `deep`, zeros beyond the rows.
  static void turn(const float* from, int64_t stride, int64_t rows, int64_t tall, int64_t deep,
                   Element* to) {
    for (int64_t row = 0; row < deep; row += 16)
      for (int64_t column = 0; column < tall; column += 16) {
        F block[16];
        for (int i = 0; i < 16; ++i)
          block[i] = row + i < rows ? load(from + (row + i) * stride + column) : F{};
        transpose(block);
        for (int i = 0; i < 16; ++i) {
          __m256i parts[PARTS];
          split<PARTS>(block[i], parts);
          for (int p = 0; p < PARTS; ++p)
            put(to + p * deep * tall + (column + i) * deep + row, parts[p]);
        }
      }
  }
};

#endif
