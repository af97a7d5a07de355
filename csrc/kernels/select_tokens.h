// select_tokens: the K highest scores by radix selection, then copies that convert as they go.

// An unsigned number that is ordered like the float: flips the sign bit of positive numbers and all
// bits of negative ones.  Adding zero makes both zeros one; NaN is lowest.
FPT_INLINE uint32_t order_key(float x) {
  if (x != x) return 0;
  const uint32_t bits = bits_of_float(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

FPT_INLINE uint64_t order_key(double x) {
  if (x != x) return 0;
  x += 0.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// The `keep`-th highest key; `ties` becomes how many of the keys equal to it are kept.
template <class Key>
static Key kth_highest(const Key* keys, int64_t tokens, int64_t keep, int64_t& ties) {
  Key prefix = 0, fixed = 0;  // the bits known so far, and which those are
  int64_t wanted = keep;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    int64_t count[256] = {};
    for (int64_t i = 0; i < tokens; ++i)
      if ((keys[i] & fixed) == prefix) ++count[keys[i] >> shift & 0xff];
    int digit = 255;
    for (; count[digit] < wanted; --digit) wanted -= count[digit];
    prefix |= Key(digit) << shift;
    fixed |= Key(0xff) << shift;
  }
  ties = wanted;
  return prefix;
}

template <class Key, class T>
static void select_of(const SelectTask& task) {
  const auto* scores = static_cast<const typename T::Value*>(task.scores);
  auto* keys = static_cast<Key*>(task.keys);
  for (int64_t i = 0; i < task.tokens; ++i) keys[i] = order_key(T::one(scores[i * task.stride]));
  int64_t ties;
  const Key lowest = kth_highest(keys, task.tokens, task.keep, ties);
  int64_t kept = 0;
  for (int64_t i = 0; kept < task.keep; ++i) {
    const bool tie = keys[i] == lowest && ties > 0;
    ties -= tie;
    task.index[kept] = int32_t(i);
    kept += tie || keys[i] > lowest;
  }
}

static void select_tokens(const SelectTask& task) {
  switch (task.kind) {
    case Kind::f16: return select_of<uint32_t, F16>(task);
    case Kind::bf16: return select_of<uint32_t, BF16>(task);
    case Kind::f32: return select_of<uint32_t, F32>(task);
    case Kind::f64: return select_of<uint64_t, F64>(task);
  }
}

template <class From, class To>
static void gather_of(const GatherTask& task) {
  const auto* from = static_cast<const typename From::Value*>(task.from);
  auto* to = static_cast<typename To::Value*>(task.to);
  for (int64_t row = 0; row < task.rows; ++row, to += task.width) {
    const auto* source = from + task.index[row] * task.row_stride;
    int64_t column = 0;
    if constexpr (sizeof(typename From::Value) <= 4 && sizeof(typename To::Value) <= 4) {
      if (task.column_stride == 1)
        for (; column + W <= task.width; column += W)
          To::put(to + column, From::some(source + column));
    }
    for (; column < task.width; ++column)
      to[column] = To::of(From::one(source[column * task.column_stride]));
  }
}

// Bits are copied as they are: a signalling NaN would come out of a conversion as a quiet one.
template <class Value>
static void copy_rows(const GatherTask& task) {
  const auto* from = static_cast<const Value*>(task.from);
  auto* to = static_cast<Value*>(task.to);
  for (int64_t row = 0; row < task.rows; ++row, to += task.width) {
    const Value* source = from + task.index[row] * task.row_stride;
    if (task.column_stride == 1) {
      __builtin_memcpy(to, source, task.width * sizeof(Value));
    } else {
      for (int64_t column = 0; column < task.width; ++column)
        to[column] = source[column * task.column_stride];
    }
  }
}

template <class From>
static void gather_from(const GatherTask& task) {
  if (task.to_kind == task.from_kind) return copy_rows<typename From::Value>(task);
  switch (task.to_kind) {
    case Kind::f16: return gather_of<From, F16>(task);
    case Kind::bf16: return gather_of<From, BF16>(task);
    case Kind::f32: return gather_of<From, F32>(task);
    case Kind::f64: return gather_of<From, F64>(task);
  }
}

static void gather_rows(const GatherTask& task) {
  switch (task.from_kind) {
    case Kind::f16: return gather_from<F16>(task);
    case Kind::bf16: return gather_from<BF16>(task);
    case Kind::f32: return gather_from<F32>(task);
    case Kind::f64: return gather_from<F64>(task);
  }
}
