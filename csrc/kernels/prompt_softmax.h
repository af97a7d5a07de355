// The softmax of prompt_attention, forward and backward, whatever makes its products.
//
// All logits of a head fit in the caches, so it needs no running maximum.  A lane is a prompt: every
// sum runs down the tokens.

constexpr int64_t GROUP = 4;  // blocks of prompts that share one conversion of the keys

// Four sums that run side by side, in a fixed order.
struct Sums {
  F part[4] = {};
  FPT_INLINE F total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

// `use(t, t % 4)` for every t; the compiler knows the second, so that what it picks is a register.
template <class Use>
FPT_INLINE void by_fours(int64_t count, Use use) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) use(t, 0), use(t + 1, 1), use(t + 2, 2), use(t + 3, 3);
  if (t < count) use(t, 0);
  if (t + 1 < count) use(t + 1, 1);
  if (t + 2 < count) use(t + 2, 2);
}

FPT_INLINE float root_scale(int64_t width) { return 1.0f / __builtin_sqrtf(float(width)); }

// The packed queries times the scales of the keys' channels.
static const float* scaled_queries(
    const PromptTask& task, const float* queries, int64_t blocks, float* to) {
  if (!task.k_scales) return queries;
  for (int64_t i = 0; i < blocks * task.width; ++i)
    store(to + i * W, load(queries + i * W) * task.k_scales[i % task.width]);
  return to;
}

// e^(x * scale - top); that of weights that are NARROW, which are rounded to bf16, in fewer steps.
template <bool NARROW>
FPT_INLINE F weight_of(F x, float scale, F top) {
#if FPT_AMX
  if constexpr (NARROW) return power_of_two(x * (scale * LOG2_E) - top * LOG2_E);
#endif
  return exponential(x * scale - top);
}

// Logits -> exponentials, scaled for the values' sum; the highest logit and the total, by lanes.
template <bool NARROW>
static void softmax_lanes(const PromptTask& task, float* logits, F& top, F& total) {
  const float scale = root_scale(task.width);
  // Elsewhere scaled logits are rounded, so that the highest one's weight is 1 to the last bit.
  const float now = NARROW ? 1.0f : scale, later = NARROW ? scale : 1.0f;
  const F first = load(logits) * now;
  F tops[4] = {first, first, first, first};  // side by side, as in Sums
  by_fours(task.kept, [&](int64_t t, int i) {
    const F logit = load(logits + t * W) * now;
    tops[i] = highest(logit, tops[i]);
    if (!NARROW) store(logits + t * W, logit);
  });
  top = highest(highest(tops[0], tops[1]), highest(tops[2], tops[3])) * later;
  Sums sums;
  by_fours(task.kept, [&](int64_t t, int i) {
    const F weight = weight_of<NARROW>(load(logits + t * W), later, top);
    sums.part[i] += weight;
    store(logits + t * W, task.v_scales ? weight * task.v_scales[t] : weight);
  });
  total = sums.total();
}

// Those of a block of prompts.
FPT_INLINE F lse_of(const PromptTask& task, int64_t prompt) {
  F lse{};
  for (int64_t p = 0; p < W && prompt + p < task.prompts; ++p) lse[p] = task.lse[prompt + p];
  return lse;
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

// Weights from logits, and from the gradients of the weights those of the logits.
template <bool NARROW>
static void softmax_backward(const PromptTask& task, F lse, float* logits, float* grads) {
  const float scale = root_scale(task.width);
  Sums sums;
  by_fours(task.kept, [&](int64_t t, int i) {
    const F weight = weight_of<NARROW>(load(logits + t * W), scale, lse);
    sums.part[i] += weight;
    store(logits + t * W, weight);
  });
  // The rounding of a large lse would be a factor on every weight, which peaked attention, where
  // the gradient is a difference of nearly equal terms, cannot bear.
  const F share = 1.0f / sums.total();
  Sums means;
  by_fours(task.kept, [&](int64_t t, int i) {
    const F weight = load(logits + t * W) * share;
    F grad = load(grads + t * W);
    if (task.v_scales) grad *= task.v_scales[t];
    means.part[i] += weight * grad;
    store(logits + t * W, weight);
    store(grads + t * W, grad);
  });
  const F mean = means.total();
  for (int64_t t = 0; t < task.kept; ++t)
    store(logits + t * W, load(logits + t * W) * (load(grads + t * W) - mean));
}
