// A whole layer of the side network, forward and backward: side_block.
//
// A group of images at a time, so that its rows stay in the caches and fill the products.  Rows of a
// group, each of `width` floats and zeros up to 16: first the queries' tokens of all its images, then
// their other tokens, then their prompts; so that what only some rows need is a product of the first.
// The backward pass computes anew all but the attention's output.

// Rows of the group -> normed1, q and kv.
template <class Math>
static void side_project(const SideSizes& s, const SideGroup& g, const SidePacked<Math>& p,
                         const SideRows<Math>& r, bool backward) {
  for_each_run(s, g.images, const_cast<float*>(g.tokens), const_cast<float*>(g.prompts),
               [&](float* from, int64_t row, int64_t to, int64_t rows) {
                 rows_in(from + row * s.width, rows, s.width, r.seen + to * r.width);
               });
  normalise(r.seen, r.all, s.width, s.eps, p.norm1_weight, p.norm1_bias,
            backward ? r.standard1 : nullptr, r.inverse1, r.normed1);
  const auto normed = Math::ready(r.normed1, r.width, r.all, s.width, r.ready);
  Math::multiply(normed, r.queries, p.q.forward, s.width, {r.q, r.width, p.q.bias, 0});
  Math::multiply(normed, r.all, p.kv.forward, 2 * s.width, {r.kv, r.wide, p.kv.bias, 0});
}

// attended -> middle = tokens + proj, its norm, and the MLP's inner rows before their GELU.
template <class Math>
static void side_middle(const SideSizes& s, const SidePacked<Math>& p, const SideRows<Math>& r,
                        bool backward) {
  const auto attended = Math::ready(r.attended, r.width, r.queries, s.width, r.ready);
  Math::multiply(attended, r.queries, p.proj.forward, s.width, {r.middle, r.width, p.proj.bias, 0});
  add_to(r.seen, r.queries * r.width, r.middle);
  normalise(r.middle, r.queries, s.width, s.eps, p.norm2_weight, p.norm2_bias,
            backward ? r.standard2 : nullptr, r.inverse2, r.normed2);
  const auto normed = Math::ready(r.normed2, r.width, r.queries, s.width, r.ready);
  Math::multiply(normed, r.queries, p.fc1.forward, s.hidden, {r.inner, r.hidden, p.fc1.bias, 0});
}

template <class Math>
static void side_block_forward_of(const SideSizes& s, const SideGroup& g) {
  const SidePacked<Math> p(s, g.packed, g.packed_backward);
  const SideRows<Math> r(s, g.images, g.scratch, false);
  side_project(s, g, p, r, false);
  if (r.width != s.width) __builtin_memset(r.attended, 0, 4 * r.queries * r.width);
  s.width / s.heads <= 8 ? side_heads_of<8>(s, g, r) : side_heads_of<16>(s, g, r);
  rows_out(r.attended, r.queries, s.width, g.attended);
  side_middle(s, p, r, false);
  for (int64_t i = 0; i < r.queries * r.hidden; i += W)
    store(r.inner + i, gelu<Math::NARROW>(load(r.inner + i)));
  const auto inner = Math::ready(r.inner, r.hidden, r.queries, s.hidden, r.ready);
  Math::multiply(inner, r.queries, p.fc2.forward, s.width, {r.out, r.width, p.fc2.bias, 0});
  add_to(r.middle, r.queries * r.width, r.out);
  rows_out(r.out, r.queries, s.width, g.out);
}

// grad_out -> grad_middle, and the gradients of the MLP and its norm.
template <class Math>
static void side_mlp_backward(const SideSizes& s, const SideGroup& g, const SidePacked<Math>& p,
                              const SideRows<Math>& r, const SideSums& sums) {
  for (int64_t i = 0; i < r.queries * r.hidden; i += W) {
    const Gelu both = gelu_with_slope<Math::NARROW>(load(r.inner + i));
    store(r.inner + i, both.value);
    store(r.slopes + i, both.slope);
  }
  Math::outer(r.grad_out, r.width, s.width, r.inner, r.hidden, s.hidden, r.queries, r.outer,
              !g.first, sums.fc2);
  add_rows(r.grad_out, r.queries, r.width, sums.fc2_bias);
  const auto out = Math::ready(r.grad_out, r.width, r.queries, s.width, r.ready);
  Math::multiply(out, r.queries, p.fc2.backward, s.hidden, {r.grad_inner, r.hidden, nullptr, 0});
  for (int64_t i = 0; i < r.queries * r.hidden; i += W)
    store(r.grad_inner + i, load(r.grad_inner + i) * load(r.slopes + i));
  Math::outer(r.normed2, r.width, s.width, r.grad_inner, r.hidden, s.hidden, r.queries, r.outer,
              !g.first, sums.fc1);
  add_rows(r.grad_inner, r.queries, r.hidden, sums.fc1_bias);
  const auto inner = Math::ready(r.grad_inner, r.hidden, r.queries, s.hidden, r.ready);
  Math::multiply(inner, r.queries, p.fc1.backward, s.width, {r.grad_middle, r.width, nullptr, 0});
  normalise_backward(r.standard2, r.inverse2, p.norm2_weight, r.queries, s.width, r.grad_middle,
                     sums.norm2_weight, sums.norm2_bias);
  add_to(r.grad_out, r.queries * r.width, r.grad_middle);
}

// grad_middle -> grad_seen, and the gradients of the attention's maps and its norm.
template <class Math>
static void side_attention_half_backward(const SideSizes& s, const SideGroup& g,
                                         const SidePacked<Math>& p, const SideRows<Math>& r,
                                         const SideSums& sums) {
  Math::outer(r.attended, r.width, s.width, r.grad_middle, r.width, s.width, r.queries, r.outer,
              !g.first, sums.proj);
  add_rows(r.grad_middle, r.queries, r.width, sums.proj_bias);
  const auto middle = Math::ready(r.grad_middle, r.width, r.queries, s.width, r.ready);
  Math::multiply(middle, r.queries, p.proj.backward, s.width,
                 {r.grad_attended, r.width, nullptr, 0});
  if (r.width != s.width) __builtin_memset(r.grad_q, 0, 4 * r.queries * r.width);
  if (r.wide != 2 * s.width) __builtin_memset(r.grad_kv, 0, 4 * r.all * r.wide);
  s.width / s.heads <= 8 ? side_heads_backward_of<8>(s, g, r) : side_heads_backward_of<16>(s, g, r);
  Math::outer(r.normed1, r.width, s.width, r.grad_q, r.width, s.width, r.queries, r.outer, !g.first,
              sums.q);
  Math::outer(r.normed1, r.width, s.width, r.grad_kv, r.wide, 2 * s.width, r.all, r.outer, !g.first,
              sums.kv);
  add_rows(r.grad_q, r.queries, r.width, sums.q_bias);
  add_rows(r.grad_kv, r.all, r.wide, sums.kv_bias);
  const auto kv = Math::ready(r.grad_kv, r.wide, r.all, 2 * s.width, r.ready);
  Math::multiply(kv, r.all, p.kv.backward, s.width, {r.grad_seen, r.width, nullptr, 0});
  const auto q = Math::ready(r.grad_q, r.width, r.queries, s.width, r.ready);
  Math::multiply(q, r.queries, p.q.backward, s.width, {r.grad_attended, r.width, nullptr, 0});
  add_to(r.grad_attended, r.queries * r.width, r.grad_seen);
  normalise_backward(r.standard1, r.inverse1, p.norm1_weight, r.all, s.width, r.grad_seen,
                     sums.norm1_weight, sums.norm1_bias);
  add_to(r.grad_middle, r.queries * r.width, r.grad_seen);
}

template <class Math>
static void side_block_backward_of(const SideSizes& s, const SideGroup& g) {
  const SidePacked<Math> p(s, g.packed, true);
  const SideRows<Math> r(s, g.images, g.scratch, true);
  const SideSums sums(s, g.sums);
  if (g.first) __builtin_memset(g.sums + sums.matrices, 0, 4 * (sums.count - sums.matrices));
  side_project(s, g, p, r, true);
  rows_in(g.attended, r.queries, s.width, r.attended);
  rows_in(g.out, r.queries, s.width, r.grad_out);
  side_middle(s, p, r, true);
  side_mlp_backward(s, g, p, r, sums);
  side_attention_half_backward(s, g, p, r, sums);
  for_each_run(s, g.images, g.grad_tokens, g.grad_prompts,
               [&](float* to, int64_t row, int64_t from, int64_t rows) {
                 rows_out(r.grad_seen + from * r.width, rows, s.width, to + row * s.width);
               });
}

// The padded [in, out] -> [out, in].
static void write_turned(const float* from, int64_t in, int64_t out, float* to) {
  const int64_t stride = padded(out);
  for (int64_t first = 0; first < out; first += 16)
    for (int64_t row = 0; row < in; row += 16) {
      const int64_t rows = in - row < 16 ? in - row : 16;
      const int64_t columns = out - first < 16 ? out - first : 16;
#if FPT_WIDTH == 16
      F block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] = i < rows ? load(from + (row + i) * stride + first) : F{};
      transpose(block);
      const __mmask16 wanted = __mmask16((1u << rows) - 1);
      for (int64_t o = 0; o < columns; ++o)
        _mm512_mask_storeu_ps(to + (first + o) * in + row, wanted, (__m512)block[o]);
#else
      for (int64_t i = row; i < row + rows; ++i)
        for (int64_t o = first; o < first + columns; ++o) to[o * in + i] = from[i * stride + o];
#endif
    }
}

static void write_vector(const float* from, int64_t count, float* to) {
  __builtin_memcpy(to, from, 4 * count);
}

static void side_gradients(const SideSizes& s, float* base, const SideWeightGradients& to) {
  const SideSums sums(s, base);
  const int64_t width = s.width;
  write_vector(sums.norm1_weight, width, to.norm1);
  write_vector(sums.norm1_bias, width, to.norm1_bias);
  write_turned(sums.q, width, width, to.qkv);
  write_turned(sums.kv, width, 2 * width, to.qkv + width * width);
  write_vector(sums.q_bias, width, to.qkv_bias);
  write_vector(sums.kv_bias, 2 * width, to.qkv_bias + width);
  write_turned(sums.proj, width, width, to.proj);
  write_vector(sums.proj_bias, width, to.proj_bias);
  write_vector(sums.norm2_weight, width, to.norm2);
  write_vector(sums.norm2_bias, width, to.norm2_bias);
  write_turned(sums.fc1, width, s.hidden, to.fc1);
  write_vector(sums.fc1_bias, s.hidden, to.fc1_bias);
  rows_out(sums.fc2, width, s.hidden, to.fc2);
  write_vector(sums.fc2_bias, width, to.fc2_bias);
}

// base [shares, count]: the sum of all shares, in their order, to the first.
static void side_add_shares(float* base, int64_t count, int64_t shares, int64_t first,
                            int64_t end) {
  for (int64_t share = 1; share < shares; ++share)
    add_to(base + share * count + first, end - first, base + first);
}

#if FPT_AMX
using SideFloats = Parts<3>;
#else
using SideFloats = Floats;
#endif
#if FPT_BF16
using SideNarrow = Parts<1>;
#else
using SideNarrow = Floats;
#endif

static SideNeeds side_needs(const SideSizes& s, int64_t images, bool backward) {
  const auto of = [&]<class Math>(Math) -> SideNeeds {
    return {SidePacked<Math>(s, nullptr, backward).bytes,
            SideRows<Math>(s, images, nullptr, backward).bytes, SideSums(s, nullptr).count};
  };
  return s.narrow ? of(SideNarrow{}) : of(SideFloats{});
}

static void side_pack(const SideSizes& s, const SideWeights& weights, bool backward, void* to) {
  s.narrow ? pack_side_of<SideNarrow>(s, weights, backward, to)
           : pack_side_of<SideFloats>(s, weights, backward, to);
}

static void side_block_forward(const SideSizes& s, const SideGroup& group) {
#if FPT_AMX
  const Tiles tiles;
#endif
  s.narrow ? side_block_forward_of<SideNarrow>(s, group)
           : side_block_forward_of<SideFloats>(s, group);
}

static void side_block_backward(const SideSizes& s, const SideGroup& group) {
#if FPT_AMX
  const Tiles tiles;
#endif
  s.narrow ? side_block_backward_of<SideNarrow>(s, group)
           : side_block_backward_of<SideFloats>(s, group);
}
