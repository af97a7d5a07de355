// The attention of one query of all heads at once, where products are of bf16: of the queries that are
// beyond whole blocks of 16.  A block of one query takes as long as one of sixteen, in every head.
//
// Lanes are heads.  Logits are a product of the keys' rows, of all heads, and of a factor that has in
// each lane the channels of its head and zeros elsewhere; sums over keys and over channels are by
// vectors, with the lanes' weights spread over their heads' channels.

#if FPT_AMX

constexpr int64_t MOST_SINGLE = 4;  // queries; more of them take as long as blocks

// The sizes of what is done by blocks: of all queries, or of whole blocks alone.
template <int DP>
static SideSizes tiled_sizes(SideSizes s) {
  const int64_t single = s.queries % W;
  if (single <= MOST_SINGLE && s.heads <= W && s.width == s.heads * DP && s.width % W == 0)
    s.queries -= single;
  return s;
}

// Lanes of the heads of channels `first` and following.
template <int DP>
FPT_INLINE F spread(F lanes, int64_t first) {
  const __m512i channel = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_add_epi32(channel, _mm512_set1_epi32(int(first)));
  return (F)_mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, at, DP == 8 ? 3 : 4),
                                           (__m512)lanes);
}

// A row of all heads -> blocks [channels / 32, 16 pairs of channels, 16 heads].
template <int DP>
static void part_row(const float* row, float scale, const SideSizes& s, const TiledHeads<DP>& h,
                     uint32_t* blocks) {
  __builtin_memset(blocks, 0, 4 * h.channels / CHUNK * FLOATS);
  for (int64_t first = 0; first < s.width; first += CHUNK) {
    alignas(64) uint32_t pairs[SIDE];
    _mm512_store_si512(pairs, rounded(load_first(row + first, s.width - first) * scale,
                                      load_first(row + first + W, s.width - first - W) * scale));
    for (int64_t i = 0; i < SIDE && first + 2 * i < s.width; ++i)
      blocks[(first / 2 + i) * SIDE + (first + 2 * i) / DP] = pairs[i];
  }
}

// to [keys, 16 heads] = rows of all heads times blocks.
template <int DP>
static void multiply_blocks(const TiledHeads<DP>& h, int64_t keys, const uint16_t* rows,
                            const uint32_t* blocks, float* to) {
  for (int64_t key = 0; key < keys; key += SIDE) {
    tile_zero<0>();
    for (int64_t first = 0; first < h.channels; first += CHUNK) {
      tile_load<1>(rows + key * h.channels + first, 2 * h.channels);
      tile_load<2>(blocks + first / CHUNK * FLOATS, 64);
      tile_product<0, 1, 2>();
    }
    tile_store<0>(to + key * SIDE, 64);
  }
}

template <int DP>
static void attend_single(const SideSizes& s, const SideGroup& g, const SideRows<Parts<1>>& r,
                          const TiledHeads<DP>& h, int64_t image, int64_t query) {
  const int64_t row = image * s.queries + query, keys = s.tokens + s.prompts;
  part_row(r.q + row * r.width, root_scale(DP), s, h, h.q_blocks);
  multiply_blocks(h, keys, h.key_rows, h.q_blocks, h.logits);
  const F top = highest_logits(h.logits, keys);
  F total{};
  for (int64_t key = 0; key < keys; ++key) {
    const F weight = rough_power_of_two(load(h.logits + key * W) - top);
    store(h.logits + key * W, weight);
    total += weight;
  }
  const F share = 1.0f / total;
  for (int64_t head = 0; head < s.heads; ++head) {
    const int64_t at = (image * s.heads + head) * s.queries + query;
    g.tops[at] = top[head], g.shares[at] = share[head];
  }
  for (int64_t first = 0; first < s.width; first += W) {
    F sums[2] = {};
    for_each_key_run(s, g.images, image, [&](int64_t from, int64_t rows, int64_t key) {
      const float* values = r.kv + from * r.wide + s.width + first;
      for (int64_t i = 0; i < rows; ++i)
        sums[i % 2] += spread<DP>(load(h.logits + (key + i) * W), first) * load(values + i * r.wide);
    });
    store(r.attended + row * r.width + first, (sums[0] + sums[1]) * spread<DP>(share, first));
  }
}

// What find_minus_lses and minus_means_of find of a head's queries, here of a query's heads.
template <int DP>
static void lanes_of_single(const SideSizes& s, const SideGroup& g, const SideRows<Parts<1>>& r,
                            int64_t image, int64_t query, F* minus_lse, F* minus_mean) {
  alignas(64) float tops[W] = {}, shares[W] = {}, means[W] = {};
  const int64_t row = (image * s.queries + query) * r.width;
  for (int64_t head = 0; head < s.heads; ++head) {
    const int64_t at = (image * s.heads + head) * s.queries + query;
    tops[head] = g.tops[at], shares[head] = g.shares[at];
    for (int64_t d = row + head * DP; d < row + head * DP + DP; ++d)
      means[head] += r.attended[d] * r.grad_attended[d];
  }
  *minus_lse = rough_log2(load(shares)) - load(tops);
  *minus_mean = -load(means);
}


// The gradient of the query, and those of the keys and values, which it may add to what is there.
template <int DP>
static void attend_single_backward(const SideSizes& s, const SideGroup& g,
                                   const SideRows<Parts<1>>& r, const TiledHeads<DP>& h,
                                   int64_t image, int64_t query, bool adds) {
  const int64_t row = (image * s.queries + query) * r.width, keys = s.tokens + s.prompts;
  const float scale = root_scale(DP);
  float *weights = h.logits, *slopes = h.logits + h.keys * W;
  part_row(r.q + row, scale, s, h, h.q_blocks);
  part_row(r.grad_attended + row, 1.0f, s, h, h.grad_blocks);
  multiply_blocks(h, keys, h.key_rows, h.q_blocks, weights);
  multiply_blocks(h, keys, h.value_rows, h.grad_blocks, slopes);
  F minus_lse, minus_mean;
  lanes_of_single<DP>(s, g, r, image, query, &minus_lse, &minus_mean);
  for (int64_t at = 0; at < keys * W; at += W) {
    const F weight = rough_power_of_two(load(weights + at) + minus_lse);
    store(weights + at, weight);
    store(slopes + at, weight * (load(slopes + at) + minus_mean));
  }
  for (int64_t first = 0; first < s.width; first += W) {
    const F q = load(r.q + row + first) * scale, grad = load(r.grad_attended + row + first);
    F sums[2] = {};
    for_each_key_run(s, g.images, image, [&](int64_t from, int64_t rows, int64_t key) {
      const uint16_t* of_k = h.key_rows + key * h.channels + first;
      float* to = r.grad_kv + from * r.wide + first;
      for (int64_t i = 0; i < rows; ++i, to += r.wide, of_k += h.channels) {
        const F weight = spread<DP>(load(weights + (key + i) * W), first);
        const F slope = spread<DP>(load(slopes + (key + i) * W), first);
        store(to, adds ? load(to) + slope * q : slope * q);
        store(to + s.width, adds ? load(to + s.width) + weight * grad : weight * grad);
        sums[i % 2] += slope * load_bf16(of_k);
      }
    });
    store(r.grad_q + row + first, (sums[0] + sums[1]) * (scale * LN_2));
  }
}

#endif
