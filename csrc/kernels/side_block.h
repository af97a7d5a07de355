// A whole layer of the side network, forward and backward: side_block.
//
// A group of images at a time, so that its rows stay in the caches and fill the products.  Rows of a
// group, each of `width` floats and zeros up to 16: first the queries' tokens of all its images, then
// their other tokens, then their prompts; so that what only some rows need is a product of the first.
// The backward pass computes anew all but the attention's output.

// What the layer's weights become for the products, once per call.
template <class Math>
struct SidePacked {
  using Element = typename Math::Element;
  // out = in W^T of each linear map, and in = out W where gradients are wanted.
  struct Linear {
    Element *forward, *backward;
    float* bias;
  };
  Linear q, kv, proj, fc1, fc2;
  float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  int64_t bytes = 0;

  SidePacked(const SideSizes& s, void* base, bool backward) {
    char* at = static_cast<char*>(base);
    const auto linear = [&](Linear& l, int64_t in, int64_t out) {
      l.forward = take<Element>(at, Math::packed_size(in, out));
      l.backward = take<Element>(at, backward ? Math::packed_size(out, in) : 0);
      l.bias = take<float>(at, padded(out));
    };
    linear(q, s.width, s.width);
    linear(kv, s.width, 2 * s.width);
    linear(proj, s.width, s.width);
    linear(fc1, s.width, s.hidden);
    linear(fc2, s.hidden, s.width);
    norm1_weight = take<float>(at, padded(s.width)), norm1_bias = take<float>(at, padded(s.width));
    norm2_weight = take<float>(at, padded(s.width)), norm2_bias = take<float>(at, padded(s.width));
  }

  template <class T>
  T* take(char* base, int64_t count) {
    T* part = reinterpret_cast<T*>(base + bytes);
    bytes += up_to(count * int64_t(sizeof(T)), 64);
    return part;
  }
};

static void pad_vector(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < padded(count); ++i) to[i] = i < count ? from[i] : 0.0f;
}

template <class Math>
static void pack_linear(const float* weight, const float* bias, int64_t in, int64_t out,
                        bool backward, const typename SidePacked<Math>::Linear& to) {
  Math::pack(weight, 1, in, in, out, to.forward);
  if (backward) Math::pack(weight, in, 1, out, in, to.backward);
  pad_vector(bias, out, to.bias);
}

template <class Math>
static void pack_side_of(const SideSizes& s, const SideWeights& w, bool backward, void* to) {
  const SidePacked<Math> p(s, to, backward);
  const int64_t width = s.width;
  pack_linear<Math>(w.qkv, w.qkv_bias, width, width, backward, p.q);
  pack_linear<Math>(w.qkv + width * width, w.qkv_bias + width, width, 2 * width, backward, p.kv);
  pack_linear<Math>(w.proj, w.proj_bias, width, width, backward, p.proj);
  pack_linear<Math>(w.fc1, w.fc1_bias, width, s.hidden, backward, p.fc1);
  pack_linear<Math>(w.fc2, w.fc2_bias, s.hidden, width, backward, p.fc2);
  pad_vector(w.norm1, width, p.norm1_weight);
  pad_vector(w.norm1_bias, width, p.norm1_bias);
  pad_vector(w.norm2, width, p.norm2_weight);
  pad_vector(w.norm2_bias, width, p.norm2_bias);
}

// Gradients of the weights, summed over the images of a share; matrices [in, out], fc2 [out, in].
struct SideSums {
  float *q, *kv, *proj, *fc1, *fc2, *q_bias, *kv_bias, *proj_bias, *fc1_bias, *fc2_bias;
  float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  int64_t count = 0;

  SideSums(const SideSizes& s, float* base) {
    const int64_t width = padded(s.width), wide = padded(2 * s.width), hidden = padded(s.hidden);
    const auto take = [&](float*& part, int64_t size) { part = base + count, count += size; };
    take(q, width * width), take(kv, width * wide), take(proj, width * width);
    take(fc1, width * hidden), take(fc2, width * hidden);
    take(q_bias, width), take(kv_bias, wide), take(proj_bias, width);
    take(fc1_bias, hidden), take(fc2_bias, width);
    take(norm1_weight, width), take(norm1_bias, width);
    take(norm2_weight, width), take(norm2_bias, width);
  }
};

// One head of one image, packed, its gradients, and what attend_packed and its backward work in.
template <int DP>
struct SideHead {
  float *q, *k, *v, *grads, *grad_q, *grad_k, *grad_v, *work;
  int64_t floats = 0;

  SideHead(const SideSizes& s, float* base) {
    const int64_t some = s.queries, every = s.tokens + s.prompts;
    const auto take = [&](float*& part, int64_t count) {
      part = base + floats, floats += count;
    };
    take(q, up_to(some, W) * DP), take(grads, up_to(some, W) * DP);
    take(grad_q, up_to(some, W) * DP), take(k, up_to(every, W) * DP), take(v, up_to(every, W) * DP);
    take(grad_k, up_to(every, W) * DP), take(grad_v, up_to(every, W) * DP);
    const int64_t longer = 2 * some > every ? 2 * some : every;
    take(work, (4 * DP + longer) * W + up_to(some, W));
  }
};

// Where a group's rows are, and its scratch.
template <class Math>
struct SideRows {
  using Element = typename Math::Element;
  int64_t queries, all;         // rows that go through the whole layer, and rows
  int64_t width, wide, hidden;  // strides
  float *seen, *standard1, *inverse1, *normed1, *q, *kv, *attended, *middle, *standard2, *inverse2,
      *normed2, *inner, *slopes, *out;
  float *grad_out, *grad_inner, *grad_middle, *grad_attended, *grad_q, *grad_kv, *grad_seen;
  float* heads;
  Element *ready, *outer;
  int64_t bytes = 0;

  SideRows(const SideSizes& s, int64_t images, void* base, bool backward) {
    char* at = static_cast<char*>(base);
    queries = images * s.queries, all = images * (s.tokens + s.prompts);
    width = padded(s.width), wide = padded(2 * s.width), hidden = padded(s.hidden);
    const int64_t some = padded(queries), every = padded(all);
    const auto floats = [&](int64_t count) { return take<float>(at, count); };
    seen = floats(every * width), normed1 = floats(every * width), inverse1 = floats(every);
    q = floats(some * width), kv = floats(every * wide), attended = floats(some * width);
    middle = floats(some * width), normed2 = floats(some * width), inverse2 = floats(some);
    inner = floats(some * hidden), out = floats(some * width);
    const int64_t back = backward;
    standard1 = floats(back * every * width), standard2 = floats(back * some * width);
    slopes = floats(back * some * hidden), grad_inner = floats(back * some * hidden);
    grad_out = floats(back * some * width), grad_middle = floats(back * some * width);
    grad_attended = floats(back * some * width), grad_q = floats(back * some * width);
    grad_kv = floats(back * every * wide), grad_seen = floats(back * every * width);
    heads = floats(SideHead<16>(s, nullptr).floats);
    const int64_t of_width = Math::rows_size(all, s.width);
    const int64_t of_kv = Math::rows_size(all, 2 * s.width);
    const int64_t of_hidden = Math::rows_size(queries, s.hidden);
    int64_t most = of_width > of_hidden ? of_width : of_hidden;
    most = most > of_kv ? most : of_kv;
    ready = take<Element>(at, most);
    const int64_t outer_kv = Math::outer_size(all, s.width, 2 * s.width);
    const int64_t outer_hidden = Math::outer_size(queries, s.width, s.hidden);
    outer = take<Element>(at, back * (outer_kv > outer_hidden ? outer_kv : outer_hidden));
  }

  template <class T>
  T* take(char* base, int64_t count) {
    T* part = reinterpret_cast<T*>(base + bytes);
    bytes += up_to(count * int64_t(sizeof(T)), 64);
    return part;
  }
};

// `use(matrix of [images, of_image, width], first row in it, first row of the group, rows)` for every
// run of rows that stand together in both.
template <class Use>
static void for_each_run(const SideSizes& s, int64_t images, float* tokens, float* prompts,
                         Use use) {
  const int64_t others = s.tokens - s.queries;
  for (int64_t image = 0; image < images; ++image) {
    use(tokens, image * s.tokens, image * s.queries, s.queries);
    use(tokens, image * s.tokens + s.queries, images * s.queries + image * others, others);
    use(prompts, image * s.prompts, images * s.tokens + image * s.prompts, s.prompts);
  }
}

static void rows_in(const float* from, int64_t rows, int64_t width, float* to) {
  const int64_t stride = padded(width);
  for (int64_t row = 0; row < rows; ++row) {
    __builtin_memcpy(to + row * stride, from + row * width, 4 * width);
    for (int64_t i = width; i < stride; ++i) to[row * stride + i] = 0.0f;
  }
}

static void rows_out(const float* from, int64_t rows, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row)
    __builtin_memcpy(to + row * width, from + row * padded(width), 4 * width);
}

static FPT_INLINE float sum_of_row(const float* row, int64_t stride) {
  F sum{};
  for (int64_t i = 0; i < stride; i += W) sum += load(row + i);
  return sum_of_lanes(sum);
}

// normed = standard * weight + bias, standard = (x - mean) * inverse; `standard` may be null.
static void normalise(const float* x, int64_t rows, int64_t width, float eps, const float* weight,
                      const float* bias, float* standard, float* inverse, float* normed) {
  const int64_t stride = padded(width);
  const float share = 1.0f / float(width);
  for (int64_t row = 0; row < rows; ++row) {
    float* to = normed + row * stride;
    const float mean = sum_of_row(x + row * stride, stride) * share;
    for (int64_t i = 0; i < stride; i += W) store(to + i, load(x + row * stride + i) - splat(mean));
    for (int64_t i = width; i < stride; ++i) to[i] = 0.0f;
    F squares{};
    for (int64_t i = 0; i < stride; i += W) squares += load(to + i) * load(to + i);
    inverse[row] = 1.0f / __builtin_sqrtf(sum_of_lanes(squares) * share + eps);
    for (int64_t i = 0; i < stride; i += W) {
      const F plain = load(to + i) * splat(inverse[row]);
      if (standard) store(standard + row * stride + i, plain);
      store(to + i, plain * load(weight + i) + load(bias + i));
    }
  }
}

// grad becomes the gradient of normalise's x; those of weight and bias are added up.
static void normalise_backward(const float* standard, const float* inverse, const float* weight,
                               int64_t rows, int64_t width, float* grad, float* grad_weight,
                               float* grad_bias) {
  const int64_t stride = padded(width);
  const float share = 1.0f / float(width);
  // Sixteen rows at a time: long sums would gather rounding errors.
  for (int64_t first = 0; first < rows; first += 16) {
    const int64_t end = first + 16 < rows ? first + 16 : rows;
    for (int64_t i = 0; i < stride; i += W) {
      F weights{}, biases{};
      for (int64_t row = first; row < end; ++row) {
        const F of_row = load(grad + row * stride + i);
        biases += of_row;
        weights += of_row * load(standard + row * stride + i);
      }
      store(grad_weight + i, load(grad_weight + i) + weights);
      store(grad_bias + i, load(grad_bias + i) + biases);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* to = grad + row * stride;
    const float* plain = standard + row * stride;
    F sum{}, along{};
    for (int64_t i = 0; i < stride; i += W) {
      const F of_plain = load(to + i) * load(weight + i);
      store(to + i, of_plain);
      sum += of_plain;
      along += of_plain * load(plain + i);
    }
    const F mean = splat(sum_of_lanes(sum) * share), slope = splat(sum_of_lanes(along) * share);
    for (int64_t i = 0; i < stride; i += W)
      store(to + i, (load(to + i) - mean - load(plain + i) * slope) * splat(inverse[row]));
    for (int64_t i = width; i < stride; ++i) to[i] = 0.0f;
  }
}

// to [stride] += the sum of the rows
static void add_rows(const float* rows, int64_t count, int64_t stride, float* to) {
  for (int64_t first = 0; first < count; first += 16)
    for (int64_t i = 0; i < stride; i += W) {
      F sum{};
      for (int64_t row = first; row < count && row < first + 16; ++row)
        sum += load(rows + row * stride + i);
      store(to + i, load(to + i) + sum);
    }
}

static void add_to(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += W) store(to + i, load(to + i) + load(from + i));
}

// Keys or values of an image: its rows of the group, one after another.
template <int DP, class Use>
static void for_each_key_run(const SideSizes& s, int64_t images, int64_t image, Use use) {
  const int64_t others = s.tokens - s.queries;
  use(image * s.queries, s.queries, int64_t(0));
  use(images * s.queries + image * others, others, s.queries);
  use(images * s.tokens + image * s.prompts, s.prompts, s.tokens);
}

template <int DP, class Math>
static PackedHead pack_side_head(const SideSizes& s, const SideGroup& g, const SideRows<Math>& r,
                                 int64_t image, int64_t head, const SideHead<DP>& to) {
  const int64_t narrow = s.width / s.heads;
  const float* q = r.q + image * s.queries * r.width + head * narrow;
  pack_rows<DP>({q, r.width, 1}, s.queries, narrow, root_scale(narrow), to.q);
  for_each_key_run<DP>(s, g.images, image, [&](int64_t row, int64_t rows, int64_t first) {
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
      for_each_key_run<DP>(s, g.images, image, [&](int64_t row, int64_t rows, int64_t first) {
        float* to = r.grad_kv + row * r.wide + head * task.width;
        for (int64_t i = 0; i < rows; ++i, to += r.wide) {
          __builtin_memcpy(to, packed.grad_k + (first + i) * task.width, 4 * task.width);
          __builtin_memcpy(to + s.width, packed.grad_v + (first + i) * task.width, 4 * task.width);
        }
      });
    }
}

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
    store(r.inner + i, gelu_and_slope(load(r.inner + i)).value);
  const auto inner = Math::ready(r.inner, r.hidden, r.queries, s.hidden, r.ready);
  Math::multiply(inner, r.queries, p.fc2.forward, s.width, {r.out, r.width, p.fc2.bias, 0});
  add_to(r.middle, r.queries * r.width, r.out);
  rows_out(r.out, r.queries, s.width, g.out);
}

// grad_out -> grad_middle, and the gradients of the MLP and its norm.
template <class Math>
static void side_mlp_backward(const SideSizes& s, const SidePacked<Math>& p,
                              const SideRows<Math>& r, const SideSums& sums) {
  for (int64_t i = 0; i < r.queries * r.hidden; i += W) {
    const Gelu both = gelu_and_slope(load(r.inner + i));
    store(r.inner + i, both.value);
    store(r.slopes + i, both.slope);
  }
  Math::outer(r.grad_out, r.width, s.width, r.inner, r.hidden, s.hidden, r.queries, r.outer,
              sums.fc2);
  add_rows(r.grad_out, r.queries, r.width, sums.fc2_bias);
  const auto out = Math::ready(r.grad_out, r.width, r.queries, s.width, r.ready);
  Math::multiply(out, r.queries, p.fc2.backward, s.hidden, {r.grad_inner, r.hidden, nullptr, 0});
  for (int64_t i = 0; i < r.queries * r.hidden; i += W)
    store(r.grad_inner + i, load(r.grad_inner + i) * load(r.slopes + i));
  Math::outer(r.normed2, r.width, s.width, r.grad_inner, r.hidden, s.hidden, r.queries, r.outer,
              sums.fc1);
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
              sums.proj);
  add_rows(r.grad_middle, r.queries, r.width, sums.proj_bias);
  const auto middle = Math::ready(r.grad_middle, r.width, r.queries, s.width, r.ready);
  Math::multiply(middle, r.queries, p.proj.backward, s.width,
                 {r.grad_attended, r.width, nullptr, 0});
  if (r.width != s.width) __builtin_memset(r.grad_q, 0, 4 * r.queries * r.width);
  if (r.wide != 2 * s.width) __builtin_memset(r.grad_kv, 0, 4 * r.all * r.wide);
  s.width / s.heads <= 8 ? side_heads_backward_of<8>(s, g, r) : side_heads_backward_of<16>(s, g, r);
  Math::outer(r.normed1, r.width, s.width, r.grad_q, r.width, s.width, r.queries, r.outer, sums.q);
  Math::outer(r.normed1, r.width, s.width, r.grad_kv, r.wide, 2 * s.width, r.all, r.outer, sums.kv);
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
  side_project(s, g, p, r, true);
  rows_in(g.attended, r.queries, s.width, r.attended);
  rows_in(g.out, r.queries, s.width, r.grad_out);
  side_middle(s, p, r, true);
  side_mlp_backward(s, p, r, sums);
  side_attention_half_backward(s, g, p, r, sums);
  for_each_run(s, g.images, g.grad_tokens, g.grad_prompts,
               [&](float* to, int64_t row, int64_t from, int64_t rows) {
                 rows_out(r.grad_seen + from * r.width, rows, s.width, to + row * s.width);
               });
}

// Rows `first` .. of the padded [in, out] -> [out, in], or [out, in] as it is.
static void write_matrix(const float* from, int64_t in, int64_t out, bool turned, float* to) {
  const int64_t stride = padded(turned ? out : in);
  for (int64_t first = 0; first < out; first += 16)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t o = first; o < out && o < first + 16; ++o)
        to[o * in + i] = turned ? from[i * stride + o] : from[o * stride + i];
}

static void write_vector(const float* from, int64_t count, float* to) {
  __builtin_memcpy(to, from, 4 * count);
}

static void side_gradients(const SideSizes& s, float* base, const SideWeightGradients& to) {
  const SideSums sums(s, base);
  const int64_t width = s.width;
  write_vector(sums.norm1_weight, width, to.norm1), write_vector(sums.norm1_bias, width, to.norm1_bias);
  write_matrix(sums.q, width, width, true, to.qkv);
  write_matrix(sums.kv, width, 2 * width, true, to.qkv + width * width);
  write_vector(sums.q_bias, width, to.qkv_bias);
  write_vector(sums.kv_bias, 2 * width, to.qkv_bias + width);
  write_matrix(sums.proj, width, width, true, to.proj);
  write_vector(sums.proj_bias, width, to.proj_bias);
  write_vector(sums.norm2_weight, width, to.norm2), write_vector(sums.norm2_bias, width, to.norm2_bias);
  write_matrix(sums.fc1, width, s.hidden, true, to.fc1);
  write_vector(sums.fc1_bias, s.hidden, to.fc1_bias);
  write_matrix(sums.fc2, s.hidden, width, false, to.fc2);
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
