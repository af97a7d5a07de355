// side_layers, forward and backward, by the kernels of kernels/side_block.h.
//
// Threads share out groups of images, forward once for all layers, backward layer by layer, and there,
// after a round of groups, the columns of the weights' gradients.  Which images are in a group, and
// which groups in a round, depends on the sizes alone: results are the same from any number of threads.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "levels.h"
#include "ops.h"
#include "scratch.h"

namespace fpt {
namespace {

constexpr int64_t WEIGHTS_OF_LAYER = 12;
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

// Sizes of every layer but the last, of which `queries` tokens are wanted.
SideSizes sizes_of(const Tensor& tokens, const Tensor& states, const std::vector<Tensor>& weights,
                   int64_t heads, double eps, bool narrow) {
  check_f32("tokens", tokens, {-1, -1, -1});
  const int64_t width = tokens.size(2);
  check_f32("states", states, {-1, tokens.size(0), -1, width});
  const int64_t layers = states.size(0);
  STD_TORCH_CHECK(layers >= 1 && int64_t(weights.size()) == WEIGHTS_OF_LAYER * layers,
                  "weights must be ", WEIGHTS_OF_LAYER, " for each of at least one layer of states, got ",
                  weights.size(), " for ", layers);
  check_f32("weights of fc1", weights[8], {-1, width});
  STD_TORCH_CHECK(heads >= 1 && width >= 1 && width % heads == 0 && width / heads <= WIDEST,
                  "heads must divide the width ", width, " into at most ", WIDEST,
                  " channels each, got ", heads);
  const int64_t count = tokens.size(1);
  return {count, states.size(2), count, width, heads, weights[8].size(0), float(eps), narrow};
}

SideSizes last_of(SideSizes sizes, int64_t queries) {
  STD_TORCH_CHECK(queries >= 1 && queries <= sizes.tokens, "queries must be in 1..", sizes.tokens,
                  ", got ", queries);
  sizes.queries = queries;
  return sizes;
}

// The weights of every layer, in the order of SideWeightsOf.
template <class T>
std::vector<SideWeightsOf<T>> weights_of(const SideSizes& s, const std::vector<Tensor>& tensors) {
  const int64_t width = s.width;
  const Sizes sizes[] = {{width},        {width},    {3 * width, width}, {3 * width},
                         {width, width}, {width},    {width},            {width},
                         {s.hidden, width}, {s.hidden}, {width, s.hidden}, {width}};
  const char* names[] = {"norm1", "norm1_bias", "qkv", "qkv_bias", "proj", "proj_bias",
                         "norm2", "norm2_bias", "fc1", "fc1_bias", "fc2", "fc2_bias"};
  std::vector<SideWeightsOf<T>> layers;
  for (int64_t first = 0; first < int64_t(tensors.size()); first += WEIGHTS_OF_LAYER) {
    T* data[WEIGHTS_OF_LAYER];
    for (int64_t i = 0; i < WEIGHTS_OF_LAYER; ++i) {
      check_f32(names[i], tensors[first + i], sizes[i]);
      data[i] = floats_of(tensors[first + i]);
    }
    layers.push_back({data[0], data[1], data[2], data[3], data[4],  data[5],
                      data[6], data[7], data[8], data[9], data[10], data[11]});
  }
  return layers;
}

// Rounds of equal size, but for the last.
int64_t groups_of_round(int64_t groups, int64_t rows) {
  const int64_t rounds = std::max<int64_t>(1, (groups * rows + ROUND - 1) / ROUND);
  return std::max<int64_t>(1, (groups + rounds - 1) / rounds);
}

// What the attention of a layer has kept.
struct Kept {
  float *attended, *softmax;
};

// A call: the images of its layers by groups, and all layers' weights, packed.
struct Call {
  const Kernels& kernels;
  SideSizes most;  // of every layer but the last
  int64_t images, layers, in_group, groups, in_round;
  bool backward;
  SideNeeds needs;
  Scratch<char> packed;

  Call(const Kernels& k, const SideSizes& s, const Tensor& states,
       const std::vector<Tensor>& weights, bool backward)
      : kernels(k),
        most(s),
        images(states.size(1)),
        layers(states.size(0)),
        in_group(std::max<int64_t>(1, ROWS / (s.tokens + s.prompts))),
        groups((images + in_group - 1) / in_group),
        in_round(groups_of_round(groups, in_group * (s.tokens + s.prompts))),
        backward(backward),
        needs(k.side_needs(s, {in_group, in_round, nullptr, false}, backward)),
        packed(layers * needs.packed) {
    const auto all = weights_of<const float>(s, weights);
    torch::stable::parallel_for(0, layers * SIDE_MAPS, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.side_pack(s, all[i / SIDE_MAPS], backward, i % SIDE_MAPS, packed_of(i / SIDE_MAPS));
    });
  }

  char* packed_of(int64_t layer) const { return packed.data() + layer * needs.packed; }

  // `out` is a layer's output, or its gradient.
  SideGroup group(const SideSizes& s, int64_t layer, int64_t number, const float* tokens,
                  const Tensor& states, const Kept& kept, float* out, void* scratch) const {
    const int64_t first = number * in_group, rows = s.queries * s.width;
    const int64_t of_softmax = first * s.heads * s.queries;
    SideGroup group{};
    group.images = std::min(in_group, images - first);
    group.tokens = tokens + first * s.tokens * s.width;
    group.prompts = floats_of(states) + (layer * images + first) * s.prompts * s.width;
    group.attended = kept.attended + first * rows;
    group.tops = kept.softmax + of_softmax;
    group.shares = group.tops + images * s.heads * s.queries;
    group.out = out + first * rows;
    group.packed = packed_of(layer);
    group.packed_backward = backward;
    group.scratch = scratch;
    return group;
  }
};

// Where a backward pass adds up the gradients of a layer's weights.
struct Sums {
  Scratch<float> matrices, vectors;
  Scratch<char> factors;
  explicit Sums(const Call& call)
      : matrices(call.needs.matrices),
        vectors(std::max<int64_t>(1, call.groups) * call.needs.vectors),
        factors(call.needs.factors) {}
};

// grad is that of the layer's output; what it becomes may stand in its place.
void layer_backward(const Call& call, const SideSizes& s, int64_t layer, const float* tokens,
                    const Tensor& states, const Kept& kept, float* grad, float* grad_tokens,
                    float* grad_states, const Sums& sums, const SideWeightGradients& weights) {
  for (int64_t first = 0; first < call.groups; first += call.in_round) {
    const int64_t last = std::min(call.groups, first + call.in_round);
    const SideRound round{call.in_group, last - first, sums.factors.data(), first > 0};
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      const Scratch<char> scratch(call.needs.scratch);
      for (int64_t number = begin; number < end; ++number) {
        SideGroup group =
            call.group(s, layer, number, tokens, states, kept, grad, scratch.data());
        const int64_t image = number * call.in_group;
        group.grad_tokens = grad_tokens + image * s.tokens * s.width;
        group.grad_prompts = grad_states + (layer * call.images + image) * s.prompts * s.width;
        group.round = round;
        group.number = number - first;
        group.vectors = sums.vectors.data() + number * call.needs.vectors;
        call.kernels.side_block_backward(s, group);
      }
    });
    torch::stable::parallel_for(0, call.needs.tasks, 1, [&](int64_t begin, int64_t end) {
      call.kernels.side_multiply_factors(s, round, begin, end, sums.matrices.data(),
                                         last == call.groups ? &weights : nullptr);
    });
  }
  call.kernels.side_vector_gradients(s, sums.vectors.data(), call.groups, weights);
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> side_layers(
    Tensor tokens, Tensor states, std::vector<Tensor> weights, int64_t heads, int64_t queries,
    double eps, bool narrow, std::string level) {
  const SideSizes most = sizes_of(tokens, states, weights, heads, eps, narrow);
  const SideSizes last = last_of(most, queries);
  const Call call(kernels_for(level), most, states, weights, false);
  std::vector<Tensor> kept, seen{tokens};
  std::vector<Kept> of_layer;
  for (int64_t layer = 0; layer < call.layers; ++layer) {
    const int64_t count = (layer + 1 < call.layers ? most : last).queries;
    const auto empty = [](const Sizes& sizes) { return torch::stable::empty(sizes, ScalarType::Float); };
    if (layer) kept.push_back(seen[layer]);
    seen.push_back(empty({call.images, count, most.width}));
    kept.push_back(empty({call.images, count, most.width}));
    kept.push_back(empty({2, call.images, heads, count}));
    of_layer.push_back({floats_of(kept.end()[-2]), floats_of(kept.end()[-1])});
  }
  // A thread takes its groups through all layers: nobody waits for a layer's end, and what a layer made
  // is still in the cache for the next.
  torch::stable::parallel_for(0, call.groups, 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch(call.needs.scratch);
    for (int64_t layer = 0; layer < call.layers; ++layer) {
      const SideSizes& s = layer + 1 < call.layers ? most : last;
      for (int64_t number = begin; number < end; ++number)
        call.kernels.side_block_forward(
            s, call.group(s, layer, number, floats_of(seen[layer]), states, of_layer[layer],
                          floats_of(seen[layer + 1]), scratch.data()));
    }
  });
  return {seen.back(), kept};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> side_layers_backward(
    Tensor grad, Tensor tokens, Tensor states, std::vector<Tensor> weights,
    std::vector<Tensor> kept, int64_t heads, int64_t queries, double eps, bool narrow,
    std::string level) {
  const SideSizes most = sizes_of(tokens, states, weights, heads, eps, narrow);
  const SideSizes last = last_of(most, queries);
  const Call call(kernels_for(level), most, states, weights, true);
  check_f32("grad", grad, {call.images, queries, most.width});
  STD_TORCH_CHECK(int64_t(kept.size()) == 3 * call.layers - 1, "kept must hold ",
                  3 * call.layers - 1, " tensors, got ", kept.size());
  Tensor grad_tokens = torch::stable::empty_like(tokens);
  Tensor grad_states = torch::stable::empty_like(states);
  std::vector<Tensor> gradients;
  for (const Tensor& weight : weights) gradients.push_back(torch::stable::empty_like(weight));
  const auto to_weights = weights_of<float>(most, gradients);
  const Sums sums(call);
  float* given = floats_of(grad);
  for (int64_t layer = call.layers; layer-- > 0;) {
    const SideSizes& s = layer + 1 < call.layers ? most : last;
    const Tensor &attended = kept[3 * layer], &softmax = kept[3 * layer + 1];
    const Tensor& seen = layer ? kept[3 * layer - 1] : tokens;
    check_f32("attended", attended, {call.images, s.queries, s.width});
    check_f32("softmax", softmax, {2, call.images, heads, s.queries});
    check_f32("a layer's input", seen, {call.images, s.tokens, s.width});
    layer_backward(call, s, layer, floats_of(seen), states,
                   {floats_of(attended), floats_of(softmax)}, given, floats_of(grad_tokens),
                   floats_of(grad_states), sums, to_weights[layer]);
    given = floats_of(grad_tokens);
  }
  return {grad_tokens, grad_states, gradients};
}

}  // namespace fpt
