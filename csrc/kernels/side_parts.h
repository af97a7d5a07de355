// Products of side_products.h whose factors are bf16: floats rounded, or in parts that make up a float.

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
template <int PARTS>
FPT_INLINE void pair_parts(F first, F second, __m512i* parts) {
  if constexpr (PARTS == 1) {
    alignas(64) static constexpr uint16_t places[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    parts[0] = _mm512_permutexvar_epi16(_mm512_load_si512(places), bits);
    return;
  }
  __m256i low[PARTS], high[PARTS];
  split<PARTS>(first, low);
  split<PARTS>(second, high);
  for (int p = 0; p < PARTS; ++p)
    parts[p] = (__m512i)(wide_bits(low[p]) | wide_bits(high[p]) << 16);
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

// The depth goes by blocks, so that two panels of B stay in the first-level cache; that of kept rows,
// which are in a farther one, so long that sums are seldom stored on the way.
constexpr int64_t DEPTH_BLOCK = 128, KEPT_BLOCK = 4096;

// Of C's rows and columns from here on as many as are multiplied at once, in whole tiles.
template <int PARTS>
FPT_INLINE void part_block(const PartRows& a, int64_t rows, const PartPanels& b, int64_t columns,
                           int64_t depth, const Target& c) {
  const bool one = columns <= 16;
  if (TILE_ROWS_AT_ONCE == 2 && rows > ROW_TILE) {
    one ? part_tiles<PARTS, TILE_ROWS_AT_ONCE, 1>(a, b, depth, c)
        : part_tiles<PARTS, TILE_ROWS_AT_ONCE, 2>(a, b, depth, c);
  } else {
    one ? part_tiles<PARTS, 1, 1>(a, b, depth, c) : part_tiles<PARTS, 1, 2>(a, b, depth, c);
  }
}

template <int PARTS, int64_t BLOCK_DEPTH = DEPTH_BLOCK>
static void part_product(const PartRows& a, int64_t rows, const PartPanels& b, int64_t depth,
                         int64_t columns, const Target& c) {
  for (int64_t first = 0; first < depth; first += BLOCK_DEPTH) {
    const int64_t steps = depth - first < BLOCK_DEPTH ? depth - first : BLOCK_DEPTH;
    const float* start = first ? c.to : c.start;
    const int64_t start_stride = first ? c.stride : c.start_stride;
    for (int64_t column = 0; column < columns; column += 16 * PANELS) {
      const PartPanels panels{b.data + column / 16 * b.panel + first * 16, b.panel, b.part};
      for (int64_t row = 0; row < rows; row += ROW_TILE * TILE_ROWS_AT_ONCE) {
        const PartRows tile{a.data + row * a.stride + first, a.stride, a.part};
        const Target to{c.to + row * c.stride + column, c.stride,
                      start ? start + row * start_stride + column : nullptr, start_stride};
        part_block<PARTS>(tile, rows - row, panels, columns - column, steps, to);
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
  // Pairs of rows are not parted.
  static int64_t whole_rows(int64_t rows) { return rows + rows % 2; }
  static int64_t whole_deep(int64_t rows) { return whole_depth(rows); }
  static int64_t left_size(int64_t deep, int64_t tall) { return PARTS * left_stride(deep) * tall; }
  static int64_t right_size(int64_t deep, int64_t wide) { return PARTS * deep * wide; }

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

  // Columns become rows, [tall, deep].
  static void keep_left(const KeptRows& rows, int64_t deep, int64_t tall, Element* to) {
    const int64_t stride = left_stride(deep);
    for (int64_t row = 0; row < rows.span; row += 32) {
      const int64_t pairs = (rows.span - row) / 2;
      const __mmask16 wanted = pairs >= 16 ? 0xffff : __mmask16((1u << pairs) - 1);
      for (int64_t column = 0; column < tall; column += 16) {
        F words[PARTS][16];
        for (int i = 0; i < 16; ++i) {
          __m512i parts[PARTS];
          pairs_of(rows, row + 2 * i, column, parts);
          for (int p = 0; p < PARTS; ++p) words[p][i] = (F)parts[p];
        }
        for (int p = 0; p < PARTS; ++p) {
          transpose(words[p]);
          Element* at = to + (p * tall + column) * stride + rows.at + row;
          for (int i = 0; i < 16; ++i, at += stride)
            _mm512_mask_storeu_epi32(at, wanted, (__m512i)words[p][i]);
        }
      }
    }
  }

  // Panels of pairs of rows, the first of them at `column`.
  static void keep_right(const KeptRows& rows, int64_t deep, int64_t wide, int64_t column,
                         Element* to) {
    for (int64_t panel = 0; panel < rows.stride; panel += 16)
      for (int64_t row = 0; row < rows.span; row += 2) {
        __m512i parts[PARTS];
        pairs_of(rows, row, panel, parts);
        Element* at = to + (column + panel) * deep + (rows.at + row) * 16;
        for (int p = 0; p < PARTS; ++p) _mm512_storeu_si512(at + p * deep * wide, parts[p]);
      }
  }

  static void multiply_kept(const Element* left, const Element* right, int64_t deep, int64_t tall,
                            int64_t wide, int64_t column, int64_t columns, bool more, float* to) {
    const int64_t stride = left_stride(deep);
    part_product<PARTS, KEPT_BLOCK>({left, stride, stride * tall}, tall,
                                    {right + column * deep, 16 * deep, deep * wide}, deep, columns,
                                    {to + column, wide, more ? to + column : nullptr, wide});
  }

 private:
  // Not whole pages: the rows of a tile would share few sets of the cache.
  static int64_t left_stride(int64_t deep) { return deep + 32 - deep % 64; }

  static FPT_INLINE void put_parts(F first, F second, Element* to, int64_t part) {
    __m512i parts[PARTS];
    pair_parts<PARTS>(first, second, parts);
    for (int p = 0; p < PARTS; ++p) _mm512_storeu_si512(to + p * part, parts[p]);
  }

  // Two rows' 16 elements from a column on.
  static FPT_INLINE void pairs_of(const KeptRows& rows, int64_t row, int64_t column,
                                  __m512i* parts) {
    const float* from = rows.data + row * rows.stride + column;
    pair_parts<PARTS>(row < rows.count ? load(from) : F{},
                      row + 1 < rows.count ? load(from + rows.stride) : F{}, parts);
  }
};

#endif
