// Gradients of side_layers' matrices, left^T right over the rows of all images.
//
// Every group of images keeps its rows of both factors, as the products want them, and when a round of
// groups is done each product is one over all their rows: its sums stay in registers and tiles, and
// threads share out its columns, not the images.

constexpr int64_t FACTOR_COLUMNS = 32;  // of a task

template <class Math>
struct SideFactors {
  using Element = typename Math::Element;
  struct Product {
    Element *left, *right;
    int64_t deep, wide;  // rows of both, columns of the right one
  };
  Product qkv, proj, fc1, fc2;  // fc2 is [out, in], the others [in, out]
  int64_t tall;                 // columns of every left one
  int64_t bytes = 0;

  SideFactors(const SideSizes& s, const SideRound& round, void* base) : tall(padded(s.width)) {
    char* at = static_cast<char*>(base);
    const auto product = [&](Product& p, int64_t rows, int64_t wide) {
      p.deep = Math::whole_deep(round.groups * Math::whole_rows(round.images * rows));
      p.wide = wide;
      p.left = take(at, Math::left_size(p.deep, tall));
      p.right = take(at, Math::right_size(p.deep, wide));
    };
    product(qkv, s.tokens + s.prompts, padded(s.width) + padded(2 * s.width));
    product(proj, s.queries, padded(s.width));
    product(fc1, s.queries, padded(s.hidden));
    product(fc2, s.queries, padded(s.hidden));
  }

  // The last group's rows end with zeros up to the whole depth.
  static KeptRows rows_of(const SideRound& round, int64_t number, const Product& p, const float* data,
                          int64_t stride, int64_t count, int64_t rows) {
    const int64_t of_group = Math::whole_rows(round.images * rows), at = number * of_group;
    return {data, stride, count, at, number + 1 == round.groups ? p.deep - at : of_group};
  }

 private:
  Element* take(char* base, int64_t count) {
    Element* part = reinterpret_cast<Element*>(base + bytes);
    bytes += up_to(count * int64_t(sizeof(Element)), 64);
    return part;
  }
};

// Gradients of the weights: matrices, and vectors by groups.
struct SideSums {
  float *qkv, *proj, *fc1, *fc2;
  int64_t matrices = 0;
  float *q_bias, *kv_bias, *proj_bias, *fc1_bias, *fc2_bias;
  float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  int64_t vectors = 0;

  SideSums(const SideSizes& s, float* base, float* of_group) {
    const int64_t width = padded(s.width), wide = padded(2 * s.width), hidden = padded(s.hidden);
    const auto matrix = [&](float*& part, int64_t columns) {
      part = base + matrices, matrices += width * columns;
    };
    matrix(qkv, width + wide), matrix(proj, width), matrix(fc1, hidden), matrix(fc2, hidden);
    const auto vector = [&](float*& part, int64_t size) {
      part = of_group + vectors, vectors += size;
    };
    vector(q_bias, width), vector(kv_bias, wide), vector(proj_bias, width);
    vector(fc1_bias, hidden), vector(fc2_bias, width);
    vector(norm1_weight, width), vector(norm1_bias, width);
    vector(norm2_weight, width), vector(norm2_bias, width);
  }
};

// Of the padded [in, out], rows `stride` apart, `out` columns -> [out, in].
static void write_turned(const float* from, int64_t stride, int64_t in, int64_t out, float* to) {
  for (int64_t first = 0; first < out; first += 16)
    for (int64_t row = 0; row < in; row += 16) {
      const int64_t rows = in - row < 16 ? in - row : 16;
      const int64_t columns = out - first < 16 ? out - first : 16;
#if FPT_WIDTH == 16
      F block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] = i < rows ? load(from + (row + i) * stride + first) : F{};
      transpose(block);
      const __mmask16 wanted = __mmask16((1u << rows) - 1);
      for (int64_t o = 0; o < columns; ++o)
        _mm512_mask_storeu_ps(to + (first + o) * in + row, wanted, (__m512)block[o]);
#else
      for (int64_t i = row; i < row + rows; ++i)
        for (int64_t o = first; o < first + columns; ++o) to[o * in + i] = from[i * stride + o];
#endif
    }
}

// Columns first .. end of a sum -> rows of a gradient [out, in], whose columns begin at `from` of it.
static void write_columns(const float* sum, int64_t stride, int64_t first, int64_t end, int64_t from,
                          int64_t in, int64_t out, float* to) {
  const int64_t begin = first > from ? first : from, stop = end < from + out ? end : from + out;
  if (begin < stop)
    write_turned(sum + begin, stride, in, stop - begin, to + (begin - from) * in);
}

// Tasks first .. end of a round: some columns of one product each, added to those of earlier rounds;
// and written to the gradients where they are given.
template <class Math>
static void multiply_factors_of(const SideSizes& s, const SideRound& round, int64_t first,
                                int64_t end, float* sums, const SideWeightGradients* gradients) {
  const SideFactors<Math> f(s, round, round.factors);
  const SideSums of(s, sums, nullptr);
  int64_t task = 0;
  const auto multiply = [&](const auto& p, float* sum, auto write) {
    for (int64_t column = 0; column < p.wide; column += FACTOR_COLUMNS, ++task) {
      if (task < first || task >= end) continue;
      const int64_t left = p.wide - column, count = left < FACTOR_COLUMNS ? left : FACTOR_COLUMNS;
      Math::multiply_kept(p.left, p.right, p.deep, f.tall, p.wide, column, count, round.more, sum);
      if (gradients) write(column, column + count);
    }
  };
  const int64_t width = s.width, start = padded(width);
  multiply(f.qkv, of.qkv, [&](int64_t from, int64_t to) {
    write_columns(of.qkv, f.qkv.wide, from, to, 0, width, width, gradients->qkv);
    write_columns(of.qkv, f.qkv.wide, from, to, start, width, 2 * width,
                  gradients->qkv + width * width);
  });
  multiply(f.proj, of.proj, [&](int64_t from, int64_t to) {
    write_columns(of.proj, f.proj.wide, from, to, 0, width, width, gradients->proj);
  });
  multiply(f.fc1, of.fc1, [&](int64_t from, int64_t to) {
    write_columns(of.fc1, f.fc1.wide, from, to, 0, width, s.hidden, gradients->fc1);
  });
  multiply(f.fc2, of.fc2, [&](int64_t from, int64_t to) {
    const int64_t count = (to < s.hidden ? to : s.hidden) - from;
    for (int64_t row = 0; count > 0 && row < width; ++row)
      __builtin_memcpy(gradients->fc2 + row * s.hidden + from, of.fc2 + row * f.fc2.wide + from,
                       4 * count);
  });
}

static int64_t factor_tasks(const SideSizes& s) {
  const auto of = [](int64_t wide) { return up_to(wide, FACTOR_COLUMNS) / FACTOR_COLUMNS; };
  const int64_t width = padded(s.width);
  return of(width + padded(2 * s.width)) + of(width) + 2 * of(padded(s.hidden));
}

static void write_vector(const float* from, int64_t count, float* to) {
  __builtin_memcpy(to, from, 4 * count);
}

// vectors [groups, count of SideSums]: their sums, in the groups' order, to the first, and from there
// to the gradients.
static void side_vector_gradients(const SideSizes& s, float* vectors, int64_t groups,
                                  const SideWeightGradients& to) {
  const SideSums sums(s, nullptr, vectors);
  const int64_t width = s.width;
  if (groups == 0) {
    __builtin_memset(vectors, 0, 4 * sums.vectors);
    __builtin_memset(to.qkv, 0, 4 * 3 * width * width), __builtin_memset(to.proj, 0, 4 * width * width);
    __builtin_memset(to.fc1, 0, 4 * s.hidden * width), __builtin_memset(to.fc2, 0, 4 * s.hidden * width);
  }
  for (int64_t group = 1; group < groups; ++group)
    add_to(vectors + group * sums.vectors, sums.vectors, vectors);
  write_vector(sums.norm1_weight, width, to.norm1);
  write_vector(sums.norm1_bias, width, to.norm1_bias);
  write_vector(sums.q_bias, width, to.qkv_bias);
  write_vector(sums.kv_bias, 2 * width, to.qkv_bias + width);
  write_vector(sums.proj_bias, width, to.proj_bias);
  write_vector(sums.norm2_weight, width, to.norm2);
  write_vector(sums.norm2_bias, width, to.norm2_bias);
  write_vector(sums.fc1_bias, s.hidden, to.fc1_bias);
  write_vector(sums.fc2_bias, width, to.fc2_bias);
}
