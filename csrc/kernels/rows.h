// Rows of a head: read as f32 or as pairs of bf16, written in the kind of the task.

FPT_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Row `row` of a matrix as f32, or as pairs of bf16.  Beyond the width: zeros.
template <class Type>
FPT_INLINE void unpack_row(const Matrix& matrix, int64_t row, int64_t width, float* to,
                           int64_t padded) {
  const auto* from = static_cast<const typename Type::Value*>(matrix.data) + row * matrix.row_stride;
  int64_t column = 0;
  if (matrix.column_stride == 1)
    for (; column + W <= width; column += W) store(to + column, Type::some(from + column));
  for (; column < width; ++column) to[column] = Type::one(from[column * matrix.column_stride]);
  for (; column < padded; ++column) to[column] = 0.0f;
}

static void unpack(const Matrix& matrix, Kind kind, int64_t row, int64_t width, float* to,
                   int64_t padded) {
  switch (kind) {
    case Kind::f16: return unpack_row<F16>(matrix, row, width, to, padded);
    case Kind::bf16: return unpack_row<BF16>(matrix, row, width, to, padded);
    default: return unpack_row<F32>(matrix, row, width, to, padded);
  }
}

#if FPT_BF16
static void unpack(const Matrix& matrix, Kind, int64_t row, int64_t width, uint32_t* to,
                   int64_t padded) {
  const auto* from = static_cast<const uint16_t*>(matrix.data) + row * matrix.row_stride;
  auto* halves = reinterpret_cast<unsigned char*>(to);
  if (matrix.column_stride == 1) {
    __builtin_memcpy(halves, from, width * 2);
  } else {
    for (int64_t column = 0; column < width; ++column)
      __builtin_memcpy(halves + 2 * column, from + column * matrix.column_stride, 2);
  }
  __builtin_memset(halves + 2 * width, 0, 4 * padded - 2 * width);
}
#endif

template <class Type>
FPT_INLINE void write_row(const float* from, float factor, int64_t width, void* out, int64_t at) {
  auto* to = static_cast<typename Type::Value*>(out) + at;
  int64_t column = 0;
  for (; column + W <= width; column += W)
    Type::put(to + column, load(from + column) * splat(factor));
  for (; column < width; ++column) to[column] = Type::of(from[column] * factor);
}

static void write_row(const AttentionTask& task, int64_t row, const float* from, float factor) {
  const int64_t at = row * task.out_stride;
  switch (task.kind) {
    case Kind::f16: return write_row<F16>(from, factor, task.width, task.out, at);
    case Kind::bf16: return write_row<BF16>(from, factor, task.width, task.out, at);
    default: return write_row<F32>(from, factor, task.width, task.out, at);
  }
}
