// side_block, forward and backward, by the kernels of kernels/side_block.h.
//
// Threads share out groups of images, and after a round of groups the columns of the weights' gradients.
// Which images are in a group, and which groups in a round, depends on the sizes alone: results are the
// same from any number of threads.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"

namespace fpt {
namespace {

constexpr int64_t WIDEST = 16;   // channels of a head
constexpr int64_t ROWS = 160;    // of a group, about: what fills the tiles and stays in the cache
// Rows, at most about, whose factors are kept: more of them no longer stay in a cache, and with fewer
// threads have too few groups to share out.
constexpr int64_t ROUND = 1300;

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_f32(const char* name, const Tensor& tensor, const Sizes& sizes) {
  STD_TORCH_CHECK(check_floats(name, tensor, sizes) == Kind::f32, name, " must be float32");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

SideSizes sizes_of(const Tensor& tokens, const Tensor& prompts, const Tensor& fc1, int64_t heads,
                   int64_t queries, double eps, bool narrow) {
  check_f32("tokens", tokens, {-1, -1, -1});
  const int64_t width = tokens.size(2);
  check_f32("prompts", prompts, {tokens.size(0), -1, width});
  check_f32("fc1", fc1, {-1, width});
  STD_TORCH_CHECK(heads >= 1 && width % heads == 0 && width / heads <= WIDEST && width >= 1,
                  "heads must divide the width ", width, " into at most ", WIDEST,
                  " channels each, got ", heads);
  STD_TORCH_CHECK(queries >= 1 && queries <= tokens.size(1), "queries must be in 1..",
                  tokens.size(1), ", got ", queries);
  return {tokens.size(1), prompts.size(1), queries, width, heads, fc1.size(0), float(eps), narrow};
}

// The twelve weights in the order of SideWeightsOf, and their sizes.
template <class T>
SideWeightsOf<T> weights_of(const SideSizes& s, const std::vector<Tensor>& tensors) {
  const int64_t width = s.width;
  const std::vector<Sizes> sizes = {{width},        {width},    {3 * width, width}, {3 * width},
                                    {width, width}, {width},    {width},            {width},
                                    {s.hidden, width}, {s.hidden}, {width, s.hidden}, {width}};
  const char* names[] = {"norm1", "norm1_bias", "qkv", "qkv_bias", "proj", "proj_bias",
                         "norm2", "norm2_bias", "fc1", "fc1_bias", "fc2", "fc2_bias"};
  T* data[12];
  for (size_t i = 0; i < 12; ++i) {
    check_f32(names[i], tensors[i], sizes[i]);
    data[i] = floats_of(tensors[i]);
  }
  return {data[0], data[1], data[2], data[3], data[4],  data[5],
          data[6], data[7], data[8], data[9], data[10], data[11]};
}

// Bytes that begin at a multiple of 64 and hold nothing yet.
class Bytes {
 public:
  explicit Bytes(int64_t count) : bytes_(new char[count + 64]) {}
  void* get() const {
    const auto at = reinterpret_cast<uintptr_t>(bytes_.get());
    return bytes_.get() + (64 - at % 64) % 64;
  }

 private:
  std::unique_ptr<char[]> bytes_;
};

// Rounds of equal size, but for the last.
int64_t groups_of_round(int64_t groups, int64_t rows) {
  const int64_t rounds = std::max<int64_t>(1, (groups * rows + ROUND - 1) / ROUND);
  return std::max<int64_t>(1, (groups + rounds - 1) / rounds);
}

// A layer's call: its images by groups.
struct Layer {
  const Kernels& kernels;
  SideSizes sizes;
  int64_t images, in_group, groups, in_round;
  SideNeeds needs;
  bool backward;
  Bytes packed;

  Layer(const Kernels& k, const SideSizes& s, int64_t images, const SideWeights& weights,
        bool backward)
      : kernels(k),
        sizes(s),
        images(images),
        in_group(std::max<int64_t>(1, ROWS / (s.tokens + s.prompts))),
        groups((images + in_group - 1) / in_group),
        in_round(groups_of_round(groups, in_group * (s.tokens + s.prompts))),
        needs(k.side_needs(s, {in_group, in_round, nullptr, false}, backward)),
        backward(backward),
        packed(needs.packed) {
    kernels.side_pack(sizes, weights, backward, packed.get());
  }

  SideGroup group(int64_t number, const Tensor& tokens, const Tensor& prompts,
                  const Tensor& attended, const Tensor& softmax, const Tensor& out,
                  void* scratch) const {
    const int64_t first = number * in_group, rows = sizes.queries * sizes.width;
    const int64_t of_softmax = first * sizes.heads * sizes.queries;
    SideGroup group{};
    group.images = std::min(in_group, images - first);
    group.tokens = floats_of(tokens) + first * sizes.tokens * sizes.width;
    group.prompts = floats_of(prompts) + first * sizes.prompts * sizes.width;
    group.attended = floats_of(attended) + first * rows;
    group.tops = floats_of(softmax) + of_softmax;
    group.shares = group.tops + images * sizes.heads * sizes.queries;
    group.out = floats_of(out) + first * rows;
    group.packed = packed.get();
    group.packed_backward = backward;
    group.scratch = scratch;
    return group;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> side_block(
    Tensor tokens, Tensor prompts, Tensor norm1, Tensor norm1_bias, Tensor qkv, Tensor qkv_bias,
    Tensor proj, Tensor proj_bias, Tensor norm2, Tensor norm2_bias, Tensor fc1, Tensor fc1_bias,
    Tensor fc2, Tensor fc2_bias, int64_t heads, int64_t queries, double eps, bool narrow,
    std::string level) {
  const SideSizes s = sizes_of(tokens, prompts, fc1, heads, queries, eps, narrow);
  const auto weights = weights_of<const float>(
      s, {norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, norm2, norm2_bias, fc1, fc1_bias, fc2,
          fc2_bias});
  const int64_t images = tokens.size(0);
  Tensor out = torch::stable::empty({images, queries, s.width}, ScalarType::Float);
  Tensor attended = torch::stable::empty({images, queries, s.width}, ScalarType::Float);
  Tensor softmax = torch::stable::empty({2, images, heads, queries}, ScalarType::Float);
  const Layer layer(kernels_for(level), s, images, weights, false);
  torch::stable::parallel_for(0, layer.groups, 1, [&](int64_t begin, int64_t end) {
    const Bytes scratch(layer.needs.scratch);
    for (int64_t number = begin; number < end; ++number)
      layer.kernels.side_block_forward(
          s, layer.group(number, tokens, prompts, attended, softmax, out, scratch.get()));
  });
  return {out, attended, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor>
side_block_backward(Tensor grad, Tensor tokens, Tensor prompts, Tensor norm1, Tensor norm1_bias,
                    Tensor qkv, Tensor qkv_bias, Tensor proj, Tensor proj_bias, Tensor norm2,
                    Tensor norm2_bias, Tensor fc1, Tensor fc1_bias, Tensor fc2, Tensor fc2_bias,
                    Tensor attended, Tensor softmax, int64_t heads, int64_t queries, double eps,
                    bool narrow, std::string level) {
  const SideSizes s = sizes_of(tokens, prompts, fc1, heads, queries, eps, narrow);
  const std::vector<Tensor> given = {norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias,
                                     norm2, norm2_bias, fc1, fc1_bias, fc2,  fc2_bias};
  const int64_t images = tokens.size(0);
  const Layer layer(kernels_for(level), s, images, weights_of<const float>(s, given), true);
  check_f32("grad", grad, {images, queries, s.width});
  check_f32("attended", attended, {images, queries, s.width});
  check_f32("softmax", softmax, {2, images, heads, queries});
  Tensor grad_tokens = torch::stable::empty_like(tokens);
  Tensor grad_prompts = torch::stable::empty_like(prompts);
  std::vector<Tensor> g;
  for (const Tensor& weight : given) g.push_back(torch::stable::empty_like(weight));
  const SideNeeds& needs = layer.needs;
  const Bytes matrices(needs.matrices * 4);
  const Bytes vectors(std::max<int64_t>(1, layer.groups) * needs.vectors * 4);
  const Bytes factors(needs.factors);
  float* to_matrices = static_cast<float*>(matrices.get());
  float* to_vectors = static_cast<float*>(vectors.get());
  if (layer.groups == 0) {
    std::fill_n(to_matrices, needs.matrices, 0.0f);
    std::fill_n(to_vectors, needs.vectors, 0.0f);
  }
  for (int64_t first = 0; first < layer.groups; first += layer.in_round) {
    const int64_t last = std::min(layer.groups, first + layer.in_round);
    const SideRound round{layer.in_group, last - first, factors.get(), first > 0};
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      const Bytes scratch(needs.scratch);
      for (int64_t number = begin; number < end; ++number) {
        SideGroup group =
            layer.group(number, tokens, prompts, attended, softmax, grad, scratch.get());
        const int64_t image = number * layer.in_group;
        group.grad_tokens = floats_of(grad_tokens) + image * s.tokens * s.width;
        group.grad_prompts = floats_of(grad_prompts) + image * s.prompts * s.width;
        group.round = round;
        group.number = number - first;
        group.vectors = to_vectors + number * needs.vectors;
        layer.kernels.side_block_backward(s, group);
      }
    });
    torch::stable::parallel_for(0, needs.tasks, 1, [&](int64_t begin, int64_t end) {
      layer.kernels.side_multiply_factors(s, round, begin, end, to_matrices);
    });
  }
  layer.kernels.side_gradients(s, to_matrices, to_vectors, layer.groups,
                               weights_of<float>(s, g));
  return {grad_tokens, grad_prompts, g[0], g[1], g[2], g[3], g[4],
          g[5],        g[6],         g[7], g[8], g[9], g[10], g[11]};
}

}  // namespace fpt
