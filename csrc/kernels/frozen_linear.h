// A linear map of bf16 rows in tiles of AMX: frozen_linear.
//
// Columns go by panels of 32.  A group of panels is packed once, 16 columns x 32 values to a tile as
// tile_product wants them, and stays in the second-level cache while all rows pass by it, 32 at a
// time: 2 x 2 tiles of sums.  Packing is a few per cent of the products of a thousand rows, so nobody
// has to keep a second copy of the weights.  What comes after the product (bias, activation, residual)
// is done to the sums of the last block while the tiles of the next are multiplied: two other units.

#if FPT_AMX

constexpr int64_t BLOCK_SIDE = 32;  // rows and columns of a block
constexpr int64_t TILE_OF_BF16 = 1024;

// Bytes of scratch: packed columns; bias and scale as f32; sums of two blocks; a strip of rows.
static int64_t linear_scratch(int64_t depth, int64_t columns) {
  return columns * (2 * depth + 8) + 2 * BLOCK_SIDE * BLOCK_SIDE * 4 + 2 * BLOCK_SIDE * depth;
}

// Rows of the weights -> panels; of one step of a panel, both tiles side by side.
static void pack_columns(const LinearTask& task, char* to) {
  const int64_t stride = 2 * task.weight_stride, steps = task.depth / 32;
  for (int64_t column = 0; column < task.columns; column += BLOCK_SIDE)
    for (int64_t step = 0; step < steps; ++step)
      for (int half = 0; half < 2; ++half, to += TILE_OF_BF16)
        transpose_words(reinterpret_cast<const char*>(task.weight) +
                            (column + 16 * half) * stride + 64 * step,
                        stride, to);
}

enum class After : int { nothing, gelu, residual };

// Sums of a block, and where they go.
struct LinearBlock {
  const float* sums;
  const float* bias;
  const float* scale;
  const char* residual;
  char* out;
  int64_t rows, done;
  int64_t residual_bytes, out_bytes;  // from row to row
};

template <After AFTER>
FPT_INLINE void finish_row(LinearBlock& block) {
  const float* sums = block.sums + block.done * BLOCK_SIDE;
  F low = load(sums) + load(block.bias), high = load(sums + W) + load(block.bias + W);
  if constexpr (AFTER == After::gelu) {
    low = gelu_and_slope(low).value;
    high = gelu_and_slope(high).value;
  }
  if constexpr (AFTER == After::residual) {
    const auto* from =
        reinterpret_cast<const uint16_t*>(block.residual + block.done * block.residual_bytes);
    low = low * load(block.scale) + load_bf16(from);
    high = high * load(block.scale + W) + load_bf16(from + W);
  }
  _mm512_storeu_si512(block.out + block.done * block.out_bytes,
                      (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  ++block.done;
}

// What finishing this block will wait for otherwise: its lines of the output and of the residual.
template <After AFTER>
FPT_INLINE void fetch_ahead(const LinearBlock& block) {
  for (int64_t row = 0; row < block.rows; ++row) {
    __builtin_prefetch(block.out + row * block.out_bytes, 1);
    if constexpr (AFTER == After::residual)
      __builtin_prefetch(block.residual + row * block.residual_bytes);
  }
}

template <After AFTER>
FPT_INLINE void finish(LinearBlock& block) {
  while (block.done < block.rows) finish_row<AFTER>(block);
}

// Where 32 rows are: in the caller's tensor, or as tiles, one step after the other.
struct LinearStrip {
  const char* rows;
  int64_t row_bytes;
  char* tiles;
};

// Sums of a block of 32 columns and, with TALL, more than 16 rows; meanwhile the last block's rows.
// The FIRST panel to read a strip leaves its tiles for the others.
template <After AFTER, bool TALL, bool FIRST>
static void multiply_block(const LinearStrip& strip, const char* panel, int64_t steps, float* sums,
                           LinearBlock& last) {
  const int64_t at_once = (BLOCK_SIDE + steps - 1) / steps;
  const char* from = FIRST ? strip.rows : strip.tiles;
  const int64_t stride = FIRST ? strip.row_bytes : 64;
  const int64_t second = FIRST ? 16 * strip.row_bytes : TILE_OF_BF16;
  char* tiles = strip.tiles;
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (TALL) {
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t step = 0; step < steps; ++step, panel += 2 * TILE_OF_BF16) {
    tile_load<4>(from, stride);
    if constexpr (FIRST) tile_store<4>(tiles, 64);
    tile_load<6>(panel, 64);
    tile_product<0, 4, 6>();
    tile_load<7>(panel + TILE_OF_BF16, 64);
    tile_product<1, 4, 7>();
    if constexpr (TALL) {
      tile_load<5>(from + second, stride);
      if constexpr (FIRST) tile_store<5>(tiles + TILE_OF_BF16, 64);
      tile_product<2, 5, 6>();
      tile_product<3, 5, 7>();
    }
    from += FIRST ? 64 : 2 * TILE_OF_BF16;
    tiles += 2 * TILE_OF_BF16;
    for (int64_t i = 0; i < at_once && last.done < last.rows; ++i) finish_row<AFTER>(last);
  }
  finish<AFTER>(last);
  tile_store<0>(sums, 4 * BLOCK_SIDE);
  tile_store<1>(sums + 16, 4 * BLOCK_SIDE);
  if constexpr (TALL) {
    tile_store<2>(sums + 16 * BLOCK_SIDE, 4 * BLOCK_SIDE);
    tile_store<3>(sums + 16 * BLOCK_SIDE + 16, 4 * BLOCK_SIDE);
  }
}

// Of a strip with so many rows left.
static TileShapes shapes_of(int64_t left) {
  TileShapes shapes;
  const int64_t more = left - 16;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = uint8_t(left < 16 ? left : 16);
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = uint8_t(more > 0 && more < 16 ? more : 16);
  return shapes;
}

// The parts of the scratch.
struct LinearScratch {
  char* panels;
  float *bias, *scale;  // [columns]
  float* sums[2];       // of this block and of the last
  char* tiles;

  explicit LinearScratch(const LinearTask& task) {
    panels = static_cast<char*>(task.scratch);
    bias = reinterpret_cast<float*>(panels + 2 * task.depth * task.columns);
    scale = bias + task.columns;
    sums[0] = scale + task.columns;
    sums[1] = sums[0] + BLOCK_SIDE * BLOCK_SIDE;
    tiles = reinterpret_cast<char*>(sums[1] + BLOCK_SIDE * BLOCK_SIDE);
  }
};

static LinearBlock block_at(const LinearTask& task, const LinearScratch& s, int64_t row,
                            int64_t column) {
  LinearBlock block{};
  block.bias = s.bias + column;
  block.scale = s.scale + column;
  if (task.residual)
    block.residual =
        reinterpret_cast<const char*>(task.residual + row * task.residual_stride + column);
  block.out = reinterpret_cast<char*>(task.out + row * task.out_stride + column);
  block.rows = task.rows - row < BLOCK_SIDE ? task.rows - row : BLOCK_SIDE;
  block.residual_bytes = 2 * task.residual_stride;
  block.out_bytes = 2 * task.out_stride;
  return block;
}

template <After AFTER>
static void linear_of(const LinearTask& task) {
  const LinearScratch s(task);
  const int64_t steps = task.depth / 32;
  pack_columns(task, s.panels);
  for (int64_t i = 0; i < task.columns; ++i) {
    s.bias[i] = task.bias ? float_of_bf16(task.bias[i]) : 0.0f;
    s.scale[i] = task.scale ? float_of_bf16(task.scale[i]) : 1.0f;
  }
  LinearBlock last{};
  int turn = 0;
  for (int64_t row = 0; row < task.rows; row += BLOCK_SIDE) {
    const bool tall = task.rows - row > 16;
    const Tiles tiles(shapes_of(task.rows - row));
    const LinearStrip strip{reinterpret_cast<const char*>(task.x + row * task.x_stride),
                            2 * task.x_stride, s.tiles};
    for (int64_t column = 0; column < task.columns; column += BLOCK_SIDE, turn ^= 1) {
      LinearBlock next = block_at(task, s, row, column);
      next.sums = s.sums[turn];
      fetch_ahead<AFTER>(next);
      const auto multiply = column ? tall ? multiply_block<AFTER, true, false>
                                          : multiply_block<AFTER, false, false>
                            : tall ? multiply_block<AFTER, true, true>
                                   : multiply_block<AFTER, false, true>;
      multiply(strip, s.panels + 2 * task.depth * column, steps, s.sums[turn], last);
      last = next;
    }
  }
  finish<AFTER>(last);
}

static void linear_columns(const LinearTask& task) {
  if (task.gelu) return linear_of<After::gelu>(task);
  if (task.residual) return linear_of<After::residual>(task);
  linear_of<After::nothing>(task);
}

#else

constexpr int64_t (*linear_scratch)(int64_t, int64_t) = nullptr;
constexpr void (*linear_columns)(const LinearTask&) = nullptr;

#endif
