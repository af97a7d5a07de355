// The ops that register.cpp registers, one file each.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace fpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> select_tokens(
    Tensor scores, Tensor k, Tensor v, int64_t keep, ScalarType dtype, std::string level);

}  // namespace fpt
