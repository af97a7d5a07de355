// What a layer of side_layers works on: its packed weights, the rows of a group of images and its
// scratch, and what is done to rows: LayerNorm and sums.

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
static void pack_side_of(const SideSizes& s, const SideWeights& w, bool backward, int64_t map,
                         void* to) {
  const SidePacked<Math> p(s, to, backward);
  const int64_t width = s.width, square = width * width;
  switch (map) {
    case 0:
      pad_vector(w.norm1, width, p.norm1_weight), pad_vector(w.norm1_bias, width, p.norm1_bias);
      pad_vector(w.norm2, width, p.norm2_weight), pad_vector(w.norm2_bias, width, p.norm2_bias);
      return pack_linear<Math>(w.qkv, w.qkv_bias, width, width, backward, p.q);
    case 1:
      return pack_linear<Math>(w.qkv + square, w.qkv_bias + width, width, 2 * width, backward, p.kv);
    case 2: return pack_linear<Math>(w.proj, w.proj_bias, width, width, backward, p.proj);
    case 3: return pack_linear<Math>(w.fc1, w.fc1_bias, width, s.hidden, backward, p.fc1);
    default: return pack_linear<Math>(w.fc2, w.fc2_bias, s.hidden, width, backward, p.fc2);
  }
}

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

// Of either kind of head.
static int64_t side_head_floats(const SideSizes& s) {
  const int64_t floats = SideHead<16>(s, nullptr).floats;
#if FPT_AMX
  const int64_t tiled = TiledHeads<16>(s, nullptr).floats;
  if (tiled > floats) return tiled;
#endif
  return floats;
}

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
  Element *ready, *ready_width, *ready_out;  // the last two: of the queries' rows
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
    slopes = floats(back * some * hidden);
    grad_out = floats(back * some * width), grad_attended = floats(back * some * width);
    // Each takes the place of what is read for the last time before it is written.
    grad_inner = inner, grad_middle = middle, grad_q = q, grad_kv = kv, grad_seen = seen;
    heads = floats(side_head_floats(s));
    const int64_t of_width = Math::rows_size(all, s.width);
    const int64_t of_kv = Math::rows_size(all, 2 * s.width);
    const int64_t of_hidden = Math::rows_size(queries, s.hidden);
    int64_t most = of_width > of_hidden ? of_width : of_hidden;
    most = most > of_kv ? most : of_kv;
    ready = take<Element>(at, most);
    const int64_t of_queries = Math::NARROW ? Math::rows_size(queries, s.width) : 0;
    ready_width = take<Element>(at, of_queries), ready_out = take<Element>(at, back * of_queries);
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

// Keys or values of an image: its rows of the group, one after another.
template <class Use>
FPT_INLINE void for_each_key_run(const SideSizes& s, int64_t images, int64_t image, Use use) {
  const int64_t others = s.tokens - s.queries;
  use(image * s.queries, s.queries, int64_t(0));
  use(images * s.queries + image * others, others, s.queries);
  use(images * s.tokens + image * s.prompts, s.prompts, s.tokens);
}

static void rows_in(const float* from, int64_t rows, int64_t width, float* to) {
  const int64_t stride = padded(width);
  if (stride == width) {
    __builtin_memcpy(to, from, 4 * rows * width);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    __builtin_memcpy(to + row * stride, from + row * width, 4 * width);
    for (int64_t i = width; i < stride; ++i) to[row * stride + i] = 0.0f;
  }
}

static void rows_out(const float* from, int64_t rows, int64_t width, float* to) {
  if (padded(width) == width) {
    __builtin_memcpy(to, from, 4 * rows * width);
    return;
  }
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
