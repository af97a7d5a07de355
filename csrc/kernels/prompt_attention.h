// prompt_attention of one layer, head and image: logits, softmax and weighted values, and back.
// Features are converted tile by tile.

static int64_t prompt_scratch(int64_t kept, int64_t width) {
  const int64_t floats = ROWS * TILE_COLUMNS + GROUP * W * (2 * up_to(kept, ROWS) + width);
#if FPT_AMX
  return floats > tile_scratch(kept, width) ? floats : tile_scratch(kept, width);
#else
  return floats;
#endif
}

// Weighted sums of rows, block by block of channels; `use(sum, d)` gets one vector a prompt.
template <class T, class Use>
FPT_INLINE void weighted_rows(const TokenRows& tokens, const PromptTask& task, const float* weights,
                              Use use) {
  for (int64_t d = 0; d < task.width; d += W) {
    alignas(64) float sum[W * W] = {};
    const int64_t wanted = task.width - d;
    Ahead ahead = no_ahead(weights);
    const int64_t element = sizeof(typename T::Value);
    if (task.next_k)
      ahead = {task.next_k + d * task.kept * element / 2, W * element,
               task.kept * task.width * element / 2};
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
      PromptSoftmax<false> softmax(task, weights);
      softmax.see(0, task.kept);
      softmax.settle();
      softmax.weigh(0, task.kept, nothing);
      const F total = softmax.sums.total(), share = 1.0f / total;
      weighted_rows<T>(task.v, task, weights, [&](const float* sum, int64_t d) {
        for (int64_t p = 0; p < lanes; ++p)
          put_row(output, (prompt + p) * output.stride + d, load(sum + p * W) * share[p], task.width - d);
      });
      for (int64_t p = 0; p < lanes; ++p)
        task.lse[prompt + p] = softmax.top[p] + __builtin_logf(total[p]);
    }
  }
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
      PromptSlopes<false> slopes(task, prompt, weights, grads + block * padded * W);
      slopes.see(0, task.kept, nothing);
      slopes.settle();
      slopes.weigh(0, task.kept, nothing);
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
#if FPT_AMX
  if (suits_tiles(task)) return tile_forward(task, output);
#endif
  switch (task.stored) {
    case Stored::f16: return forward_of<F16>(task, output);
    case Stored::bf16: return forward_of<BF16>(task, output);
    case Stored::f32: return forward_of<F32>(task, output);
    case Stored::i8: return forward_of<I8>(task, output);
  }
}

static void prompt_backward(const PromptTask& task, const PromptBackward& gradient) {
#if FPT_AMX
  if (suits_tiles(task)) return tile_backward(task, gradient);
#endif
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
#if FPT_WIDTH == 16
    if (task.column_stride == 1 && task.width % W == 0) {
      for (int64_t d = 0; d < task.width; d += W) {
        F block[W];
        for (int64_t p = 0; p < W; ++p)
          block[p] = p < lanes ? T::some(from + (first + p) * task.prompt_stride + d) : F{};
        transpose(block);
        for (int64_t i = 0; i < W; ++i) store(to + (d + i) * W, block[i]);
      }
      continue;
    }
#endif
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
