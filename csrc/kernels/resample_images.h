// Crop, resizing and colours of one channel of an image: levels through an affine map with a clamp,
// then weighted sums of rows, then of columns.

FPT_INLINE F gathered(const float* from, const int32_t* index) {
#if FPT_WIDTH == 16
  return (F)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, _mm512_loadu_si512(index), from, 4);
#elif FPT_WIDTH == 8
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return (F)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), from,
                                     _mm256_loadu_si256((const __m256i*)index), all, 4);
#else
  return F{from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
#endif
}

static int64_t resample_scratch(const ResampleTask& task) {
  return (task.height + 1) * (up_to(task.width, W) + W);
}

template <class T>
static void map_levels(const ResampleTask& task, int64_t stride, float* to) {
  const auto* levels = static_cast<const T*>(task.levels);
  const F low = splat(task.low), high = splat(task.high);
  for (int64_t row = 0; row < task.height; ++row, levels += task.width, to += stride)
    for (int64_t x = 0; x < task.width; x += W) {
      F values{};
      const int64_t wanted = task.width - x < W ? task.width - x : W;
      if (wanted == W) {
        typedef T Some __attribute__((vector_size(W * sizeof(T)), aligned(1), may_alias));
        values = __builtin_convertvector(*reinterpret_cast<const Some*>(levels + x), F);
      } else {
        for (int64_t i = 0; i < wanted; ++i) values[i] = float(levels[x + i]);
      }
      values = values * task.scale + task.shift;
      values = values < low ? low : values;
      store(to + x, values > high ? high : values);
    }
}

// One row of the output, as wide as the input.
static void weigh_rows(const ResampleTask& task, int64_t stride, const float* mapped, int64_t out,
                       float* to) {
  const int64_t* index = task.row_index + out * task.row_taps;
  const float* weight = task.row_weight + out * task.row_taps;
  for (int64_t x = 0; x < stride; x += W) {
    F sum{};
    for (int64_t tap = 0; tap < task.row_taps; ++tap)
      sum += load(mapped + index[tap] * stride + x) * weight[tap];
    store(to + x, sum);
  }
}

static void weigh_columns(const ResampleTask& task, const float* row, float* to) {
  const int64_t padded = up_to(task.columns, W);
  for (int64_t column = 0; column < task.columns; column += W) {
    F sum{};
    for (int64_t tap = 0; tap < task.column_taps; ++tap)
      sum += gathered(row, task.column_index + tap * padded + column) *
             load(task.column_weight + tap * padded + column);
    sum = sum * task.out_scale + task.out_shift;
    if (task.columns - column >= W) store(to + column, sum);
    else
      for (int64_t i = 0; column + i < task.columns; ++i) to[column + i] = sum[i];
  }
}

static void resample_image(const ResampleTask& task) {
  const int64_t stride = up_to(task.width, W);
  float* row = task.scratch + task.height * stride;
  if (task.is_deep) map_levels<uint16_t>(task, stride, task.scratch);
  else map_levels<uint8_t>(task, stride, task.scratch);
  for (int64_t out = 0; out < task.rows; ++out) {
    weigh_rows(task, stride, task.scratch, out, row);
    weigh_columns(task, row, task.out + out * task.columns);
  }
}
