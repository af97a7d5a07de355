// What an op refuses because it would read or write outside a tensor; each message says which
// argument, what was expected and what came.  Everything else is checked in Python, once.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "kernels/table.h"

namespace fpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline std::string text_of(const int64_t* sizes, size_t count) {
  std::string text = "(";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// `tensor` must have `sizes`, where -1 stands for any size.
inline void check_sizes(const char* name, const Tensor& tensor, const Sizes& sizes) {
  const auto got = tensor.sizes();
  bool same = got.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || sizes[i] == got[i];
  STD_TORCH_CHECK(same, name, " must be ", text_of(sizes.data(), sizes.size()),
                  " (-1: any size), got ", text_of(got.data(), got.size()));
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on cpu");
}

inline Kind kind_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Kind::f16;
    case ScalarType::BFloat16: return Kind::bf16;
    case ScalarType::Float: return Kind::f32;
    case ScalarType::Double: return Kind::f64;
    default:
      STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64, got dtype ",
                      static_cast<int>(dtype));
  }
}

// A tensor on the CPU of a floating-point dtype and the given sizes: returns its kind.
inline Kind check_floats(const char* name, const Tensor& tensor, const Sizes& sizes) {
  check_cpu(name, tensor);
  check_sizes(name, tensor, sizes);
  return kind_of(name, tensor.scalar_type());
}

// The same for an op that computes in f32.
inline Kind check_narrow_floats(const char* name, const Tensor& tensor, const Sizes& sizes) {
  const Kind kind = check_floats(name, tensor, sizes);
  STD_TORCH_CHECK(kind != Kind::f64, name, " must be float16, bfloat16 or float32, got float64");
  return kind;
}

inline int64_t bytes_of(Kind kind) { return kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : 2; }

// The address of element (i, j, 0, ...) of a tensor.
inline const void* address(const Tensor& tensor, Kind kind, int64_t i, int64_t j) {
  return static_cast<const char*>(tensor.const_data_ptr()) +
         (i * tensor.stride(0) + j * tensor.stride(1)) * bytes_of(kind);
}

}  // namespace fpt
