// A whole layer of the side network, forward and backward, for side_layers.
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

// attended -> middle = tokens + proj, and its norm.
template <class Math>
static void side_middle(const SideSizes& s, const SidePacked<Math>& p, const SideRows<Math>& r,
                        bool backward) {
  const auto attended = Math::ready(r.attended, r.width, r.queries, s.width, r.ready);
  Math::multiply(attended, r.queries, p.proj.forward, s.width, {r.middle, r.width, p.proj.bias, 0});
  add_to(r.seen, r.queries * r.width, r.middle);
  normalise(r.middle, r.queries, s.width, s.eps, p.norm2_weight, p.norm2_bias,
            backward ? r.standard2 : nullptr, r.inverse2, r.normed2);
}

template <class Math>
static void side_block_forward_of(const SideSizes& s, const SideGroup& g) {
  const SidePacked<Math> p(s, g.packed, g.packed_backward);
  SideRows<Math> r(s, g.images, g.scratch, false);
  const bool whole = r.width == s.width;  // the images' rows are as the group's: no copies
  if (whole) r.attended = g.attended;
  side_project(s, g, p, r, false);
  if (!whole) __builtin_memset(r.attended, 0, 4 * r.queries * r.width);
  s.width / s.heads <= 8 ? side_heads_of<8>(s, g, r) : side_heads_of<16>(s, g, r);
  if (!whole) rows_out(r.attended, r.queries, s.width, g.attended);
  side_middle(s, p, r, false);
  const auto inner = side_inner(s, p, r);
  Math::multiply(inner, r.queries, p.fc2.forward, s.width, {r.out, r.width, p.fc2.bias, 0});
  add_to(r.middle, r.queries * r.width, r.out);
  rows_out(r.out, r.queries, s.width, g.out);
}

// grad_out -> grad_middle, and the gradients of the MLP and its norm.
template <class Math>
static void side_mlp_backward(const SideSizes& s, const SideGroup& g, const SidePacked<Math>& p,
                              const SideRows<Math>& r, const SideSums& sums,
                              const SideFactors<Math>& f) {
  const auto kept = [&](const float* rows) {
    return f.rows_of(g.round, g.number, f.fc1, rows, r.width, r.queries, s.queries);
  };
  Math::keep_left(kept(r.grad_out), f.fc2.deep, f.tall, f.fc2.left);
  Math::keep_left(kept(r.normed2), f.fc1.deep, f.tall, f.fc1.left);
  add_rows(r.grad_out, r.queries, r.width, sums.fc2_bias);
  const auto inner = side_inner_backward(s, g, p, r, sums, f);
  Math::multiply(inner, r.queries, p.fc1.backward, s.width, {r.grad_middle, r.width, nullptr, 0});
  normalise_backward(r.standard2, r.inverse2, p.norm2_weight, r.queries, s.width, r.grad_middle,
                     sums.norm2_weight, sums.norm2_bias);
  add_to(r.grad_out, r.queries * r.width, r.grad_middle);
}

// grad_middle -> grad_seen, and the gradients of the attention's maps and its norm.
template <class Math>
static void side_attention_half_backward(const SideSizes& s, const SideGroup& g,
                                         const SidePacked<Math>& p, const SideRows<Math>& r,
                                         const SideSums& sums, const SideFactors<Math>& f) {
  const auto kept = [&](const auto& p, const float* rows, int64_t stride, int64_t count,
                        int64_t of_image) {
    return f.rows_of(g.round, g.number, p, rows, stride, count, of_image);
  };
  Math::keep_left(kept(f.proj, r.attended, r.width, r.queries, s.queries), f.proj.deep, f.tall,
                  f.proj.left);
  Math::keep_right(kept(f.proj, r.grad_middle, r.width, r.queries, s.queries), f.proj.deep,
                   f.proj.wide, 0, f.proj.right);
  add_rows(r.grad_middle, r.queries, r.width, sums.proj_bias);
  const auto middle = Math::ready(r.grad_middle, r.width, r.queries, s.width, r.ready);
  Math::multiply(middle, r.queries, p.proj.backward, s.width,
                 {r.grad_attended, r.width, nullptr, 0});
  s.width / s.heads <= 8 ? side_heads_backward_of<8>(s, g, r) : side_heads_backward_of<16>(s, g, r);
  const int64_t seen = s.tokens + s.prompts;
  Math::keep_left(kept(f.qkv, r.normed1, r.width, r.all, seen), f.qkv.deep, f.tall, f.qkv.left);
  Math::keep_right(kept(f.qkv, r.grad_q, r.width, r.queries, seen), f.qkv.deep, f.qkv.wide, 0,
                   f.qkv.right);
  Math::keep_right(kept(f.qkv, r.grad_kv, r.wide, r.all, seen), f.qkv.deep, f.qkv.wide, r.width,
                   f.qkv.right);
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
  SideRows<Math> r(s, g.images, g.scratch, true);
  const SideSums sums(s, nullptr, g.vectors);
  const SideFactors<Math> f(s, g.round, g.round.factors);
  __builtin_memset(g.vectors, 0, 4 * sums.vectors);
  if (r.width == s.width) {
    r.attended = g.attended, r.grad_out = g.out;
  } else {
    rows_in(g.attended, r.queries, s.width, r.attended);
    rows_in(g.out, r.queries, s.width, r.grad_out);
  }
  side_project(s, g, p, r, true);
  side_middle(s, p, r, true);
  side_mlp_backward(s, g, p, r, sums, f);
  side_attention_half_backward(s, g, p, r, sums, f);
  for_each_run(s, g.images, g.grad_tokens, g.grad_prompts,
               [&](float* to, int64_t row, int64_t from, int64_t rows) {
                 rows_out(r.grad_seen + from * r.width, rows, s.width, to + row * s.width);
               });
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

static SideNeeds side_needs(const SideSizes& s, const SideRound& round, bool backward) {
  const auto of = [&]<class Math>(Math) -> SideNeeds {
    const SideSums sums(s, nullptr, nullptr);
    return {SidePacked<Math>(s, nullptr, backward).bytes,
            SideRows<Math>(s, round.images, nullptr, backward).bytes,
            SideFactors<Math>(s, round, nullptr).bytes, sums.matrices, sums.vectors,
            factor_tasks(s)};
  };
  return s.narrow ? of(SideNarrow{}) : of(SideFloats{});
}

static void side_pack(const SideSizes& s, const SideWeights& weights, bool backward, int64_t map,
                      void* to) {
  s.narrow ? pack_side_of<SideNarrow>(s, weights, backward, map, to)
           : pack_side_of<SideFloats>(s, weights, backward, map, to);
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

static void side_multiply_factors(const SideSizes& s, const SideRound& round, int64_t first,
                                  int64_t end, float* sums, const SideWeightGradients* to) {
#if FPT_AMX
  const Tiles tiles;
#endif
  s.narrow ? multiply_factors_of<SideNarrow>(s, round, first, end, sums, to)
           : multiply_factors_of<SideFloats>(s, round, first, end, sums, to);
}
