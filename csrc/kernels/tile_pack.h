// Scratch of tile_attention.h: how it lays out queries, keys and values in tiles.

#if FPT_AMX

constexpr int64_t SIDE = 16;              // rows of a tile, and its columns of f32
constexpr int64_t FLOATS = SIDE * SIDE;   // 4-byte steps of a tile
constexpr int64_t QUERIES = 2 * SIDE;     // of a block: every tile of keys serves two of queries
constexpr int64_t CHUNK = 32;             // values of a row of bf16: depth of a product, in tokens
constexpr int64_t BLOCK = 12;             // chunks of a block, at most
// Steps from one chunk to the next, of logits and of weights.  Not whole pages: a load waits for the
// stores before it that agree in the last 12 bits of their addresses.
constexpr int64_t LOGITS = 4 * FLOATS + SIDE, WEIGHTS = 2 * FLOATS + SIDE;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Tiles stand one after the other, [groups of 16 rows or columns][depth][16][16 steps].
struct TileScratch {
  int64_t chunks;  // of 32 tokens
  int64_t depth;   // of 32 channels
  int64_t blocks;
  bool kept;  // weights stay until their row's sum is known
  uint32_t *keys, *values, *queries, *weights, *rows;
  float *logits, *out, *tops, *columns;
  int64_t bytes = 0;

  explicit TileScratch(const AttentionTask& task) {
    chunks = (task.tokens + CHUNK - 1) / CHUNK;
    depth = (task.width + CHUNK - 1) / CHUNK;
    blocks = (chunks + BLOCK - 1) / BLOCK;
    kept = task.columns && !task.known_lse;
    char* at = static_cast<char*>(task.scratch);
    keys = take<uint32_t>(at, chunks * 2 * depth * FLOATS);
    values = take<uint32_t>(at, task.v.data ? chunks * 2 * depth * FLOATS : 0);
    queries = take<uint32_t>(at, 2 * depth * FLOATS);
    weights = take<uint32_t>(at, task.v.data ? BLOCK * WEIGHTS : 0);
    rows = take<uint32_t>(at, SIDE * depth * SIDE);
    logits = take<float>(at, (kept ? chunks : BLOCK) * LOGITS);
    out = take<float>(at, task.v.data ? 4 * depth * FLOATS : 0);
    tops = take<float>(at, blocks * QUERIES);
    columns = take<float>(at, chunks * CHUNK);
  }

  int64_t first_chunk(int64_t block) const { return block * chunks / blocks; }

  template <class T>
  T* take(char* base, int64_t count) {
    T* part = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * sizeof(T), 64);
    return part;
  }
};

// 16 rows of a matrix, as many as it has after `first`, as pairs; then zeros.  [16, depth * 16]
template <int64_t ROWS>
static void unpack_rows(const Matrix& matrix, int64_t first, int64_t count, int64_t width,
                        int64_t steps, uint32_t* to) {
  for (int64_t row = 0; row < ROWS; ++row) {
    if (row < count) {
      unpack(matrix, Kind::bf16, first + row, width, to + row * steps, steps);
    } else {
      __builtin_memset(to + row * steps, 0, 4 * steps);
    }
  }
}

// Columns of the second operand are tokens.
static void pack_keys(const AttentionTask& task, const TileScratch& s) {
  for (int64_t first = 0; first < s.chunks * CHUNK; first += SIDE) {
    unpack_rows<SIDE>(task.k, first, task.tokens - first, task.width, s.depth * SIDE, s.rows);
    uint32_t* to = s.keys + first / SIDE * s.depth * FLOATS;
    for (int64_t d = 0; d < s.depth; ++d)
      transpose_words(s.rows + d * SIDE, 4 * s.depth * SIDE, to + d * FLOATS);
  }
}

// Pairs of the second operand are tokens, its columns channels.
static void pack_values(const AttentionTask& task, const TileScratch& s) {
  const int64_t tiles = 2 * s.depth;
  for (int64_t first = 0; first < s.chunks * CHUNK; first += 2) {
    unpack_rows<2>(task.v, first, task.tokens - first, task.width, s.depth * SIDE, s.rows);
    const auto* halves = reinterpret_cast<const uint16_t*>(s.rows);
    uint32_t* to = s.values + first / CHUNK * tiles * FLOATS + first % CHUNK / 2 * SIDE;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const U even = as_bits(load_bf16(halves + tile * SIDE)) >> 16;
      const U odd = as_bits(load_bf16(halves + (tiles + tile) * SIDE));
      _mm512_store_si512(to + tile * FLOATS, (__m512i)(even | odd));
    }
  }
}

static void pack_queries(const AttentionTask& task, const TileScratch& s, int64_t first) {
  for (int64_t group = 0; group < 2; ++group) {
    const int64_t row = first + group * SIDE;
    unpack_rows<SIDE>(task.q, row, task.rows - row, task.width, s.depth * SIDE, s.rows);
    for (int64_t d = 0; d < s.depth; ++d)
      for (int64_t i = 0; i < SIDE; ++i)
        __builtin_memcpy(s.queries + ((group * s.depth + d) * SIDE + i) * SIDE,
                         s.rows + (i * s.depth + d) * SIDE, 4 * SIDE);
  }
}

#endif
