// clipped_adam: pieces of tensors, each in the same order whoever computes it.

// Of squares in f32, by lanes and in four chains; a piece is short.
static float sum_of_squares(const float* values, int64_t count) {
  F sums[4]{};
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W)
    for (int chain = 0; chain < 4; ++chain) {
      const F x = load(values + i + chain * W);
      sums[chain] += x * x;
    }
  for (; i + W <= count; i += W) {
    const F x = load(values + i);
    sums[0] += x * x;
  }
  float sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) sum += values[i] * values[i];
  return sum;
}

// W values, `at` floats behind each of the task's pointers.
struct AdamLanes {
  F parameter, mean, square;
};

FPT_INLINE AdamLanes adam_lanes(const AdamTask& task, AdamLanes now, F gradient) {
  gradient = gradient * task.clip;
  if (task.decoupled) now.parameter = now.parameter - now.parameter * task.decay;
  else gradient = gradient + now.parameter * task.decay;
  now.mean = now.mean + (gradient - now.mean) * task.fresh_mean;
  now.square = now.square + (gradient * gradient - now.square) * task.fresh_square;
  const F spread = root(now.square) * task.correction + task.eps;
  now.parameter = now.parameter - now.mean * task.rate / spread;
  return now;
}

// Memory takes the time here, not the root and the division.  The processor fetches ahead by itself,
// but not beyond a page; so far ahead, 2 KB, is where more gained nothing.  Past the end it is harmless.
constexpr int64_t FETCHED_AHEAD = 512;

static void adam_piece(const AdamTask& task) {
  int64_t i = 0;
  for (; i + W <= task.count; i += W) {
    const int64_t ahead = i + FETCHED_AHEAD;
    __builtin_prefetch(task.parameter + ahead), __builtin_prefetch(task.gradient + ahead);
    __builtin_prefetch(task.mean + ahead), __builtin_prefetch(task.square + ahead);
    const AdamLanes next = adam_lanes(
        task, {load(task.parameter + i), load(task.mean + i), load(task.square + i)},
        load(task.gradient + i));
    store(task.parameter + i, next.parameter);
    store(task.mean + i, next.mean);
    store(task.square + i, next.square);
  }
  const int64_t rest = task.count - i;
  if (!rest) return;
  float lanes[4][W] = {};
  const float* from[4] = {task.parameter + i, task.mean + i, task.square + i, task.gradient + i};
  for (int which = 0; which < 4; ++which)
    for (int64_t lane = 0; lane < rest; ++lane) lanes[which][lane] = from[which][lane];
  const AdamLanes next =
      adam_lanes(task, {load(lanes[0]), load(lanes[1]), load(lanes[2])}, load(lanes[3]));
  for (int64_t lane = 0; lane < rest; ++lane) {
    task.parameter[i + lane] = next.parameter[lane];
    task.mean[i + lane] = next.mean[lane];
    task.square[i + lane] = next.square[lane];
  }
}
