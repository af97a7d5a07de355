// select_tokens: heads in parallel, each by the kernels of kernels/select_tokens.h.

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"

namespace fpt {

std::tuple<Tensor, Tensor> select_tokens(
    Tensor scores, Tensor k, Tensor v, int64_t keep, ScalarType dtype, std::string level) {
  const Kind kind = check_floats("k", k, {-1, -1, -1, -1});
  const int64_t images = k.size(0), heads = k.size(1), tokens = k.size(2), width = k.size(3);
  const Kind score_kind = check_floats("scores", scores, {images, heads, tokens});
  STD_TORCH_CHECK(check_floats("v", v, {images, heads, tokens, width}) == kind,
                  "v must have the dtype of k");
  STD_TORCH_CHECK(keep >= 1 && keep <= tokens && tokens <= INT32_MAX, "keep must be in 1..",
                  tokens, ", the number of tokens, at most 2^31 - 1, got ", keep);
  const Kind out_kind = kind_of("dtype", dtype);
  Tensor kv = torch::stable::empty({images, 2, heads, keep, width}, dtype);
  Tensor index = torch::stable::empty({images, heads, keep}, ScalarType::Int);
  const Kernels& kernels = kernels_for(level);
  auto* to_index = static_cast<int32_t*>(index.mutable_data_ptr());
  auto* to_kv = static_cast<char*>(kv.mutable_data_ptr());
  const int64_t head_bytes = keep * width * bytes_of(out_kind);
  torch::stable::parallel_for(0, images * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(tokens);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / heads, head = item % heads;
      int32_t* kept = to_index + item * keep;
      kernels.select_tokens({address(scores, score_kind, image, head), score_kind,
                             scores.stride(2), tokens, keep, keys.data(), kept});
      for (int part = 0; part < 2; ++part) {
        const Tensor& from = part ? v : k;
        kernels.gather_rows({address(from, kind, image, head), kind, from.stride(2),
                             from.stride(3), width, kept, keep,
                             to_kv + ((image * 2 + part) * heads + head) * head_bytes, out_kind});
      }
    }
  });
  return {kv, index};
}

}  // namespace fpt
