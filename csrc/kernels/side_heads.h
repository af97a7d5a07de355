// The attention of a group's images, head by head: packed, attended to, and back to their rows.

template <int DP, class Math>
static PackedHead pack_side_head(const SideSizes& s, const SideGroup& g, const SideRows<Math>& r,
                                 int64_t image, int64_t head, const SideHead<DP>& to) {
  const int64_t narrow = s.width / s.heads;
  const float* q = r.q + image * s.queries * r.width + head * narrow;
  pack_rows<DP>({q, r.width, 1}, s.queries, narrow, root_scale(narrow), to.q);
  for_each_key_run(s, g.images, image, [&](int64_t row, int64_t rows, int64_t first) {
    const float* k = r.kv + row * r.wide + head * narrow;
    pack_rows<DP>({k, r.wide, 1}, rows, narrow, 1.0f, to.k + first * DP);
    pack_rows<DP>({k + s.width, r.wide, 1}, rows, narrow, 1.0f, to.v + first * DP);
  });
  pad_rows<DP>(s.queries, to.q);
  pad_rows<DP>(s.tokens + s.prompts, to.k);
  pad_rows<DP>(s.tokens + s.prompts, to.v);
  const int64_t at = (image * s.heads + head) * s.queries;
  return {to.q, to.k, to.v, s.queries, s.tokens + s.prompts, narrow, g.tops + at, g.shares + at};
}

// Packed rows, `from_stride` apart, -> the first `width` channels of rows of the group; or added to
// what is there, where a head has DP.
template <int DP, bool ADDS>
static void unpack_rows_of_head(const float* from, int64_t from_stride, int64_t rows, int64_t width,
                                float* to, int64_t stride) {
  typedef float Row __attribute__((vector_size(4 * DP), aligned(4), may_alias));
  for (int64_t i = 0; i < rows; ++i, from += from_stride, to += stride) {
    if (i % 32 == 31) keep_awake<0, 2, 3>();
    const Row& row = *reinterpret_cast<const Row*>(from);
    if (ADDS) *reinterpret_cast<Row*>(to) += row;
    else if (width == DP) *reinterpret_cast<Row*>(to) = row;
    else __builtin_memcpy(to, from, 4 * width);
  }
}

template <int DP, bool ADDS = false, class Math>
static void side_keys_out(const SideSizes& s, const SideGroup& g, const SideRows<Math>& r,
                          int64_t image, int64_t head, const float* grad_k, const float* grad_v,
                          int64_t stride) {
  const int64_t narrow = s.width / s.heads;
  for_each_key_run(s, g.images, image, [&](int64_t row, int64_t rows, int64_t first) {
    float* to = r.grad_kv + row * r.wide + head * narrow;
    unpack_rows_of_head<DP, ADDS>(grad_k + first * stride, stride, rows, narrow, to, r.wide);
    unpack_rows_of_head<DP, ADDS>(grad_v + first * stride, stride, rows, narrow, to + s.width, r.wide);
  });
}

template <int DP, class Math>
static void side_heads_of(const SideSizes& s, const SideGroup& g, const SideRows<Math>& r) {
  const SideHead<DP> packed(s, r.heads);
  for (int64_t image = 0; image < g.images; ++image)
    for (int64_t head = 0; head < s.heads; ++head) {
      const PackedHead task = pack_side_head<DP>(s, g, r, image, head, packed);
      float* out = r.attended + image * s.queries * r.width + head * task.width;
      attend_packed<DP>(task, packed.work, out, r.width);
    }
}

template <int DP, class Math>
static void side_heads_backward_of(const SideSizes& s, const SideGroup& g,
                                   const SideRows<Math>& r) {
  const SideHead<DP> packed(s, r.heads);
  const float scale = root_scale(s.width / s.heads);
  for (int64_t image = 0; image < g.images; ++image)
    for (int64_t head = 0; head < s.heads; ++head) {
      const PackedHead task = pack_side_head<DP>(s, g, r, image, head, packed);
      const int64_t at = image * s.queries * r.width + head * task.width;
      pack_rows<DP>({r.grad_attended + at, r.width, 1}, s.queries, task.width, 1.0f, packed.grads);
      pack_rows<DP>({r.attended + at, r.width, 1}, s.queries, task.width, 1.0f, packed.grad_q);
      const PackedGradient of_head{packed.grads, packed.grad_q, packed.grad_k, packed.grad_v,
                                   task.width};
      attend_packed_backward<DP>(task, of_head, packed.work);
      for (int64_t i = 0; i < s.queries; ++i)
        for (int64_t d = 0; d < task.width; ++d)
          r.grad_q[at + i * r.width + d] = packed.grad_q[i * DP + d] * scale;
      side_keys_out<DP>(s, g, r, image, head, packed.grad_k, packed.grad_v, task.width);
    }
}

#if FPT_AMX

// The same where products are of bf16: what the tiles read is made of all heads of an image at once.

static void zero_rows(uint16_t* rows, int64_t first, int64_t end, int64_t channels) {
  __builtin_memset(rows + first * channels, 0, 2 * (end - first) * channels);
}

template <int DP, class Math>
static void round_keys(const SideSizes& s, const SideGroup& g, const SideRows<Math>& r,
                       int64_t image, int64_t column, float scale, const TiledHeads<DP>& h,
                       uint16_t* to) {
  for_each_key_run(s, g.images, image, [&](int64_t row, int64_t rows, int64_t first) {
    round_heads<DP>(r.kv + row * r.wide + column, r.wide, rows, s, scale, h.channels,
                    to + first * h.channels);
  });
  zero_rows(to, s.tokens + s.prompts, h.keys, h.channels);
}

template <int DP>
static void round_queries(const SideSizes& s, const float* from, int64_t stride, float scale,
                          const TiledHeads<DP>& h, uint16_t* to) {
  round_heads<DP>(from, stride, s.queries, s, scale, h.channels, to);
  zero_rows(to, s.queries, h.queries, h.channels);
}

// `queries` of them by tiles.
static TiledTask tiled_task(const SideSizes& s, const SideGroup& g, int64_t image, int64_t head,
                            int64_t queries) {
  const int64_t at = (image * s.heads + head) * s.queries;
  return {queries, s.tokens + s.prompts, s.width / s.heads, g.tops + at, g.shares + at};
}

template <int DP>
static void side_heads_of(const SideSizes& s, const SideGroup& g, const SideRows<Parts<1>>& r) {
  const SideSizes tiled = tiled_sizes<DP>(s);
  const TiledHeads<DP> h(tiled, r.heads);
  const int64_t narrow = s.width / s.heads;
  for (int64_t image = 0; image < g.images; ++image) {
    const int64_t first = image * s.queries * r.width;
    round_keys(s, g, r, image, 0, LOG2_E, h, h.key_rows);
    for (int64_t row = tiled.queries; row < s.queries; ++row) attend_single(s, g, r, h, image, row);
    if (tiled.queries == 0) continue;
    set_tiles(head_shapes<DP>());
    round_queries(tiled, r.q + first, r.width, root_scale(narrow), h, h.q_rows);
    round_keys(s, g, r, image, s.width, 1.0f, h, h.value_rows);
    pair_channels(h.q_rows, h.queries, h.channels, h.q_lanes);
    turn_rows(h.value_rows, h.keys, h.channels, h.key_pairs, h.turned);
    for (int64_t head = 0; head < s.heads; ++head)
      attend_tiled<DP>(h.head(head), tiled_task(s, g, image, head, tiled.queries),
                       r.attended + first + head * narrow, r.width);
    set_tiles({});
  }
}

// All that the heads' backward reads, of the queries by tiles.
template <int DP>
static void lay_out_heads(const SideSizes& tiled, const SideRows<Parts<1>>& r, int64_t first,
                          const TiledHeads<DP>& h) {
  const int64_t narrow = tiled.width / tiled.heads;
  round_queries(tiled, r.q + first, r.width, root_scale(narrow), h, h.q_rows);
  round_queries(tiled, r.grad_attended + first, r.width, 1.0f, h, h.grad_rows);
  pair_channels(h.q_rows, h.queries, h.channels, h.q_lanes);
  pair_channels(h.grad_rows, h.queries, h.channels, h.grad_lanes);
  pair_rows(h.q_rows, h.queries, h.channels, h.q_pairs);
  pair_rows(h.grad_rows, h.queries, h.channels, h.grad_pairs);
  turn_rows(h.key_rows, h.keys, h.channels, h.key_pairs, h.turned);
  minus_means_of(tiled, r.attended + first, r.grad_attended + first, r.width, h);
}

template <int DP>
static void side_heads_backward_of(const SideSizes& s, const SideGroup& g,
                                   const SideRows<Parts<1>>& r) {
  const SideSizes tiled = tiled_sizes<DP>(s);
  const TiledHeads<DP> h(tiled, r.heads);
  const int64_t narrow = s.width / s.heads;
  for (int64_t image = 0; image < g.images; ++image) {
    const int64_t first = image * s.queries * r.width;
    round_keys(s, g, r, image, 0, LOG2_E, h, h.key_rows);
    round_keys(s, g, r, image, s.width, 1.0f, h, h.value_rows);
    for (int64_t row = tiled.queries; row < s.queries; ++row)
      attend_single_backward(s, g, r, h, image, row, row > tiled.queries);
    if (tiled.queries == 0) continue;
    set_tiles(head_shapes<DP>());
    lay_out_heads(tiled, r, first, h);
    for (int64_t head = 0; head < s.heads; ++head) {
      attend_tiled_backward<DP>(h.head(head), tiled_task(s, g, image, head, tiled.queries),
                                r.grad_q + first + head * narrow, r.width);
      tiled.queries < s.queries
          ? side_keys_out<DP, true>(s, g, r, image, head, h.grad_k, h.grad_v, DP)
          : side_keys_out<DP>(s, g, r, image, head, h.grad_k, h.grad_v, DP);
    }
    set_tiles({});
  }
}

#endif
