// The products of prompt_attention by tiles of bf16, whose sums are f32: rows of tokens by prompts, and
// weighted sums of rows.
//
// Products run one after the other into the same sum, which costs no wait; what they wait for is hidden
// among vectors' work, so tiles are multiplied while those that come after them are made.

#if FPT_AMX

// Tiles FIRST .. FIRST + N.
template <int FIRST, int N>
FPT_INLINE void load_parts(const char* from) {
  tile_load<FIRST>(from, 64);
  if constexpr (N > 1) load_parts<FIRST + 1, N - 1>(from + TILE_BYTES);
}

// Sum SUM += tokens in tile 7 times N parts of prompts.
template <int SUM, int N>
FPT_INLINE void add_rows() {
  if constexpr (N > 1) add_rows<SUM, N - 1>();
  tile_product<SUM, 7, 3 + N>();
}

// `to` [32 tokens, 16 prompts], of one block of prompts.
template <class S>
static void multiply_rows(const char* tokens, const char* prompts, int64_t width, float* to) {
  const int64_t apart = width / PAIRED * TILE_BYTES;
  tile_zero<0>();
  tile_zero<1>();
  for (int64_t d = 0; d < width; d += PAIRED, tokens += TILE_BYTES, prompts += S::parts * TILE_BYTES) {
    load_parts<4, S::parts>(prompts);
    tile_load<7>(tokens, 64);
    add_rows<0, S::parts>();
    tile_load<7>(tokens + apart, 64);
    add_rows<1, S::parts>();
  }
  tile_store<0>(to, 64);
  tile_store<1>(to + W * W, 64);
}

// Sum += the tokens in tile 7 times N parts of weights.
template <int SUM, int N>
FPT_INLINE void add_weighted() {
  if constexpr (N > 1) add_weighted<SUM, N - 1>();
  tile_product<SUM, 3 + N, 7>();
}

// Sums FIRST .. END += the parts of weights in tiles 4 and following times a tile of pairs each.
template <int PARTS, int FIRST, int END>
FPT_INLINE void add_columns(const char* pairs) {
  tile_load<7>(pairs + FIRST * TILE_BYTES, 64);
  add_weighted<FIRST, PARTS>();
  if constexpr (FIRST + 1 < END) add_columns<PARTS, FIRST + 1, END>(pairs);
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

// sums[p][column] = sum over t of weights[t][p] * column of t, of N tiles of columns.  `weigh(t)` makes
// the tiles of weights of 32 tokens at `split` + t / 32 * their bytes, and `pair(t)` says where the
// tokens' pairs are: both while the tokens before are multiplied.
template <class S, int N, class Weigh, class Pair>
static void weighted_sum_of_tiles(int64_t kept, const char* split, float* sums, Weigh weigh,
                                  Pair pair) {
  zero_sums<N>();
  const char* before = nullptr;  // the pairs
  for (int64_t t = 0; t < kept; t += PAIRED) {
    weigh(t);
    if (before) {
      load_parts<4, S::parts>(split + (t / PAIRED - 1) * S::parts * TILE_BYTES);
      add_columns<S::parts, 0, N / 2>(before);
    }
    const char* now = pair(t);
    if (before) add_columns<S::parts, N / 2, N>(before);
    before = now;
  }
  load_parts<4, S::parts>(split + (kept - 1) / PAIRED * S::parts * TILE_BYTES);
  add_columns<S::parts, 0, N>(before);
  store_sums<N>(sums);
}

#endif
