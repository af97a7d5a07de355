// The softmax of prompt_attention, forward and backward, whatever makes its products.
//
// All logits of a head fit in the caches, so it needs no running maximum.  A lane is a prompt: every
// sum runs down the tokens.

// Functions whose constants would take the registers of the products around them.
#define FPT_ALONE __attribute__((noinline))

constexpr int64_t GROUP = 4;  // blocks of prompts that share one conversion of the keys

// Four sums that run side by side, in a fixed order.
struct Sums {
  F part[4] = {};
  FPT_INLINE F total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

// `use(t, t % 4)` for every t of first .. end, where `first` is a multiple of 4; the compiler knows the
// second, so that what it picks is a register.
template <class Use>
FPT_INLINE void by_fours(int64_t first, int64_t end, Use use) {
  int64_t t = first;
  for (; t + 4 <= end; t += 4) use(t, 0), use(t + 1, 1), use(t + 2, 2), use(t + 3, 3);
  if (t < end) use(t, 0);
  if (t + 1 < end) use(t + 1, 1);
  if (t + 2 < end) use(t + 2, 2);
}

// What else to do beside a token: nothing.
FPT_INLINE void nothing(int64_t) {}

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
  if constexpr (NARROW) return rough_power_of_two(x * (scale * LOG2_E) - top * LOG2_E);
#endif
#if FPT_WIDTH == 16
  return exponential_of_negative(x * scale - top, -104.0f);
#else
  return exponential(x * scale - top);
#endif
}

// Logits of a block of prompts -> exponentials, scaled for the values' sum, in two passes over all
// tokens, each in any number of runs.
template <bool NARROW>
struct PromptSoftmax {
  const PromptTask& task;
  float* logits;
  float scale = root_scale(task.width);
  F tops[4], top;  // side by side, as in Sums
  Sums sums;

  PromptSoftmax(const PromptTask& t, float* of_block) : task(t), logits(of_block) {
    for (F& lanes : tops) lanes = splat(-__builtin_inff());
  }

  FPT_ALONE void see(int64_t first, int64_t end) {
    // Elsewhere scaled logits are rounded, so that the highest one's weight is 1 to the last bit.
    F now[4] = {tops[0], tops[1], tops[2], tops[3]};  // in registers
    const float factor = scale;
    by_fours(first, end, [&, to = logits](int64_t t, int i) {
      const F logit = NARROW ? load(to + t * W) : load(to + t * W) * factor;
      now[i] = highest(logit, now[i]);
      if (!NARROW) store(to + t * W, logit);
    });
    for (int i = 0; i < 4; ++i) tops[i] = now[i];
  }

  FPT_INLINE void settle() {
    top = highest(highest(tops[0], tops[1]), highest(tops[2], tops[3])) * (NARROW ? scale : 1.0f);
  }

  template <class Beside>
  FPT_ALONE void weigh(int64_t first, int64_t end, Beside beside) {
    Sums now = sums;
    const float factor = NARROW ? scale : 1.0f;
    by_fours(first, end, [&, to = logits, above = top, scales = task.v_scales](int64_t t, int i) {
      beside(t);
      const F weight = weight_of<NARROW>(load(to + t * W), factor, above);
      now.part[i] += weight;
      store(to + t * W, scales ? weight * scales[t] : weight);
    });
    sums = now;
  }
};

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

// Weights from logits, and from them and their gradients those of the logits: in two passes as above.
template <bool NARROW>
struct PromptSlopes {
  const PromptTask& task;
  float *logits, *grads;
  F lse;
  float scale = root_scale(task.width);
  F share, mean;
  Sums sums;

  PromptSlopes(const PromptTask& t, int64_t prompt, float* of_block, float* grads_of_block)
      : task(t), logits(of_block), grads(grads_of_block), lse(lse_of(t, prompt)) {}

  template <class Beside>
  FPT_ALONE void see(int64_t first, int64_t end, Beside beside) {
    Sums now = sums;
    const float factor = scale;
    const float* scales = task.v_scales;
    const auto add = [&, to = logits, of = grads, known = lse](int64_t t, int i) {
      beside(t);
      const F weight = weight_of<NARROW>(load(to + t * W), factor, known);
      if (scales) store(of + t * W, load(of + t * W) * scales[t]);
      now.part[i] += weight;
      store(to + t * W, weight);
    };
    by_fours(first, end, add);
    sums = now;
  }

  // The rounding of a large lse would be a factor on every weight, which peaked attention, where the
  // gradient is a difference of nearly equal terms, cannot bear.
  FPT_INLINE void settle() {
    Sums means;
    const F factor = 1.0f / sums.total();
    by_fours(0, task.kept, [&, from = logits, of = grads](int64_t t, int i) {
      means.part[i] += load(from + t * W) * factor * load(of + t * W);
    });
    share = factor;
    mean = means.total();
  }

  template <class Beside>
  FPT_ALONE void weigh(int64_t first, int64_t end, Beside beside) {
    const auto put = [&, to = logits, of = grads, factor = share, middle = mean](int64_t t, int) {
      beside(t);
      store(to + t * W, load(to + t * W) * factor * (load(of + t * W) - middle));
    };
    by_fours(first, end, put);
  }
};
