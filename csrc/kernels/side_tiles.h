// Attention of side_layers' heads where its products are of bf16: by tiles, forward and backward.
//
// Logits stand [keys, 16 queries], as attend_packed has them: sums over the keys run down the lanes.
// Rounded, a row of two such blocks is a row of the factor of products over the queries, and two rows
// interleaved are one of the factor of products over the keys: nothing between two products is
// transposed.

#if FPT_AMX

// Forward, a block of 16 queries at a time.  The tiles' products run beside what vectors do: those of
// the next block's logits, and those of the values with the weights that are ready.

// to [16, 16] = 16 rows of keys times a block of queries.
template <int DP>
FPT_INLINE void multiply_lanes(const TiledHeads<DP>& h, const uint16_t* rows, const uint16_t* lanes,
                               float* to) {
  tile_zero<0>();
  tile_load<2>(rows, 2 * h.channels);
  tile_load<3>(lanes, 64);
  tile_product<0, 2, 3>();
  tile_store<0>(to, 64);
}

// Sums in tile 4 += 32 columns of h.turned times a tile of pairs of keys.
template <int DP>
FPT_INLINE void add_keys(const TiledHeads<DP>& h, int64_t key, const uint16_t* pairs) {
  tile_load<5>(h.turned + key * h.channels, 64);
  tile_load<1>(pairs, 64);
  tile_product<4, 5, 1>();
}

// Exponentials of a chunk of logits -> a tile of pairs of keys, and their sum.  Where the chunk is
// not WHOLE, zeros after `count` of them.
template <bool WHOLE>
FPT_INLINE F exponentials_of_chunk(const float* logits, int64_t count, F top, uint16_t* pairs) {
  F even{}, odd{};
  const auto exponential = [&](int64_t key) {
    return rough_power_of_two(load(logits + key * W) - top);
  };
#pragma GCC unroll 2
  for (int64_t key = 0; key < CHUNK; key += 2) {
    const F low = WHOLE || key < count ? exponential(key) : F{};
    const F high = WHOLE || key + 1 < count ? exponential(key + 1) : F{};
    even += low, odd += high;
    put_rounded_pairs(reinterpret_cast<char*>(pairs + key * W), low, high);
  }
  return even + odd;
}

static F highest_logits(const float* logits, int64_t keys) {
  F tops[4] = {load(logits), load(logits), load(logits), load(logits)};
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) tops[i] = larger(load(logits + (key + i) * W), tops[i]);
  for (; key < keys; ++key) tops[0] = larger(load(logits + key * W), tops[0]);
  return larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
}

template <int DP>
static void attend_tiled(const TiledHeads<DP>& h, const TiledTask& head, float* out,
                         int64_t stride) {
  const auto logits_at = [&](int64_t first) { return h.logits + first / W % 2 * h.keys * W; };
  const auto multiply = [&](int64_t first, int64_t key) {
    for (int64_t at = key; at < key + CHUNK && at < head.tokens && first < head.queries; at += W)
      multiply_lanes<DP>(h, h.key_rows + at * h.channels, h.q_lanes + first * h.channels,
                         logits_at(first) + at * W);
  };
  for (int64_t key = 0; key < head.tokens; key += CHUNK) multiply(0, key);
  for (int64_t first = 0; first < head.queries; first += W) {
    const int64_t count = head.queries - first < W ? head.queries - first : W;
    const float* logits = logits_at(first);
    const F top = highest_logits(logits, head.tokens);
    F total{};
    tile_zero<4>();
    for (int64_t key = 0, turn = 0; key < head.tokens; key += CHUNK, turn = 1 - turn) {
      multiply(first + W, key);
      uint16_t* pairs = h.pairs + turn * CHUNK * W;
      const int64_t left = head.tokens - key;
      total += left >= CHUNK ? exponentials_of_chunk<true>(logits + key * W, left, top, pairs)
                             : exponentials_of_chunk<false>(logits + key * W, left, top, pairs);
      add_keys<DP>(h, key, pairs);
    }
    float* sums = h.sums + first * DP;
    tile_store<4>(sums, 64);
    const F share = 1.0f / total;
    const __mmask16 wanted = __mmask16((1u << count) - 1);
    _mm512_mask_storeu_ps(head.tops + first, wanted, (__m512)top);
    _mm512_mask_storeu_ps(head.shares + first, wanted, (__m512)share);
  }
  for (int64_t first = 0; first < head.queries; first += W) {
    const int64_t count = head.queries - first < W ? head.queries - first : W;
    float* sums = h.sums + first * DP;
    keep_awake<0, 2, 3>();
    const F share = load_first(head.shares + first, count);
    for (int64_t d = 0; d < DP; ++d) store(sums + d * W, load(sums + d * W) * share);
    lanes_to_rows<DP>(sums, count, head.width, out + first * stride, stride);
  }
}

// Backward, a chunk of 32 keys by a chunk of 32 queries at a time.

// log2 to 3e-6, of what is not negative.
FPT_INLINE F rough_log2(F x) {
  const F exponent = (F)_mm512_maskz_getexp_ps(0xffff, (__m512)x);
  const F t = (F)_mm512_maskz_getmant_ps(0xffff, (__m512)x, _MM_MANT_NORM_1_2,
                                            _MM_MANT_SIGN_src) - 1.0f;
  F p = splat(-2.64550169e-2f);
  p = p * t + splat(1.23444568e-1f);
  p = p * t + splat(-2.79531120e-1f);
  p = p * t + splat(4.58267912e-1f);
  p = p * t + splat(-7.18281591e-1f);
  p = p * t + splat(1.44255318f);
  return p * t + exponent;
}

// What the logits of a weight are less: minus infinity for queries that are missing to a chunk.
template <int DP>
static void find_minus_lses(const TiledHeads<DP>& h, const TiledTask& head) {
  for (int64_t at = 0; at < h.queries; at += W) {
    const F shares = load_first(head.shares + at, head.queries - at);
    store(h.minus_lses + at, rough_log2(shares) - load_first(head.tops + at, head.queries - at));
  }
}

// What slopes_of_chunk reads, of some keys and queries: exponents of their weights, and the weights'
// gradients less what those of a query have in common.  It is made product by product, so that others'
// vectors run beside.
template <int DP>
struct ChunkProducts {
  const TiledHeads<DP>& h;
  int64_t keys, key, query;
  int blocks;
  float *logits, *grads;

  static constexpr int COUNT = 8;

  FPT_INLINE void make(int product) const {
    const int64_t at = product / 4 * W, b = product / 2 % 2;
    if (b >= blocks || key + at >= keys) return;
    const int64_t row = (key + at) * h.channels, lanes = (query + b * W) * h.channels;
    const int64_t to = (b * CHUNK + at) * W;
    product % 2 == 0 ? multiply_lanes<DP>(h, h.key_rows + row, h.q_lanes + lanes, logits + to)
                     : multiply_lanes<DP>(h, h.value_rows + row, h.grad_lanes + lanes, grads + to);
  }
};

// Weights and slopes of `count` keys and a chunk of queries, of one or two blocks; zeros for keys
// that are missing to a WHOLE chunk, since sums over the keys see all of it.  Beside it the next
// chunk's products are made.
template <int DP, int BLOCKS, bool WHOLE>
static void slopes_of_chunk(const TiledHeads<DP>& h, int64_t count, const ChunkProducts<DP>& now,
                            const ChunkProducts<DP>& next) {
  F lses[BLOCKS], means[BLOCKS];
  for (int b = 0; b < BLOCKS; ++b) {
    lses[b] = load(h.minus_lses + now.query + b * W);
    means[b] = load(h.minus_means + now.query + b * W);
  }
  const float *logits = now.logits, *grads = now.grads;
  for (int64_t key = 0; key < CHUNK; key += 2) {
    if (key % 4 == 0) next.make(int(key / 4));
    F weights[2][2] = {}, slopes[2][2] = {};  // by key, by block
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; ++b) {
        if (!WHOLE && key + i >= count) continue;
        const int64_t at = (b * CHUNK + key + i) * W;
        weights[i][b] = rough_power_of_two(load(logits + at) + lses[b]);
        slopes[i][b] = weights[i][b] * (load(grads + at) + means[b]);
      }
    const int64_t row = now.query * CHUNK + key * CHUNK;
    const __m512i even = rounded(slopes[0][0], slopes[0][1]);
    const __m512i odd = rounded(slopes[1][0], slopes[1][1]);
    _mm512_storeu_si512(h.slopes + row, even);
    _mm512_storeu_si512(h.slopes + row + CHUNK, odd);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      _mm512_storeu_si512(h.weights + row + i * CHUNK, rounded(weights[i][0], weights[i][1]));
    // Queries by fours: those of even number in the first tile, those of odd number in the second.
    uint16_t* pairs = h.pairs + key * W;
    _mm512_storeu_si512(pairs, _mm512_maskz_unpacklo_epi16(~0u, even, odd));
    _mm512_storeu_si512(pairs + CHUNK * W, _mm512_maskz_unpackhi_epi16(~0u, even, odd));
  }
}

// to [16, DP] = sums over the queries of factors of 16 keys and rows in pairs.
template <int DP>
static void sum_queries(const TiledHeads<DP>& h, const uint16_t* factors, const uint16_t* pairs,
                        float* to) {
  tile_zero<6>();
  for (int64_t query = 0; query < h.queries; query += CHUNK) {
    tile_load<0>(factors + query * CHUNK, 64);
    tile_load<7>(pairs + query * h.channels, 4 * h.channels);
    tile_product<6, 0, 7>();
  }
  tile_store<6>(to, 4 * DP);
}

// Sums of a chunk of queries, by fours of even and of odd number -> in their order, scaled.
template <int DP>
static void join_fours(float* sums, F scale) {
  for (int64_t d = 0; d < DP; ++d) {
    const F even = load(sums + d * W) * scale, odd = load(sums + (DP + d) * W) * scale;
    const auto join = [&](int64_t block, __m512 both) {
      store(sums + (block * DP + d) * W, (F)_mm512_maskz_shuffle_f32x4(0xffff, both, both, 0xd8));
    };
    join(0, _mm512_maskz_shuffle_f32x4(0xffff, (__m512)even, (__m512)odd, 0x44));
    join(1, _mm512_maskz_shuffle_f32x4(0xffff, (__m512)even, (__m512)odd, 0xee));
  }
}

// Gradients of k and v to h.grad_k and h.grad_v, that of q to rows of head.width.
template <int DP>
static void attend_tiled_backward(const TiledHeads<DP>& h, const TiledTask& head, float* grad_q,
                                  int64_t stride) {
  const F scale = splat(root_scale(head.width) * LN_2);
  find_minus_lses(h, head);
  const int64_t buffer = 2 * CHUNK * W;
  const auto products = [&](int64_t key, int64_t query, int64_t turn) -> ChunkProducts<DP> {
    const int blocks = key >= head.tokens ? 0 : head.queries - query > W ? 2 : 1;
    return {h, head.tokens, key, query, blocks, h.tiles + turn * buffer, h.grad_tiles + turn * buffer};
  };
  ChunkProducts<DP> now = products(0, 0, 0);
  for (int i = 0; i < now.COUNT; ++i) now.make(i);
  int64_t turn = 0;
  for (int64_t key = 0; key < head.tokens; key += CHUNK) {
    for (int64_t query = 0; query < head.queries; query += CHUNK) {
      turn = 1 - turn;
      const bool more = query + CHUNK < head.queries;
      const auto next = more ? products(key, query + CHUNK, turn) : products(key + CHUNK, 0, turn);
      const int64_t left = head.tokens - key;
      if (now.blocks == 1) slopes_of_chunk<DP, 1, false>(h, left, now, next);
      else if (left < CHUNK) slopes_of_chunk<DP, 2, false>(h, left, now, next);
      else slopes_of_chunk<DP, 2, true>(h, left, now, next);
      now.query = next.query, now.key = next.key, now.blocks = next.blocks;
      now.logits = next.logits, now.grads = next.grads;
      for (int b = 0; b < 2; ++b) {
        float* sums = h.sums + (query + b * W) * DP;
        if (key > 0) tile_load<4>(sums, 64);
        else tile_zero<4>();
        add_keys<DP>(h, key, h.pairs + b * CHUNK * W);
        tile_store<4>(sums, 64);
      }
    }
    for (int64_t at = 0; at < CHUNK && key + at < head.tokens; at += W) {
      sum_queries<DP>(h, h.weights + at * CHUNK, h.grad_pairs, h.grad_v + (key + at) * DP);
      sum_queries<DP>(h, h.slopes + at * CHUNK, h.q_pairs, h.grad_k + (key + at) * DP);
    }
  }
  for (int64_t first = 0; first < head.queries; first += CHUNK) {
    keep_awake<0, 2, 3>();
    join_fours<DP>(h.sums + first * DP, scale);
    for (int64_t at = first; at < first + CHUNK && at < head.queries; at += W) {
      const int64_t count = head.queries - at < W ? head.queries - at : W;
      lanes_to_rows<DP>(h.sums + at * DP, count, head.width, grad_q + at * stride, stride);
    }
  }
}

#endif
