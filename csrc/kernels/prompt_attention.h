// prompt_attention of one layer, head and image: logits, softmax and weighted values, and back.
//
// All logits of a head fit in the caches, so the softmax needs no running maximum, and features are
// converted tile by tile.  A lane is a prompt: every sum of the softmax runs down the tokens.

constexpr int64_t GROUP = 4;  // blocks of prompts that share one conversion of the keys

static int64_t prompt_scratch(int64_t kept, int64_t width) {
  return ROWS * TILE_COLUMNS + GROUP * W * (2 * up_to(kept, ROWS) + width);
}

// Four sums that run side by side, in a fixed order.
struct Sums {
  F part[4] = {};
  FPT_INLINE void add(int64_t t, F x) { part[t & 3] += x; }
  FPT_INLINE F total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

FPT_INLINE float root_scale(int64_t width) { return 1.0f / __builtin_sqrtf(float(width)); }

// The packed queries times the scales of the keys' channels.
static const float* scaled_queries(
    const PromptTask& task, const float* queries, int64_t blocks, float* to) {
  if (!task.k_scales) return queries;
  for (int64_t i = 0; i < blocks * task.width; ++i)
    store(to + i * W, load(queries + i * W) * task.k_scales[i % task.width]);
  return to;
}

// Logits -> exponentials, scaled for the values' sum; the highest logit and the total, by lanes.
static void softmax_lanes(const PromptTask& task, float* logits, F& top, F& total) {
  const float scale = root_scale(task.width);
  top = load(logits) * scale;
  for (int64_t t = 0; t < task.kept; ++t) {
    const F logit = load(logits + t * W) * scale;
    top = logit > top ? logit : top;
    store(logits + t * W, logit);
  }
  Sums sums;
  for (int64_t t = 0; t < task.kept; ++t) {
    const F weight = exponential(load(logits + t * W) - top);
    sums.add(t, weight);
    store(logits + t * W, task.v_scales ? weight * task.v_scales[t] : weight);
  }
  total = sums.total();
}

template <class To>
FPT_INLINE void put_some(typename To::Value* to, F x, int64_t wanted) {
  if (wanted >= W) return To::put(to, x);
  for (int64_t i = 0; i < wanted; ++i) to[i] = To::of(x[i]);
}

static void put_row(const PromptForward& output, int64_t at, F x, int64_t wanted) {
  switch (output.kind) {
    case Kind::f16: return put_some<F16>(static_cast<uint16_t*>(output.out) + at, x, wanted);
    case Kind::bf16: return put_some<BF16>(static_cast<uint16_t*>(output.out) + at, x, wanted);
    default: return put_some<F32>(static_cast<float*>(output.out) + at, x, wanted);
  }
}

// Weighted sums of rows, block by block of channels; `use(sum, d)` gets one vector a prompt.
template <class T, class Use>
FPT_INLINE void weighted_rows(const TokenRows& tokens, const PromptTask& task, const float* weights,
                              Use use) {
  for (int64_t d = 0; d < task.width; d += W) {
    float sum[W * W] = {};
    const int64_t wanted = task.width - d;
    Ahead ahead = no_ahead(weights);
    const int64_t element = sizeof(typename T::Value);
    if (task.next) ahead = {task.next + d * task.kept * element, W * element};
    if (wanted >= W) weighted_sum<T, true>(tokens, task.kept, d, wanted, weights, ahead, sum);
    else weighted_sum<T, false>(tokens, task.kept, d, wanted, weights, ahead, sum);
    use(sum, d);
  }
}

template <class T>
static void forward_of(const PromptTask& task, const PromptForward& output) {
  const int64_t padded = up_to(task.kept, ROWS), all = up_to(task.prompts, W) / W;
  float* tile = task.scratch;
  float* logits = tile + ROWS * TILE_COLUMNS;
  float* scaled = logits + GROUP * padded * W;
  for (int64_t first = 0; first < all; first += GROUP) {
    const int64_t blocks = all - first < GROUP ? all - first : GROUP;
    const float* queries = task.queries + first * task.width * W;
    queries = scaled_queries(task, queries, blocks, scaled);
    row_products<T>(task.k, task.v_ahead, task.kept, task.width, queries, blocks, logits, tile);
    for (int64_t block = 0; block < blocks; ++block) {
      float* weights = logits + block * padded * W;
      const int64_t prompt = (first + block) * W;
      const int64_t lanes = task.prompts - prompt < W ? task.prompts - prompt : W;
      F top, total;
      softmax_lanes(task, weights, top, total);
      const F share = 1.0f / total;
      weighted_rows<T>(task.v, task, weights, [&](const float* sum, int64_t d) {
        for (int64_t p = 0; p < lanes; ++p)
          put_row(output, (prompt + p) * output.stride + d, load(sum + p * W) * share[p], task.width - d);
      });
      for (int64_t p = 0; p < lanes; ++p)
        task.lse[prompt + p] = top[p] + __builtin_logf(total[p]);
    }
  }
}

// Weights from logits, and from the gradients of the weights those of the logits.
static void softmax_backward(const PromptTask& task, F lse, float* logits, float* grads) {
  const float scale = root_scale(task.width);
  Sums sums;
  for (int64_t t = 0; t < task.kept; ++t) {
    const F weight = exponential(load(logits + t * W) * scale - lse);
    sums.add(t, weight);
    store(logits + t * W, weight);
  }
  // The rounding of a large lse would be a factor on every weight, which peaked attention, where
  // the gradient is a difference of nearly equal terms, cannot bear.
  const F share = 1.0f / sums.total();
  Sums means;
  for (int64_t t = 0; t < task.kept; ++t) {
    const F weight = load(logits + t * W) * share;
    F grad = load(grads + t * W);
    if (task.v_scales) grad *= task.v_scales[t];
    means.add(t, weight * grad);
    store(logits + t * W, weight);
    store(grads + t * W, grad);
  }
  const F mean = means.total();
  for (int64_t t = 0; t < task.kept; ++t)
    store(logits + t * W, load(logits + t * W) * (load(grads + t * W) - mean));
}

template <class T>
static void backward_of(const PromptTask& task, const PromptBackward& gradient) {
  const int64_t padded = up_to(task.kept, ROWS), all = up_to(task.prompts, W) / W;
  const int64_t row = up_to(task.width, W);
  const float scale = root_scale(task.width);
  float* tile = task.scratch;
  float* logits = tile + ROWS * TILE_COLUMNS;
  float* grads = logits + GROUP * padded * W;
  float* scaled = grads + GROUP * padded * W;
  for (int64_t first = 0; first < all; first += GROUP) {
    const int64_t blocks = all - first < GROUP ? all - first : GROUP;
    const int64_t offset = first * task.width * W;
    const float* queries = scaled_queries(task, task.queries + offset, blocks, scaled);
    row_products<T>(task.k, task.v_ahead, task.kept, task.width, queries, blocks, logits, tile);
    row_products<T>(task.v, nullptr, task.kept, task.width, gradient.grads + offset, blocks, grads, tile);
    for (int64_t block = 0; block < blocks; ++block) {
      float* weights = logits + block * padded * W;
      const int64_t prompt = (first + block) * W;
      F lse{};
      for (int64_t p = 0; p < W && prompt + p < task.prompts; ++p) lse[p] = task.lse[prompt + p];
      softmax_backward(task, lse, weights, grads + block * padded * W);
      weighted_rows<T>(task.k, task, weights, [&](const float* sum, int64_t d) {
        F factor = splat(scale);
        if (task.k_scales)
          for (int64_t i = 0; i < W && d + i < task.width; ++i) factor[i] *= task.k_scales[d + i];
#pragma GCC unroll 16
        for (int p = 0; p < W; ++p) {
          float* to = gradient.grad_q + (prompt + p) * row + d;
          store(to, load(to) + load(sum + p * W) * factor);
        }
      });
    }
  }
}

static void prompt_forward(const PromptTask& task, const PromptForward& output) {
  switch (task.stored) {
    case Stored::f16: return forward_of<F16>(task, output);
    case Stored::bf16: return forward_of<BF16>(task, output);
    case Stored::f32: return forward_of<F32>(task, output);
    case Stored::i8: return forward_of<I8>(task, output);
  }
}

static void prompt_backward(const PromptTask& task, const PromptBackward& gradient) {
  switch (task.stored) {
    case Stored::f16: return backward_of<F16>(task, gradient);
    case Stored::bf16: return backward_of<BF16>(task, gradient);
    case Stored::f32: return backward_of<F32>(task, gradient);
    case Stored::i8: return backward_of<I8>(task, gradient);
  }
}

template <class T>
static void pack_of(const PackTask& task) {
  const auto* from = static_cast<const typename T::Value*>(task.from);
  float* to = task.to;
  for (int64_t first = 0; first < task.prompts; first += W, to += task.width * W) {
    const int64_t lanes = task.prompts - first < W ? task.prompts - first : W;
    for (int64_t p = 0; p < W; ++p) {
      const auto* row = from + (first + p) * task.prompt_stride;
      for (int64_t d = 0; d < task.width; ++d)
        to[d * W + p] = p < lanes ? T::one(row[d * task.column_stride]) : 0.0f;
    }
  }
}

static void pack_prompts(const PackTask& task) {
  switch (task.kind) {
    case Kind::f16: return pack_of<F16>(task);
    case Kind::bf16: return pack_of<BF16>(task);
    case Kind::f32: return pack_of<F32>(task);
    case Kind::f64: return;  // refused at the door
  }
}
