// Attention of a narrow head, forward and backward, in f32: side_attention.
//
// A head of 8 or 16 channels is too narrow to be a lane's axis, and its products too short for a
// library of matrix products.  Forward, a lane is a query; backward, a lane is a key, so that sums
// over the tokens stay in their lanes.  Rows are packed to DP channels, zeros where there is none.

// Floats of scratch of one head, whatever its direction.
static int64_t side_scratch(int64_t queries, int64_t tokens) {
  return (64 + W) * (up_to(queries, W) + up_to(tokens, W)) + 128 * W;
}

template <int DP>
static void pack_rows(const Matrix& from, int64_t rows, int64_t width, float scale, float* to) {
  const auto* data = static_cast<const float*>(from.data);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t d = 0; d < DP; ++d)
      to[t * DP + d] =
          d < width ? data[t * from.row_stride + d * from.column_stride] * scale : 0.0f;
}

// Packed rows -> [DP, lanes], of which `lanes` are rows and the others 0.
template <int DP>
static void rows_to_lanes(const float* rows, int64_t lanes, float* to) {
  for (int64_t d = 0; d < DP; ++d)
    for (int64_t p = 0; p < W; ++p) to[d * W + p] = p < lanes ? rows[p * DP + d] : 0.0f;
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
    top = logit > top ? logit : top;
    store(logits + t * W, logit);
  }
  for (int64_t i = 0; i < DP * W; ++i) sums[i] = 0.0f;
  total = F{};
  F part[DP] = {};
  for (int64_t first = 0; first < tokens; first += RUN, flush<DP>(part, sums)) {
    F weights{};
    const int64_t end = first + RUN < tokens ? first + RUN : tokens;
    for (int64_t t = first; t < end; ++t) {
      const F weight = exponential(load(logits + t * W) - top);
      weights += weight;
#pragma GCC unroll 16
      for (int d = 0; d < DP; ++d) part[d] += weight * v[t * DP + d];
    }
    total += weights;
  }
}

template <int DP>
static void side_forward_of(const SideTask& task, float* out, int64_t stride) {
  const int64_t rows_q = up_to(task.queries, W) * DP, rows_k = up_to(task.tokens, W) * DP;
  float* q = task.scratch;
  float* k = q + rows_q;
  float* v = k + rows_k;
  float* lanes = v + rows_k;
  float* sums = lanes + DP * W;
  float* logits = sums + DP * W;
  pack_rows<DP>(task.q, task.queries, task.width, root_scale(task.width), q);
  pack_rows<DP>(task.k, task.tokens, task.width, 1.0f, k);
  pack_rows<DP>(task.v, task.tokens, task.width, 1.0f, v);
  for (int64_t first = 0; first < task.queries; first += W) {
    const int64_t count = task.queries - first < W ? task.queries - first : W;
    rows_to_lanes<DP>(q + first * DP, count, lanes);
    F top, total;
    attend_lanes<DP>(lanes, k, v, task.tokens, logits, sums, top, total);
    const F share = 1.0f / total;
    for (int64_t d = 0; d < task.width; ++d) {
      const F channel = load(sums + d * W) * share;
      for (int64_t p = 0; p < count; ++p) out[(first + p) * stride + d] = channel[p];
    }
    for (int64_t p = 0; p < count; ++p) {
      task.tops[first + p] = top[p];
      task.shares[first + p] = share[p];
    }
  }
}

// Gradients of W keys and values, [DP, lanes] each, and those of the logits [queries, lanes].
template <int DP>
static void backward_lanes(const SideTask& task, const float* q, const float* grads,
                           const float* means, const float* keys, const float* values,
                           float* grad_k, float* grad_v, float* grad_logits) {
  F k[DP], v[DP], part_k[DP] = {}, part_v[DP] = {};
  load_all<DP>(keys, k);
  load_all<DP>(values, v);
  for (int64_t i = 0; i < DP * W; ++i) grad_k[i] = grad_v[i] = 0.0f;
  for (int64_t first = 0; first < task.queries; first += RUN) {
    const int64_t end = first + RUN < task.queries ? first + RUN : task.queries;
    for (int64_t i = first; i < end; ++i) {
      const float* query = q + i * DP;
      const float* grad = grads + i * DP;
      const F weight = exponential(inner<DP>(k, query) - task.tops[i]) * task.shares[i];
      const F slope = weight * (inner<DP>(v, grad) - means[i]);
      store(grad_logits + i * W, slope);
#pragma GCC unroll 16
      for (int d = 0; d < DP; ++d) part_v[d] += weight * grad[d];
#pragma GCC unroll 16
      for (int d = 0; d < DP; ++d) part_k[d] += slope * query[d];
    }
    flush<DP>(part_k, grad_k);
    flush<DP>(part_v, grad_v);
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

static void lanes_to_rows(const float* lanes, int64_t count, int64_t width, float* to,
                          int64_t stride) {
  for (int64_t p = 0; p < count; ++p)
    for (int64_t d = 0; d < width; ++d) to[p * stride + d] = lanes[d * W + p];
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
  float* lanes = v + rows_k;  // keys, values, and their gradients
  float* means = lanes + 4 * DP * W;
  float* grad_logits = means + up_to(task.queries, W);
  pack_rows<DP>(task.q, task.queries, task.width, scale, q);
  pack_rows<DP>(to.grad, task.queries, task.width, 1.0f, grads);
  pack_rows<DP>(to.out, task.queries, task.width, 1.0f, grad_q);
  pack_rows<DP>(task.k, task.tokens, task.width, 1.0f, k);
  pack_rows<DP>(task.v, task.tokens, task.width, 1.0f, v);
  for (int64_t i = 0; i < task.queries; ++i) {
    means[i] = 0.0f;
    for (int64_t d = 0; d < DP; ++d) means[i] += grads[i * DP + d] * grad_q[i * DP + d];
  }
  for (int64_t i = 0; i < task.queries * DP; ++i) grad_q[i] = 0.0f;
  for (int64_t first = 0; first < task.tokens; first += W) {
    const int64_t count = task.tokens - first < W ? task.tokens - first : W;
    rows_to_lanes<DP>(k + first * DP, count, lanes);
    rows_to_lanes<DP>(v + first * DP, count, lanes + DP * W);
    float* grad_k = lanes + 2 * DP * W;
    float* grad_v = lanes + 3 * DP * W;
    backward_lanes<DP>(task, q, grads, means, lanes, lanes + DP * W, grad_k, grad_v, grad_logits);
    add_grad_q<DP>(grad_logits, k + first * DP, count, task.queries, grad_q);
    lanes_to_rows(grad_k, count, task.width, to.grad_k + first * to.stride, to.stride);
    lanes_to_rows(grad_v, count, task.width, to.grad_v + first * to.stride, to.stride);
  }
  for (int64_t i = 0; i < task.queries; ++i)
    for (int64_t d = 0; d < task.width; ++d) to.grad_q[i * to.stride + d] = grad_q[i * DP + d] * scale;
}

static void side_forward(const SideTask& task, float* out, int64_t stride) {
  task.width <= 8 ? side_forward_of<8>(task, out, stride) : side_forward_of<16>(task, out, stride);
}

static void side_backward(const SideTask& task, const SideGradient& to) {
  task.width <= 8 ? side_backward_of<8>(task, to) : side_backward_of<16>(task, to);
}
