// The MLP's inner rows: fc1 and GELU forward, and their gradients.
//
// They are the widest rows of a layer.  In bf16 a block of 32 columns is made and used while it is in
// the first-level cache, and only what products read of it is kept; in f32 products are by rows.

// normed2 -> the inner rows after their GELU, as fc2 wants them.
template <class Math>
static auto side_inner(const SideSizes& s, const SidePacked<Math>& p, const SideRows<Math>& r) {
  const auto normed = Math::ready(r.normed2, r.width, r.queries, s.width, r.ready);
  Math::multiply(normed, r.queries, p.fc1.forward, s.hidden, {r.inner, r.hidden, p.fc1.bias, 0});
  for (int64_t i = 0; i < r.queries * r.hidden; i += W)
    store(r.inner + i, gelu<Math::NARROW>(load(r.inner + i)));
  return Math::ready(r.inner, r.hidden, r.queries, s.hidden, r.ready);
}

// normed2 and grad_out -> the gradient of the inner rows, as fc1 wants it; the inner rows and that
// gradient become factors, and fc1_bias is added up.
template <class Math>
static auto side_inner_backward(const SideSizes& s, const SideGroup& g, const SidePacked<Math>& p,
                                const SideRows<Math>& r, const SideSums& sums,
                                const SideFactors<Math>& f) {
  const auto kept = [&](const float* rows) {
    return f.rows_of(g.round, g.number, f.fc1, rows, r.hidden, r.queries, s.queries);
  };
  const auto normed = Math::ready(r.normed2, r.width, r.queries, s.width, r.ready);
  Math::multiply(normed, r.queries, p.fc1.forward, s.hidden, {r.inner, r.hidden, p.fc1.bias, 0});
  for (int64_t i = 0; i < r.queries * r.hidden; i += W) {
    const Gelu both = gelu_with_slope<Math::NARROW>(load(r.inner + i));
    store(r.inner + i, both.value);
    store(r.slopes + i, both.slope);
  }
  Math::keep_right(kept(r.inner), f.fc2.deep, f.fc2.wide, 0, f.fc2.right);
  const auto out = Math::ready(r.grad_out, r.width, r.queries, s.width, r.ready);
  Math::multiply(out, r.queries, p.fc2.backward, s.hidden, {r.grad_inner, r.hidden, nullptr, 0});
  for (int64_t i = 0; i < r.queries * r.hidden; i += W)
    store(r.grad_inner + i, load(r.grad_inner + i) * load(r.slopes + i));
  Math::keep_right(kept(r.grad_inner), f.fc1.deep, f.fc1.wide, 0, f.fc1.right);
  add_rows(r.grad_inner, r.queries, r.hidden, sums.fc1_bias);
  return Math::ready(r.grad_inner, r.hidden, r.queries, s.hidden, r.ready);
}

#if FPT_BF16

constexpr int64_t INNER_ROWS = ROW_TILE * TILE_ROWS_AT_ONCE, INNER_COLUMNS = 32;

// `use(first row, its end, first column, columns)` for every block of the inner rows, by columns: what
// the products read then stays in the first-level cache.
template <class Use>
FPT_INLINE void for_each_inner_block(const SideRows<Parts<1>>& r, Use use) {
  for (int64_t column = 0; column < r.hidden; column += INNER_COLUMNS)
    for (int64_t row = 0; row < r.queries; row += INNER_ROWS)
      use(row, row + INNER_ROWS < r.queries ? row + INNER_ROWS : r.queries, column,
          r.hidden - column < INNER_COLUMNS ? W : INNER_COLUMNS);
}

// to [INNER_ROWS, INNER_COLUMNS]: rows from `row` on times some columns of a packed matrix.
FPT_INLINE void multiply_inner(const Parts<1>::Rows& a, int64_t row, int64_t end,
                               const uint16_t* packed, int64_t column, int64_t columns,
                               const float* bias, float* to) {
  part_block<1>({a.rows.data + row * a.rows.stride, a.rows.stride, 0}, end - row,
                {packed + column * a.depth, 16 * a.depth, 0}, columns, a.depth,
                {to, INNER_COLUMNS, bias ? bias + column : nullptr, 0});
}

// Rows of the inner width to be made ready: columns beyond the padded width are zeros.
static Parts<1>::Rows inner_rows(const SideRows<Parts<1>>& r, const SideSizes& s) {
  const int64_t deep = whole_depth(s.hidden);
  for (int64_t row = 0; deep > r.hidden && row < r.queries; ++row)
    put(r.ready + row * deep + r.hidden, _mm256_setzero_si256());
  return {{r.ready, deep, 0}, deep};
}

static Parts<1>::Rows side_inner(const SideSizes& s, const SidePacked<Parts<1>>& p,
                                 const SideRows<Parts<1>>& r) {
  using P = Parts<1>;
  alignas(64) float block[INNER_ROWS * INNER_COLUMNS];
  const P::Rows normed = P::ready(r.normed2, r.width, r.queries, s.width, r.ready_width);
  const P::Rows inner = inner_rows(r, s);
  for_each_inner_block(r, [&](int64_t row, int64_t end, int64_t column, int64_t columns) {
    multiply_inner(normed, row, end, p.fc1.forward, column, columns, p.fc1.bias, block);
    for (int64_t i = row; i < end; ++i)
      for (int64_t d = 0; d < columns; d += W)
        put(r.ready + i * inner.depth + column + d,
            (__m256i)_mm512_cvtneps_pbh(
                (__m512)rough_gelu(load(block + (i - row) * INNER_COLUMNS + d))));
  });
  return inner;
}

static Parts<1>::Rows side_inner_backward(const SideSizes& s, const SideGroup& g,
                                          const SidePacked<Parts<1>>& p,
                                          const SideRows<Parts<1>>& r, const SideSums& sums,
                                          const SideFactors<Parts<1>>& f) {
  using P = Parts<1>;
  alignas(64) float block[INNER_ROWS * INNER_COLUMNS], grads[INNER_ROWS * INNER_COLUMNS];
  const P::Rows normed = P::ready(r.normed2, r.width, r.queries, s.width, r.ready_width);
  const P::Rows out = P::ready(r.grad_out, r.width, r.queries, s.width, r.ready_out);
  const P::Rows inner = inner_rows(r, s);
  const KeptRows kept = f.rows_of(g.round, g.number, f.fc1, nullptr, 0, r.queries, s.queries);
  for_each_inner_block(r, [&](int64_t first, int64_t end, int64_t column, int64_t columns) {
    multiply_inner(normed, first, end, p.fc1.forward, column, columns, p.fc1.bias, block);
    multiply_inner(out, first, end, p.fc2.backward, column, columns, nullptr, grads);
    for (int64_t d = 0; d < columns; d += W) {
      const int64_t panel = (column + d) * f.fc1.deep;
      F sum{};
      keep_awake<0, 4, 6>();
      for (int64_t row = first; row < end; row += 2) {
        F values[2] = {}, slopes[2] = {};
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i) {
          if (row + i >= end) continue;
          const int64_t at = (row + i - first) * INNER_COLUMNS + d;
          const Gelu both = rough_gelu_and_slope(load(block + at));
          values[i] = both.value, slopes[i] = both.slope * load(grads + at);
          sum += slopes[i];
          put(r.ready + (row + i) * inner.depth + column + d,
              (__m256i)_mm512_cvtneps_pbh((__m512)slopes[i]));
        }
        const int64_t to = panel + (kept.at + row) * 16;
        __m512i pairs;
        pair_parts<1>(values[0], values[1], &pairs);
        _mm512_storeu_si512(f.fc2.right + to, pairs);
        pair_parts<1>(slopes[0], slopes[1], &pairs);
        _mm512_storeu_si512(f.fc1.right + to, pairs);
      }
      float* bias = sums.fc1_bias + column + d;
      store(bias, load(bias) + sum);
    }
  });
  // The factors' rows after the last of the group.
  for (int64_t panel = 0; panel < r.hidden; panel += W)
    for (int64_t row = r.queries + r.queries % 2; row < kept.span; row += 2) {
      const int64_t to = panel * f.fc1.deep + (kept.at + row) * 16;
      _mm512_storeu_si512(f.fc2.right + to, _mm512_setzero_si512());
      _mm512_storeu_si512(f.fc1.right + to, _mm512_setzero_si512());
    }
  return inner;
}

#endif
