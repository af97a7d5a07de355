// prompt_attention by tiles of bf16, where one bf16 is enough for an element of the tokens: all of int8
// and bf16, and what is beside prompts in bf16.  D is a multiple of 32.
//
// Prompts and weights are split into PARTS of bf16: one, or the three that an f32 is the sum of.  Two
// parts of f16 tokens are not here: on a Sapphire Rapids they took as long as AVX-512's products, even
// with tiles multiplied row by row beside the conversion, and three parts of f32 longer.  With rows alone
// by tiles and weighted sums by AVX-512, the latter took longer by much of what the former saved, as if
// a core that multiplies tiles ran slower, and from memory forward gained nothing.

#if FPT_AMX

struct PromptScratch {
  float *logits, *grads;  // [GROUP, tokens, 16]
  float* scaled;
  char *prompts, *grad_prompts;
  char *rows, *values;  // tiles of 64 tokens
  char* pairs;          // tiles of all tokens backward, of 64 forward
  char* split;          // tiles of weights
  int64_t bytes = 0;

  PromptScratch(int64_t tokens, int64_t width, void* scratch) {
    const auto address = reinterpret_cast<uintptr_t>(scratch);
    char* base = reinterpret_cast<char*>((address + 63) & ~uintptr_t(63));
    const int64_t padded = up_to(tokens, PAIRED), chunks = up_to(width, PAIRED) / PAIRED;
    const auto take = [&](int64_t count) { return bytes += count, base + bytes - count; };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(4 * count)); };
    const auto tiles = [&](int64_t count) { return take(count * TILE_BYTES); };
    logits = floats(GROUP * padded * W), grads = floats(GROUP * padded * W);
    scaled = floats(GROUP * W * width);
    prompts = tiles(GROUP * chunks * MOST_PARTS), grad_prompts = tiles(GROUP * chunks * MOST_PARTS);
    rows = tiles(4 * chunks), values = tiles(4 * chunks);
    pairs = tiles((padded / PAIRED + 2) * 2 * chunks);
    split = tiles(padded / PAIRED * MOST_PARTS);
  }
};

// In floats.
FPT_INLINE int64_t tile_scratch(int64_t kept, int64_t width) {
  return PromptScratch(kept, width, nullptr).bytes / 4 + 16;
}

// A task by tiles: `S` says of what.
template <class S>
struct PromptTiles {
  const PromptTask& task;
  const PromptScratch at;
  const int64_t kept, width, padded;
  const int64_t of_group;    // bytes of the tiles of 32 tokens
  const int64_t of_prompts;  // bytes of a block's

  explicit PromptTiles(const PromptTask& t)
      : task(t),
        at(t.kept, t.width, t.scratch),
        kept(t.kept),
        width(t.width),
        padded(up_to(t.kept, PAIRED)),
        of_group(2 * t.width / PAIRED * TILE_BYTES),
        of_prompts(t.width / PAIRED * S::parts * TILE_BYTES) {}

  float* logits(int64_t block) const { return at.logits + block * padded * W; }
  float* grads(int64_t block) const { return at.grads + block * padded * W; }
  char* rows(char* of, int64_t t) const { return of + t / PAIRED % 2 * of_group; }
  int64_t end(int64_t t) const { return t + PAIRED < kept ? t + PAIRED : kept; }
  int64_t lanes(int64_t prompt) const {
    return task.prompts - prompt < W ? task.prompts - prompt : W;
  }

  // The first or second half of the next task's keys or values.
  Wanted wanted(const char* next, int64_t half) const {
    const int64_t step = width * int64_t(sizeof(typename S::T::Value)) / 2;
    if (!next) return {task.k.base, 0, 0};
    return {next + half * kept * step, int32_t(step), int32_t(kept)};
  }

  // Rows of 32 tokens times all blocks.
  void multiply(const char* rows, const char* prompts, int64_t blocks, float* products) const {
    for (int64_t block = 0; block < blocks; ++block)
      multiply_rows<S>(rows, prompts + block * of_prompts, width, products + block * padded * W);
  }

  // `weigh(first, end)` makes weights of a block's logits, `pair(t, d)` is as above, and `use(sums, d)`
  // gets the sums of channels d .. d + 32 in the order of channels_in_order, MOST_COLUMNS apart.
  template <class Weigh, class Pair, class Use>
  FPT_INLINE void weigh_tokens(int64_t block, Weigh weigh, Pair pair, Use use) const {
    alignas(64) float sums[W * MOST_COLUMNS];
    float* weights = logits(block);
    for (int64_t t = kept; t < padded; ++t) store(weights + t * W, F{});
    const auto sum = [&]<int N>(int64_t d) {
      const auto once = [&](int64_t t) {
        if (d > 0) return;
        weigh(t, end(t));
        split_weights<S::parts>(weights + t * W, at.split + t / PAIRED * S::parts * TILE_BYTES);
      };
      weighted_sum_of_tiles<S, N>(kept, at.split, sums, once, [&](int64_t t) { return pair(t, d); });
      for (int64_t i = 0; i < N * W; i += PAIRED) use(sums + i, d + i);
    };
    for (int64_t d = 0; d < width; d += MOST_COLUMNS)
      width - d >= MOST_COLUMNS ? sum.template operator()<COLUMN_TILES>(d)
                                : sum.template operator()<2>(d);
  }

  void forward(const PromptForward& output, int64_t first, int64_t blocks) const {
    using Softmax = PromptSoftmax<S::parts == 1>;
    const float* packed = task.queries + first * width * W;
    split_prompts<S>(scaled_queries(task, packed, blocks, at.scaled), blocks, width, at.prompts);
    Softmax softmax[] = {{task, logits(0)}, {task, logits(1)}, {task, logits(2)}, {task, logits(3)}};
    static_assert(sizeof(softmax) == GROUP * sizeof(Softmax));
    // Products of 32 tokens run while the next are converted.
    for (int64_t t = 0; t < kept + 2 * PAIRED; t += PAIRED) {
      if (t < kept)
        convert_tokens<S, true, false, 1>(task.k, t, kept, width, 0, width, wanted(task.next_k, 0),
                                          rows(at.rows, t), nullptr);
      if (t >= PAIRED && t < kept + PAIRED)
        multiply(rows(at.rows, t - PAIRED), at.prompts, blocks, at.logits + (t - PAIRED) * W);
      if (t >= 2 * PAIRED)
        for (int64_t block = 0; block < blocks; ++block)
          softmax[block].see(t - 2 * PAIRED, end(t - 2 * PAIRED));
    }
    for (int64_t block = 0; block < blocks; ++block) {
      Softmax& of_block = softmax[block];
      const int64_t prompt = (first + block) * W, there = lanes(prompt);
      of_block.settle();
      const auto pair = [&](int64_t t, int64_t d) -> const char* {
        char* to = at.pairs + t / PAIRED % 2 * COLUMN_TILES * TILE_BYTES;
        const int64_t last = d + MOST_COLUMNS < width ? d + MOST_COLUMNS : width;
        convert_tokens<S, false, true, 2>(task.v, t, kept, width, d, last, wanted(task.next_v, 0),
                                          nullptr, to);
        return to;
      };
      const auto put = [&](const float* sums, int64_t d) {
        const F share = 1.0f / of_block.sums.total();
        for (int64_t p = 0; p < there; ++p, sums += MOST_COLUMNS) {
          const int64_t to = (prompt + p) * output.stride + d;
          put_row(output, to, channels_in_order<S, 0>(sums) * share[p], W);
          put_row(output, to + W, channels_in_order<S, 1>(sums) * share[p], W);
        }
      };
      const auto weigh = [&](int64_t from, int64_t to) {
        of_block.weigh(from, to, wanted(task.next_k, 1));
      };
      weigh_tokens(block, weigh, pair, put);
      const F total = of_block.sums.total();
      for (int64_t p = 0; p < there; ++p)
        task.lse[prompt + p] = of_block.top[p] + __builtin_logf(total[p]);
    }
  }

  void backward(const PromptBackward& gradient, int64_t first, int64_t blocks) const {
    using Slopes = PromptSlopes<S::parts == 1>;
    const int64_t offset = first * width * W;
    const F scale = splat(root_scale(width));
    split_prompts<S>(scaled_queries(task, task.queries + offset, blocks, at.scaled), blocks, width,
                     at.prompts);
    split_prompts<S>(gradient.grads + offset, blocks, width, at.grad_prompts);
    const auto slopes_of = [&](int64_t block) -> Slopes {
      return {task, (first + block) * W, logits(block), grads(block)};
    };
    Slopes slopes[] = {slopes_of(0), slopes_of(1), slopes_of(2), slopes_of(3)};
    static_assert(sizeof(slopes) == GROUP * sizeof(Slopes));
    const auto pairs = [&](int64_t t) { return at.pairs + t / PAIRED * of_group; };
    // Products of the keys run while values are converted, and the other way round.
    for (int64_t t = 0; t < kept + 2 * PAIRED; t += PAIRED) {
      if (t < kept)
        convert_tokens<S, true, true, 1>(task.k, t, kept, width, 0, width, wanted(task.next_k, 0),
                                         at.rows, pairs(t));
      if (t >= PAIRED && t < kept + PAIRED)
        multiply(at.values, at.grad_prompts, blocks, at.grads + (t - PAIRED) * W);
      if (t < kept) {
        convert_tokens<S, true, false, 1>(task.v, t, kept, width, 0, width, wanted(task.next_k, 1),
                                          at.values, nullptr);
        multiply(at.rows, at.prompts, blocks, at.logits + t * W);
      }
      if (t >= 2 * PAIRED)
        for (int64_t block = 0; block < blocks; ++block)
          slopes[block].see(t - 2 * PAIRED, end(t - 2 * PAIRED), wanted(task.next_v, 0));
    }
    for (int64_t block = 0; block < blocks; ++block) {
      Slopes& of_block = slopes[block];
      of_block.settle();
      const auto add = [&](const float* sums, int64_t d) {
        const F low = task.k_scales ? load(task.k_scales + d) * scale : scale;
        const F high = task.k_scales ? load(task.k_scales + d + W) * scale : scale;
        float* to = gradient.grad_q + (first + block) * W * width + d;
        for (int64_t p = 0; p < W; ++p, sums += MOST_COLUMNS, to += width) {
          store(to, load(to) + channels_in_order<S, 0>(sums) * low);
          store(to + W, load(to + W) + channels_in_order<S, 1>(sums) * high);
        }
      };
      const auto weigh = [&](int64_t from, int64_t to) {
        of_block.weigh(from, to, wanted(task.next_v, 1));
      };
      const auto pair = [&](int64_t t, int64_t d) -> const char* {
        return pairs(t) + d / W * TILE_BYTES;
      };
      weigh_tokens(block, weigh, pair, add);
    }
  }
};

// `run(tiles, first, blocks)` for every GROUP of blocks of prompts.
template <class S, class Run>
FPT_INLINE void by_groups(const PromptTask& task, Run run) {
  const Tiles shapes;
  const PromptTiles<S> tiles(task);
  const int64_t all = up_to(task.prompts, W) / W;
  for (int64_t first = 0; first < all; first += GROUP)
    run(tiles, first, all - first < GROUP ? all - first : GROUP);
}

static bool suits_tiles(const PromptTask& task) {
  if (task.width % PAIRED) return false;
  if (task.stored == Stored::f16) return task.narrow;
  return task.stored != Stored::f32;
}

// `run` with the tokens' type and the parts of prompts: the three that an f32 is the sum of, or one.
template <class Run>
FPT_INLINE void with_tiling(const PromptTask& task, Run run) {
  switch (task.stored) {
    case Stored::f16: return run(Tiling<F16, 1>{});
    case Stored::bf16: return task.narrow ? run(Tiling<BF16, 1>{}) : run(Tiling<BF16, 3>{});
    case Stored::i8: return task.narrow ? run(Tiling<I8, 1>{}) : run(Tiling<I8, 3>{});
    case Stored::f32: return;  // does not suit
  }
}

static void tile_forward(const PromptTask& task, const PromptForward& output) {
  with_tiling(task, [&]<class S>(S) {
    by_groups<S>(task, [&](const PromptTiles<S>& tiles, int64_t first, int64_t blocks) {
      tiles.forward(output, first, blocks);
    });
  });
}

static void tile_backward(const PromptTask& task, const PromptBackward& gradient) {
  with_tiling(task, [&]<class S>(S) {
    by_groups<S>(task, [&](const PromptTiles<S>& tiles, int64_t first, int64_t blocks) {
      tiles.backward(gradient, first, blocks);
    });
  });
}

#endif
