// Attention of a narrow head, forward and backward, in f32: side_attention.
//
// A head of 8 or 16 channels is too narrow to be a lane's axis, and its products too short for a
// library of matrix products.  Forward, a lane is a query; backward, a lane is a key, so that sums
// over the tokens stay in their lanes.  Rows are packed to DP channels, zeros where there is none.

// Floats of scratch of one head, whatever its direction.
static int64_t side_scratch(int64_t queries, int64_t tokens) {
  return (64 + 2 * W) * (up_to(queries, W) + up_to(tokens, W)) + 128 * W;
}

// Rows -> rows of DP floats, scaled; one that is as wide as DP is one vector.
template <int DP>
static void pack_rows(const Matrix& from, int64_t rows, int64_t width, float scale, float* to) {
  typedef float Row __attribute__((vector_size(4 * DP), aligned(4), may_alias));
  const auto* data = static_cast<const float*>(from.data);
  const bool whole = width == DP && from.column_stride == 1;
  for (int64_t t = 0; t < rows; ++t, data += from.row_stride) {
    if (whole) {
      *reinterpret_cast<Row*>(to + t * DP) = *reinterpret_cast<const Row*>(data) * scale;
      continue;
    }
    for (int64_t d = 0; d < DP; ++d)
      to[t * DP + d] = d < width ? data[d * from.column_stride] * scale : 0.0f;
  }
}

// Zeros up to whole vectors of rows.
template <int DP>
static void pad_rows(int64_t rows, float* to) {
  __builtin_memset(to + rows * DP, 0, 4 * DP * (up_to(rows, W) - rows));
}

// W packed rows -> [DP, lanes].
template <int DP>
static void rows_to_lanes(const float* rows, float* to) {
#if FPT_WIDTH == 16
  F block[W];
  for (int p = 0; p < W; ++p)
    block[p] = as_float((U)_mm512_maskz_loadu_epi32(DP == 8 ? 0xff : 0xffff, rows + p * DP));
  transpose(block);
  for (int d = 0; d < DP; ++d) store(to + d * W, block[d]);
#else
  for (int64_t d = 0; d < DP; ++d)
    for (int64_t p = 0; p < W; ++p) to[d * W + p] = rows[p * DP + d];
#endif
}

// [DP, lanes] -> the first `count` lanes as rows of `width`.
template <int DP>
static void lanes_to_rows(const float* lanes, int64_t count, int64_t width, float* to,
                          int64_t stride) {
#if FPT_WIDTH == 16
  F block[W] = {};
  for (int d = 0; d < DP; ++d) block[d] = load(lanes + d * W);
  transpose(block);
  const __mmask16 wanted = __mmask16((1u << width) - 1);
  for (int64_t p = 0; p < count; ++p)
    _mm512_mask_storeu_ps(to + p * stride, wanted, (__m512)block[p]);
#else
  for (int64_t p = 0; p < count; ++p)
    for (int64_t d = 0; d < width; ++d) to[p * stride + d] = lanes[d * W + p];
#endif
}

template <int DP>
FPT_INLINE F inner(const F* lanes, const float* row) {
  F even = lanes[0] * row[0], odd = lanes[1] * row[1];
#pragma GCC unroll 8
  for (int d = 2; d < DP; d += 2) {
    even += lanes[d] * row[d];
    odd += lanes[d + 1] * row[d + 1];
  }
  return even + odd;
}

template <int DP>
FPT_INLINE void load_all(const float* from, F* to) {
#pragma GCC unroll 16
  for (int d = 0; d < DP; ++d) to[d] = load(from + d * W);
}

// to += sums, and the sums start anew.
template <int DP>
FPT_INLINE void flush(F* sums, float* to) {
#pragma GCC unroll 16
  for (int d = 0; d < DP; ++d) {
    store(to + d * W, load(to + d * W) + sums[d]);
    sums[d] = F{};
  }
}

// W queries: logits of all keys, their exponentials, and the values' sums [DP, lanes].
template <int DP>
static void attend_lanes(const float* queries, const float* k, const float* v, int64_t tokens,
                         float* logits, float* sums, F& top, F& total) {
  F lanes[DP];
  load_all<DP>(queries, lanes);
  top = inner<DP>(lanes, k);
  for (int64_t t = 0; t < tokens; ++t) {
    const F logit = inner<DP>(lanes, k + t * DP);
    top = larger(logit, top);
    store(logits + t * W, logit);
  }
  for (int64_t i = 0; i < DP * W; ++i) sums[i] = 0.0f;
  total = F{};
  F part[DP] = {};
  for (int64_t first = 0; first < tokens; first += RUN, flush<DP>(part, sums)) {
    F weights{};
    const int64_t end = first + RUN < tokens ? first + RUN : tokens;
    for (int64_t t = first; t < end; ++t) {
      const F weight = exponential_of_negative(load(logits + t * W) - top);
      weights += weight;
#pragma GCC unroll 16
      for (int d = 0; d < DP; ++d) part[d] += weight * v[t * DP + d];
    }
    total += weights;
  }
}

// One head whose rows are packed; q is scaled.
struct PackedHead {
  const float *q, *k, *v;
  int64_t queries, tokens, width;
  float *tops, *shares;
};

// `work` holds (2 DP + tokens) W floats.
template <int DP>
static void attend_packed(const PackedHead& head, float* work, float* out, int64_t stride) {
  float* lanes = work;
  float* sums = lanes + DP * W;
  float* logits = sums + DP * W;
  for (int64_t first = 0; first < head.queries; first += W) {
    const int64_t count = head.queries - first < W ? head.queries - first : W;
    rows_to_lanes<DP>(head.q + first * DP, lanes);
    F top, total;
    attend_lanes<DP>(lanes, head.k, head.v, head.tokens, logits, sums, top, total);
    const F share = 1.0f / total;
    for (int64_t d = 0; d < DP; ++d) store(sums + d * W, load(sums + d * W) * share);
    lanes_to_rows<DP>(sums, count, head.width, out + first * stride, stride);
    for (int64_t p = 0; p < count; ++p) {
      head.tops[first + p] = top[p];
      head.shares[first + p] = share[p];
    }
  }
}

template <int DP>
static void side_forward_of(const SideTask& task, float* out, int64_t stride) {
  const int64_t rows_q = up_to(task.queries, W) * DP, rows_k = up_to(task.tokens, W) * DP;
  float* q = task.scratch;
  float* k = q + rows_q;
  float* v = k + rows_k;
  pack_rows<DP>(task.q, task.queries, task.width, root_scale(task.width), q);
  pack_rows<DP>(task.k, task.tokens, task.width, 1.0f, k);
  pack_rows<DP>(task.v, task.tokens, task.width, 1.0f, v);
  pad_rows<DP>(task.queries, q);
  attend_packed<DP>({q, k, v, task.queries, task.tokens, task.width, task.tops, task.shares},
                    v + rows_k, out, stride);
}

// Of W keys and all queries: weights and gradients of the logits, [queries, lanes] each.
template <int DP>
static void slopes_of_lanes(const PackedHead& head, const float* grads, const float* means,
                            const float* keys, const float* values, float* weights,
                            float* grad_logits) {
  F k[DP], v[DP];
  load_all<DP>(keys, k);
  load_all<DP>(values, v);
  for (int64_t i = 0; i < head.queries; ++i) {
    const F logit = inner<DP>(k, head.q + i * DP);
    const F weight = exponential_of_negative(logit - head.tops[i]) * head.shares[i];
    store(weights + i * W, weight);
    store(grad_logits + i * W, weight * (inner<DP>(v, grads + i * DP) - means[i]));
  }
}

// sums [DP, lanes] = sum over the queries of factors[i] * rows[i]
template <int DP>
static void sum_over_queries(const float* factors, const float* rows, int64_t queries,
                             float* sums) {
  F part[DP] = {};
  for (int64_t i = 0; i < DP * W; ++i) sums[i] = 0.0f;
  for (int64_t first = 0; first < queries; first += RUN, flush<DP>(part, sums)) {
    const int64_t end = first + RUN < queries ? first + RUN : queries;
    for (int64_t i = first; i < end; ++i) {
      const F factor = load(factors + i * W);
#pragma GCC unroll 16
      for (int d = 0; d < DP; ++d) part[d] += factor * rows[i * DP + d];
    }
  }
}

// grad_q[i] += sum over the keys of one block of grad_logits[i][key] * key
template <int DP>
static void add_grad_q(const float* grad_logits, const float* keys, int64_t count, int64_t queries,
                       float* grad_q) {
  typedef float Row __attribute__((vector_size(4 * DP), aligned(4), may_alias));
  for (int64_t i = 0; i < queries; ++i) {
    Row even{}, odd{};
    const float* slope = grad_logits + i * W;
    int64_t p = 0;
    for (; p + 2 <= count; p += 2) {
      even += *reinterpret_cast<const Row*>(keys + p * DP) * slope[p];
      odd += *reinterpret_cast<const Row*>(keys + (p + 1) * DP) * slope[p + 1];
    }
    if (p < count) even += *reinterpret_cast<const Row*>(keys + p * DP) * slope[p];
    *reinterpret_cast<Row*>(grad_q + i * DP) += even + odd;
  }
}

// Packed gradients of a head; that of q is still to be scaled.
struct PackedGradient {
  const float* grads;  // [queries, DP]
  float* grad_q;       // [queries, DP]; comes in as the output
  float* grad_k;       // rows of `width`, `stride` apart
  float* grad_v;
  int64_t stride;
};

// `work` holds (4 DP + 2 queries) W floats, and the queries up to W.
template <int DP>
static void attend_packed_backward(const PackedHead& head, const PackedGradient& to, float* work) {
  float* lanes = work;  // keys, values, and their gradients
  float* means = lanes + 4 * DP * W;
  float* weights = means + up_to(head.queries, W);
  float* grad_logits = weights + head.queries * W;
  for (int64_t i = 0; i < head.queries; ++i) {
    means[i] = 0.0f;
    for (int64_t d = 0; d < DP; ++d) means[i] += to.grads[i * DP + d] * to.grad_q[i * DP + d];
  }
  for (int64_t i = 0; i < head.queries * DP; ++i) to.grad_q[i] = 0.0f;
  for (int64_t first = 0; first < head.tokens; first += W) {
    const int64_t count = head.tokens - first < W ? head.tokens - first : W;
    rows_to_lanes<DP>(head.k + first * DP, lanes);
    rows_to_lanes<DP>(head.v + first * DP, lanes + DP * W);
    float* grad_k = lanes + 2 * DP * W;
    float* grad_v = lanes + 3 * DP * W;
    slopes_of_lanes<DP>(head, to.grads, means, lanes, lanes + DP * W, weights, grad_logits);
    sum_over_queries<DP>(weights, to.grads, head.queries, grad_v);
    sum_over_queries<DP>(grad_logits, head.q, head.queries, grad_k);
    add_grad_q<DP>(grad_logits, head.k + first * DP, count, head.queries, to.grad_q);
    lanes_to_rows<DP>(grad_k, count, head.width, to.grad_k + first * to.stride, to.stride);
    lanes_to_rows<DP>(grad_v, count, head.width, to.grad_v + first * to.stride, to.stride);
  }
}

template <int DP>
static void side_backward_of(const SideTask& task, const SideGradient& to) {
  const float scale = root_scale(task.width);
  const int64_t rows_q = up_to(task.queries, W) * DP, rows_k = up_to(task.tokens, W) * DP;
  float* q = task.scratch;
  float* grads = q + rows_q;
  float* grad_q = grads + rows_q;
  float* k = grad_q + rows_q;
  float* v = k + rows_k;
  pack_rows<DP>(task.q, task.queries, task.width, scale, q);
  pack_rows<DP>(to.grad, task.queries, task.width, 1.0f, grads);
  pack_rows<DP>(to.out, task.queries, task.width, 1.0f, grad_q);
  pack_rows<DP>(task.k, task.tokens, task.width, 1.0f, k);
  pack_rows<DP>(task.v, task.tokens, task.width, 1.0f, v);
  pad_rows<DP>(task.tokens, k);
  pad_rows<DP>(task.tokens, v);
  attend_packed_backward<DP>(
      {q, k, v, task.queries, task.tokens, task.width, task.tops, task.shares},
      {grads, grad_q, to.grad_k, to.grad_v, to.stride}, v + rows_k);
  for (int64_t i = 0; i < task.queries; ++i)
    for (int64_t d = 0; d < task.width; ++d) to.grad_q[i * to.stride + d] = grad_q[i * DP + d] * scale;
}

static void side_forward(const SideTask& task, float* out, int64_t stride) {
  task.width <= 8 ? side_forward_of<8>(task, out, stride) : side_forward_of<16>(task, out, stride);
}

static void side_backward(const SideTask& task, const SideGradient& to) {
  task.width <= 8 ? side_backward_of<8>(task, to) : side_backward_of<16>(task, to);
}
