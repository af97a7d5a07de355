// The ops that register.cpp registers, one file each.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> select_tokens(
    Tensor scores, Tensor k, Tensor v, int64_t keep, ScalarType dtype, std::string level);

Tensor token_scores(
    Tensor q, Tensor k, bool class_token, std::optional<Tensor> lse, std::string level);

std::tuple<Tensor, Tensor, Tensor> frozen_attention(
    Tensor q, Tensor k, Tensor v, bool need_output, bool need_scores, std::string level);

std::tuple<Tensor, Tensor> prompt_attention(
    Tensor q, Tensor kv, std::optional<Tensor> rows, std::optional<Tensor> k_scales,
    std::optional<Tensor> v_scales, std::string level);

Tensor prompt_attention_backward(
    Tensor grad, Tensor q, Tensor kv, Tensor lse, std::optional<Tensor> rows,
    std::optional<Tensor> k_scales, std::optional<Tensor> v_scales, std::string level);

std::tuple<Tensor, Tensor> prompt_attention_indexed(
    Tensor q, Tensor k, Tensor v, Tensor index, std::string level);

Tensor prompt_attention_indexed_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index, Tensor lse, std::string level);
std::tuple<Tensor, Tensor> read_records(
    Tensor places, Tensor mapped, Tensor kv, Tensor k_scales, Tensor v_scales, Tensor index,
    int64_t record_bytes, bool digests, int64_t threads, std::string level);

Tensor resample_images(
    Tensor levels, Tensor rows, Tensor tones, Tensor row_index, Tensor row_weight,
    Tensor column_index, Tensor column_weight, Tensor normalisation, std::string level);

std::tuple<Tensor, Tensor> side_attention(Tensor q, Tensor k, Tensor v, std::string level);

std::tuple<Tensor, Tensor, Tensor> side_attention_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, std::string level);

Tensor frozen_linear(
    Tensor x, Tensor weight, std::optional<Tensor> bias, bool gelu, std::optional<Tensor> residual,
    std::optional<Tensor> scale, std::string level);

// The norm of all gradients.
Tensor clipped_adam(
    std::vector<Tensor> parameters, std::vector<Tensor> gradients, Tensor means, Tensor squares,
    Tensor steps, double rate, double beta1, double beta2, double eps, double decay, bool decoupled,
    double clip_norm, std::string level);

Tensor trained_linear(Tensor x, Tensor weight, std::optional<Tensor> bias,
                      std::optional<Tensor> added, std::string level);

// Gradients to x (empty unless it is needed), weight, bias, and added (empty unless it is there).
std::tuple<Tensor, Tensor, Tensor, Tensor> trained_linear_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> added, bool need_x,
    std::string level);

// Whole layers of the side network: weights are twelve a layer, in the order of SideWeightsOf.  Kept
// are of each layer the attention's output, its softmax's rows and, but for the last, its own output.
std::tuple<Tensor, std::vector<Tensor>> side_layers(
    Tensor tokens, Tensor states, std::vector<Tensor> weights, int64_t heads, int64_t queries,
    double eps, bool narrow, std::string level);

// Gradients to tokens, states and the weights; all but the attention is computed anew.
std::tuple<Tensor, Tensor, std::vector<Tensor>> side_layers_backward(
    Tensor grad, Tensor tokens, Tensor states, std::vector<Tensor> weights,
    std::vector<Tensor> kept, int64_t heads, int64_t queries, double eps, bool narrow,
    std::string level);

}  // namespace fpt
