// prompt_attention and prompt_attention_indexed, forward and backward, by the kernels of
// kernels/prompt_attention.h.
//
// The forward shares out pairs of image and head: all heads of a layer at once, which write to the same
// rows, where that leaves enough for every thread.  The backward shares out heads, and adds up the
// images of each in their order, whatever the number of threads.  A thread that is free takes the next
// piece, so that one which shares its processor with somebody delays nobody, and the one after it, so
// that it knows what to fetch ahead.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"
#include "prompt_tokens.h"
#include "scratch.h"

namespace fpt {
namespace {

using Floats = Scratch<float>;

Floats zeros(int64_t count) {
  Floats made(count);
  std::fill_n(made.data(), count, 0.0f);
  return made;
}

// The prompts of every layer and head [L, H, P, D], packed for the kernels.
class PackedQueries {
 public:
  PackedQueries(const Tensor& q, const Kernels& kernels)
      : padded_prompts((q.size(2) + kernels.lanes - 1) / kernels.lanes * kernels.lanes),
        kind_(check_floats("q", q, {-1, -1, -1, -1})),
        kernels_(kernels),
        q_(q),
        floats_(zeros(q.size(0) * q.size(1) * padded_prompts * q.size(3))),
        packed_(floats_.data()) {
    STD_TORCH_CHECK(kind_ != Kind::f64, "q must be float16, bfloat16 or float32, got float64");
    STD_TORCH_CHECK(q.size(3) >= 1, "q must have D of at least 1, got 0");
    torch::stable::parallel_for(0, q.size(0) * q.size(1), 8, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit)
        kernels.pack_prompts({address(q, kind_, unit / q.size(1), unit % q.size(1)), kind_,
                              q.stride(2), q.stride(3), q.size(2), q.size(3),
                              packed_ + unit * padded_prompts * q.size(3)});
    });
  }

  template <class Source>
  Floats scratch(const Source& source) const {
    return zeros(kernels_.prompt_scratch(source.kept, q_.size(3)));
  }

  // A task with all that does not depend on the image.
  template <class Source>
  PromptTask task(const Source& source, const Floats& scratch) const {
    PromptTask task{};
    task.stored = source.stored;
    task.narrow = kind_ == Kind::bf16;
    task.kept = source.kept;
    task.width = q_.size(3);
    task.prompts = q_.size(2);
    task.scratch = scratch.data();
    return task;
  }

  const float* of(int64_t unit) const {
    return packed_ + unit * padded_prompts * q_.size(3);
  }

  const int64_t padded_prompts;

 private:
  const Kind kind_;
  const Kernels& kernels_;
  Tensor q_;
  Floats floats_;
  float* const packed_;
};

// `work(take)` on torch's threads: `take()` is the next of the pieces, or a number past the last one.
// A thread takes `run` of them at a time.
template <class Work>
void share_out(int64_t pieces, int64_t run, Work work) {
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t, int64_t) {
    int64_t next = 0, end = 0;
    work([&] {
      if (next == end) {
        next = taken.fetch_add(run, std::memory_order_relaxed);
        end = next + run;
      }
      return next++;
    });
  });
}

// Rows that will be written to, into the cache: stores that wait for their lines hold up what follows.
void fetch_to_write(char* row, int64_t rows, int64_t stride, int64_t bytes) {
  for (int64_t r = 0; r < rows; ++r, row += stride)
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(row + i, 1);
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

template <class Source>
std::tuple<Tensor, Tensor> forward(
    const Tensor& q, const Source& source, const Kernels& kernels) {
  const Kind kind = check_floats("q", q, {-1, -1, -1, -1});
  const PackedQueries queries(q, kernels);
  const int64_t layers = q.size(0), heads = q.size(1), prompts = q.size(2), width = q.size(3);
  const int64_t images = source.images(), channels = heads * width, units = layers * heads;
  Tensor out = torch::stable::empty({layers, images, prompts, channels}, q.scalar_type());
  Tensor lse = torch::stable::empty({layers, images, heads, prompts}, ScalarType::Float);
  char* to_out = static_cast<char*>(out.mutable_data_ptr());
  float* to_lse = floats_of(lse);
  const int64_t element = bytes_of(kind);
  const bool enough = images * layers >= 8 * torch::stable::get_num_threads();
  share_out(images * units, enough ? heads : 1, [&](auto take) {
    const Floats scratch = queries.scratch(source);
    std::vector<int64_t> offsets;
    PromptTask task = queries.task(source, scratch);
    for (int64_t item = take(), following; item < images * units; item = following) {
      following = take();
      const int64_t image = item / units, layer = item % units / heads, head = item % heads;
      const int64_t next = following < images * units ? following : item;
      source.find(task, offsets, image, layer, head, next / units, next % units / heads,
                  next % heads);
      task.queries = queries.of(layer * heads + head);
      const int64_t at = layer * images + image;
      task.lse = to_lse + (at * heads + head) * prompts;
      char* rows = to_out + (at * prompts * channels + head * width) * element;
      fetch_to_write(rows, prompts, channels * element, width * element);
      kernels.prompt_forward(task, {rows, kind, channels});
    }
  });
  return {out, lse};
}

// A head's sums, written in the dtype of q.
void write_gradient(const Kernels& kernels, const float* sums, int64_t prompts, int64_t width,
                    int64_t padded_width, Kind kind, void* to) {
  std::vector<int32_t> rows(prompts);
  for (int64_t p = 0; p < prompts; ++p) rows[p] = int32_t(p);
  kernels.gather_rows(
      {sums, Kind::f32, padded_width, 1, width, rows.data(), prompts, to, kind});
}

template <class Source>
Tensor backward(const Tensor& grad, const Tensor& q, const Tensor& lse, const Source& source,
                const Kernels& kernels) {
  const PackedQueries queries(q, kernels);
  const int64_t layers = q.size(0), heads = q.size(1), prompts = q.size(2), width = q.size(3);
  const int64_t images = source.images(), units = layers * heads;
  const Kind kind = check_floats("q", q, {-1, -1, -1, -1});
  const Kind grad_kind = check_floats("grad", grad, {layers, images, prompts, heads * width});
  STD_TORCH_CHECK(grad_kind != Kind::f64, "grad must be float16, bfloat16 or float32");
  STD_TORCH_CHECK(check_floats("lse", lse, {layers, images, heads, prompts}) == Kind::f32 &&
                      lse.is_contiguous(),
                  "lse must be float32 and contiguous");
  float* logsums = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  Tensor grad_q = torch::stable::empty({layers, heads, prompts, width}, q.scalar_type());
  char* to = static_cast<char*>(grad_q.mutable_data_ptr());
  const int64_t lanes = kernels.lanes, padded_width = (width + lanes - 1) / lanes * lanes;
  const int64_t unit_sums = queries.padded_prompts * padded_width;
  share_out(units, 1, [&](auto take) {
    const Floats scratch = queries.scratch(source), sums(unit_sums);
    const Floats grads = zeros(queries.padded_prompts * width);
    std::vector<int64_t> offsets;
    PromptTask task = queries.task(source, scratch);
    for (int64_t unit = take(), following; unit < units; unit = following) {
      following = take();
      std::fill_n(sums.data(), unit_sums, 0.0f);
      const int64_t layer = unit / heads, head = unit % heads;
      const int64_t after = following < units ? following : unit;
      task.queries = queries.of(unit);
      for (int64_t image = 0; image < images; ++image) {
        const bool is_last = image + 1 == images;
        const int64_t next = is_last ? after : unit;
        source.find(task, offsets, image, layer, head, is_last ? 0 : image + 1, next / heads,
                    next % heads);
        task.lse = logsums + ((layer * images + image) * heads + head) * prompts;
        kernels.pack_prompts(
            {static_cast<const char*>(address(grad, grad_kind, layer, image)) +
                 head * width * grad.stride(3) * bytes_of(grad_kind),
             grad_kind, grad.stride(2), grad.stride(3), prompts, width, grads.data()});
        kernels.prompt_backward(task, {grads.data(), sums.data()});
      }
      write_gradient(kernels, sums.data(), prompts, width, padded_width, kind,
                     to + unit * prompts * width * bytes_of(kind));
    }
  });
  return grad_q;
}

}  // namespace

std::tuple<Tensor, Tensor> prompt_attention(
    Tensor q, Tensor kv, std::optional<Tensor> rows, std::optional<Tensor> k_scales,
    std::optional<Tensor> v_scales, std::string level) {
  check_sizes("q", q, {-1, -1, -1, -1});
  return forward(q, StoredTokens(q, kv, rows, k_scales, v_scales), kernels_for(level));
}

Tensor prompt_attention_backward(
    Tensor grad, Tensor q, Tensor kv, Tensor lse, std::optional<Tensor> rows,
    std::optional<Tensor> k_scales, std::optional<Tensor> v_scales, std::string level) {
  check_sizes("q", q, {-1, -1, -1, -1});
  return backward(
      grad, q, lse, StoredTokens(q, kv, rows, k_scales, v_scales), kernels_for(level));
}

std::tuple<Tensor, Tensor> prompt_attention_indexed(
    Tensor q, Tensor k, Tensor v, Tensor index, std::string level) {
  check_sizes("q", q, {-1, -1, -1, -1});
  return forward(q, IndexedTokens(q, k, v, index), kernels_for(level));
}

Tensor prompt_attention_indexed_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index, Tensor lse, std::string level) {
  check_sizes("q", q, {-1, -1, -1, -1});
  return backward(grad, q, lse, IndexedTokens(q, k, v, index), kernels_for(level));
}

}  // namespace fpt
