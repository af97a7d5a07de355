// attention.h for bf16 in tile registers: 32 queries against up to 384 keys at a time.
//
// Logits of a block stay in the first caches, and so do its weights.  A row's reference, which is
// taken off its logits, is the highest of the blocks so far; where it rises, the row's sums shrink.
// Exponents have the base 2: 1 / ln 2 goes into the scale.  Weights stay in f32 until all blocks of
// the row are there only if column sums are wanted, since those need the row's whole sum.

#if FPT_AMX

// Logits, unscaled, of 32 queries and a chunk of 32 tokens: [2 of queries][2 of tokens] tiles.
FPT_INLINE void multiply_keys(const TileScratch& s, int64_t chunk, float* to) {
  const uint32_t* keys = s.keys + chunk * 2 * s.depth * FLOATS;
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t d = 0; d < s.depth; ++d) {
    tile_load<4>(s.queries + d * FLOATS, 64);
    tile_load<5>(s.queries + (s.depth + d) * FLOATS, 64);
    tile_load<6>(keys + d * FLOATS, 64);
    tile_load<7>(keys + (s.depth + d) * FLOATS, 64);
    tile_product<0, 4, 6>();
    tile_product<1, 4, 7>();
    tile_product<2, 5, 6>();
    tile_product<3, 5, 7>();
  }
  tile_store<0>(to, 64);
  tile_store<1>(to + FLOATS, 64);
  tile_store<2>(to + 2 * FLOATS, 64);
  tile_store<3>(to + 3 * FLOATS, 64);
}

// Tokens that are only padding get no weight.
static void mask_chunk(int64_t tokens, float* logits) {
  const F nothing = splat(-__builtin_inff());
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t there = tokens - half * SIDE;
    if (there >= SIDE) continue;
    const __mmask16 padding = there > 0 ? 0xffffu << there : 0xffffu;
    for (int64_t i = 0; i < SIDE; ++i)
      for (int64_t group = 0; group < 2; ++group)
        _mm512_mask_storeu_ps(logits + ((group * 2 + half) * SIDE + i) * SIDE, padding,
                              (__m512)nothing);
  }
}

// 2^x to about one unit in the last place, for any x.  The polynomial has the least largest
// relative error on [0, 1) of those that are 1 at 0.
FPT_INLINE F power_of_two(F x) {
  const F r = (F)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 9);  // x - floor(x); of an infinity: 0
  F p = splat(1.86713017e-3f);
  p = p * r + splat(9.01702978e-3f);
  p = p * r + splat(5.57999127e-2f);
  p = p * r + splat(2.40164444e-1f);
  p = p * r + splat(6.93151295e-1f);
  p = p * r + splat(1.0f);
  return (F)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
}

// The same to 9e-5 of it, which is enough for what is rounded to bf16.
FPT_INLINE F rough_power_of_two(F x) {
  const F r = (F)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 9);
  F p = splat(7.7067240e-2f);
  p = p * r + splat(2.2764498e-1f);
  p = p * r + splat(6.9511663e-1f);
  p = p * r + splat(1.0f);
  return (F)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
}

template <bool MAX>
FPT_INLINE F join(F a, F b) {
  return MAX ? (F)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b) : a + b;
}

// Lane i becomes the maximum or the sum of the lanes of vector i.
template <bool MAX>
FPT_INLINE F reduce_rows(F* rows) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int apart = 1; apart < SIDE; apart *= 2) {
    const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(apart));
    const __m512i same = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16));
    const __m512i other = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(apart)),
                                                upper, lane, _mm512_set1_epi32(16 - apart));
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i += 2 * apart) {
      const __m512 a = (__m512)rows[i], b = (__m512)rows[i + apart];
      rows[i] = join<MAX>((F)_mm512_permutex2var_ps(a, same, b),
                          (F)_mm512_permutex2var_ps(a, other, b));
    }
  }
  return rows[0];
}

// The highest logit of each of 16 rows; a NaN may be passed over, and comes out in the weights.
FPT_INLINE F highest_of_rows(const float* logits, int64_t chunks) {
  F highest[SIDE];
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) highest[i] = load(logits + i * SIDE);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 16
      for (int i = 0; i < SIDE; ++i)
        highest[i] = join<true>(load(logits + chunk * LOGITS + half * FLOATS + i * SIDE),
                                highest[i]);
  return reduce_rows<true>(highest);
}

// Logits of 16 rows become weights, in bf16 where the output is WANTED and in f32 where they are
// KEPT; returns the rows' sums.
template <bool WANTED, bool KEPT>
static F exponentiate_rows(float* logits, int64_t chunks, float scale, const float* tops,
                           uint32_t* weights) {
  F sums[SIDE];
  for (int i = 0; i < SIDE; ++i) {
    const F top = splat(tops[i]);
    F even{}, odd{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float* at = logits + chunk * LOGITS + i * SIDE;
      const F first = power_of_two(load(at) * splat(scale) - top);
      const F second = power_of_two(load(at + FLOATS) * splat(scale) - top);
      even += first;
      odd += second;
      if (WANTED)
        _mm512_store_si512(weights + chunk * WEIGHTS + i * SIDE,
                           (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
      if (KEPT) {
        store(at, first);
        store(at + FLOATS, second);
      }
    }
    sums[i] = even + odd;
  }
  return reduce_rows<false>(sums);
}

// out += weights times the values of a block; two tiles of channels at a time.
static void multiply_values(const TileScratch& s, int64_t first, int64_t chunks) {
  const int64_t tiles = 2 * s.depth;
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    float* out = s.out + tile * 2 * FLOATS;  // [2 of queries][2 of channels]
    const uint32_t* values = s.values + (first * tiles + tile) * FLOATS;
    tile_load<0>(out, 64);
    tile_load<1>(out + FLOATS, 64);
    tile_load<2>(out + 2 * FLOATS, 64);
    tile_load<3>(out + 3 * FLOATS, 64);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      tile_load<4>(s.weights + chunk * WEIGHTS, 64);
      tile_load<5>(s.weights + chunk * WEIGHTS + FLOATS, 64);
      tile_load<6>(values + chunk * tiles * FLOATS, 64);
      tile_load<7>(values + (chunk * tiles + 1) * FLOATS, 64);
      tile_product<0, 4, 6>();
      tile_product<1, 4, 7>();
      tile_product<2, 5, 6>();
      tile_product<3, 5, 7>();
    }
    tile_store<0>(out, 64);
    tile_store<1>(out + FLOATS, 64);
    tile_store<2>(out + 2 * FLOATS, 64);
    tile_store<3>(out + 3 * FLOATS, 64);
  }
}

// The reference and the sum of 16 rows, lane by lane.
struct RowSums {
  F top, sum;
};

// One block of tokens for the 16 rows of a group: weights, and what was summed up so far, rescaled.
template <bool WANTED, bool KEPT>
static void weigh_group(const TileScratch& s, int64_t group, float* logits, int64_t chunks,
                        float scale, float* tops, RowSums& rows) {
  const F before = rows.top;
  rows.top = join<true>(highest_of_rows(logits, chunks) * splat(scale), before);
  store(tops, rows.top);
  const F shrink = power_of_two(before - rows.top);
  const F sums =
      exponentiate_rows<WANTED, KEPT>(logits, chunks, scale, tops, s.weights + group * FLOATS);
  rows.sum = rows.sum * shrink + sums;
  if (!WANTED || !_mm512_cmp_ps_mask((__m512)shrink, (__m512)splat(1.0f), _CMP_NEQ_UQ)) return;
  float factors[SIDE];
  store(factors, shrink);
  for (int64_t tile = 0; tile < 2 * s.depth; ++tile) {
    float* out = s.out + (tile / 2 * 4 + group * 2 + tile % 2) * FLOATS;
    for (int i = 0; i < SIDE; ++i) store(out + i * SIDE, load(out + i * SIDE) * splat(factors[i]));
  }
}

// Adds the kept weights of a block, times a factor for each of `count` queries.
static void add_kept(const float* weights, int64_t chunks, const float* factors, int64_t count,
                     float* columns) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t half = 0; half < 2; ++half) {
      const float* at = weights + chunk * LOGITS + half * FLOATS;
      F even{}, odd{};
      for (int64_t i = 0; i + 1 < count; i += 2) {
        even += load(at + i * SIDE) * splat(factors[i]);
        odd += load(at + (i + 1) * SIDE) * splat(factors[i + 1]);
      }
      if (count % 2) even += load(at + (count - 1) * SIDE) * splat(factors[count - 1]);
      float* to = columns + chunk * CHUNK + half * SIDE;
      store(to, load(to) + (even + odd));
    }
}

static void write_group(const AttentionTask& task, const TileScratch& s, int64_t first,
                        int64_t group, int64_t count, const float* inverse) {
  auto* row = reinterpret_cast<float*>(s.rows);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t tile = 0; tile < 2 * s.depth; ++tile)
      store(row + tile * SIDE,
            load(s.out + (tile / 2 * 4 + group * 2 + tile % 2) * FLOATS + i * SIDE));
    write_row(task, first + i, row, inverse[i]);
  }
}

// What is left to do with 16 rows once all tokens are summed up.
static void finish_group(const AttentionTask& task, const TileScratch& s, int64_t first,
                         int64_t group, const RowSums& rows) {
  const int64_t count = task.rows - first < SIDE ? task.rows - first : SIDE;
  const F inverse = splat(1.0f) / rows.sum;
  float numbers[SIDE], sums[SIDE];
  if (task.lse) {
    store(sums, rows.sum);
    store(numbers, rows.top * splat(LN_2));
    for (int64_t i = 0; i < count; ++i) task.lse[first + i] = numbers[i] + __builtin_logf(sums[i]);
  }
  store(numbers, inverse);
  if (task.v.data) write_group(task, s, first, group, count, numbers);
  if (!task.columns) return;
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t chunk = s.first_chunk(block), chunks = s.first_chunk(block + 1) - chunk;
    store(numbers, power_of_two(load(s.tops + block * QUERIES + group * SIDE) - rows.top) * inverse);
    add_kept(s.logits + chunk * LOGITS + group * 2 * FLOATS, chunks, numbers, count,
             s.columns + chunk * CHUNK);
  }
}

// 32 queries from `first`, or what there is of them, against all tokens.
template <bool WANTED, bool KEPT>
static void attend_queries(const AttentionTask& task, const TileScratch& s, int64_t first) {
  const int64_t groups = task.rows - first > SIDE ? 2 : 1;
  RowSums rows[2] = {{splat(-3e38f), F{}}, {splat(-3e38f), F{}}};
  pack_queries(task, s, first);
  if (WANTED) __builtin_memset(s.out, 0, 4 * 4 * s.depth * FLOATS);
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t chunk = s.first_chunk(block), chunks = s.first_chunk(block + 1) - chunk;
    float* logits = s.logits + (KEPT ? chunk * LOGITS : 0);
    for (int64_t i = 0; i < chunks; ++i) multiply_keys(s, chunk + i, logits + i * LOGITS);
    if (block == s.blocks - 1)
      mask_chunk(task.tokens - (s.chunks - 1) * CHUNK, logits + (chunks - 1) * LOGITS);
    for (int64_t group = 0; group < groups; ++group)
      weigh_group<WANTED, KEPT>(s, group, logits + group * 2 * FLOATS, chunks, task.scale * LOG2_E,
                                s.tops + block * QUERIES + group * SIDE, rows[group]);
    if (WANTED) multiply_values(s, chunk, chunks);
  }
  for (int64_t group = 0; group < groups; ++group)
    finish_group(task, s, first + group * SIDE, group, rows[group]);
}

// Column sums of 32 queries whose row log-sum-exp is known.
static void add_known(const AttentionTask& task, const TileScratch& s, int64_t first) {
  const int64_t count = task.rows - first < QUERIES ? task.rows - first : QUERIES;
  float known[QUERIES];
  for (int64_t i = 0; i < count; ++i) known[i] = task.known_lse[first + i] * LOG2_E;
  const float scale = task.scale * LOG2_E;
  pack_queries(task, s, first);
  for (int64_t chunk = 0; chunk <= s.chunks; ++chunk) {
    // The products of a chunk run beside the exponentials of the one before.
    if (chunk < s.chunks) multiply_keys(s, chunk, s.logits + chunk % 2 * LOGITS);
    if (chunk == 0) continue;
    const float* logits = s.logits + (chunk - 1) % 2 * LOGITS;
    F first_half{}, second_half{};
    for (int64_t i = 0; i < count; ++i) {
      const float* at = logits + (i / SIDE * 2 * SIDE + i % SIDE) * SIDE;
      first_half += power_of_two(load(at) * splat(scale) - splat(known[i]));
      second_half += power_of_two(load(at + FLOATS) * splat(scale) - splat(known[i]));
    }
    float* to = s.columns + (chunk - 1) * CHUNK;
    store(to, load(to) + first_half);
    store(to + SIDE, load(to + SIDE) + second_half);
  }
}

static void attend_in_tiles(const AttentionTask& task) {
  const TileScratch s(task);
  const Tiles tiles;
  __builtin_memset(s.columns, 0, 4 * s.chunks * CHUNK);
  for (int64_t first = 0; first < task.rows; first += QUERIES) {
    if (task.known_lse) add_known(task, s, first);
    else if (!task.v.data) attend_queries<false, true>(task, s, first);
    else if (s.kept) attend_queries<true, true>(task, s, first);
    else attend_queries<true, false>(task, s, first);
  }
  if (task.columns) __builtin_memcpy(task.columns, s.columns, 4 * task.tokens);
}

static void pack_in_tiles(const AttentionTask& task) {
  const TileScratch s(task);
  pack_keys(task, s);
  if (task.v.data) pack_values(task, s);
}

#endif
