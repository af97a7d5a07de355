// Where prompt_attention finds the tokens of an image, layer and head: in a store, or by index in a
// frozen model's own keys and values.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "checks.h"

namespace fpt {

inline Stored stored_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Stored::f16;
    case ScalarType::BFloat16: return Stored::bf16;
    case ScalarType::Float: return Stored::f32;
    case ScalarType::Char: return Stored::i8;
    default:
      STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or int8, got dtype ",
                      static_cast<int>(dtype));
  }
}

inline int64_t bytes_of(Stored stored) {
  return stored == Stored::f32 ? 4 : stored == Stored::i8 ? 1 : 2;
}

// Past the last element.
inline const char* end_of(const Tensor& tensor, int64_t element) {
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis)
    last += (tensor.size(axis) - 1) * tensor.stride(axis);
  return static_cast<const char*>(tensor.const_data_ptr()) + (last + 1) * element;
}

inline void check_columns(const char* name, const Tensor& tensor) {
  const int64_t axis = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(axis) <= 1 || tensor.stride(axis) == 1, name,
                  " must have a stride of 1 along its last axis, got ", tensor.stride(axis));
}

inline void check_range(const char* name, int64_t low, int64_t high, int64_t size) {
  STD_TORCH_CHECK(low >= 0 && high < size, name, " must be in 0..", size - 1,
                  ", got values in ", low, "..", high);
}

// Tokens of kv [M, L, 2, H, K, D], of whose images `rows` [B] picks some.
class StoredTokens {
 public:
  StoredTokens(const Tensor& q, const Tensor& kv, const std::optional<Tensor>& rows,
               const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales)
      : kv_(kv), k_scales_(k_scales), v_scales_(v_scales) {
    const int64_t layers = q.size(0), heads = q.size(1);
    check_cpu("kv", kv);
    stored = stored_of("kv", kv.scalar_type());
    element_ = bytes_of(stored);
    check_sizes("kv", kv, {-1, layers, 2, heads, -1, q.size(3)});
    check_columns("kv", kv);
    width = q.size(3);
    kept = kv.size(4);
    const int64_t stored_images = kv.size(0);
    STD_TORCH_CHECK(k_scales.has_value() == v_scales.has_value(), "scales must be a pair");
    if (k_scales) {
      check_scale("k_scales", *k_scales, {stored_images, layers, heads, width});
      check_scale("v_scales", *v_scales, {stored_images, layers, heads, kept});
    }
    read_rows(rows, stored_images);
    offsets_.resize(kept);
    for (int64_t t = 0; t < kept; ++t) offsets_[t] = t * kv.stride(4) * element_;
  }

  int64_t images() const { return static_cast<int64_t>(rows_.size()); }

  // Fills the task for one unit of work; `next` is the unit that the thread turns to after it.
  void find(PromptTask& task, std::vector<int64_t>&, int64_t image, int64_t layer, int64_t head,
            int64_t next_image, int64_t next_layer, int64_t next_head) const {
    const char* end = end_of(kv_, element_);
    const char* base = at(image, layer, head);
    const int64_t part = kv_.stride(2) * element_;
    const bool side_by_side = kv_.stride(4) == width;
    task.k = {base, offsets_.data(), end, side_by_side};
    task.v = {base + part, offsets_.data(), end, side_by_side};
    task.v_ahead = side_by_side ? task.v.base : nullptr;
    task.next_k = side_by_side ? at(next_image, next_layer, next_head) : nullptr;
    task.next_v = side_by_side ? task.next_k + part : nullptr;
    task.k_scales = scale(k_scales_, rows_[image], layer, head);
    task.v_scales = scale(v_scales_, rows_[image], layer, head);
  }

  Stored stored;
  int64_t kept, width;

 private:
  static void check_scale(const char* name, const Tensor& scale, const Sizes& sizes) {
    check_cpu(name, scale);
    check_sizes(name, scale, sizes);
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, name, " must be float32");
    check_columns(name, scale);
  }

  static const float* scale(const std::optional<Tensor>& of, int64_t row, int64_t layer,
                            int64_t head) {
    if (!of) return nullptr;
    return static_cast<const float*>(of->const_data_ptr()) + row * of->stride(0) +
           layer * of->stride(1) + head * of->stride(2);
  }

  void read_rows(const std::optional<Tensor>& rows, int64_t stored_images) {
    if (!rows) {
      for (int64_t image = 0; image < stored_images; ++image) rows_.push_back(image);
      return;
    }
    check_cpu("rows", *rows);
    check_sizes("rows", *rows, {-1});
    STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Long, "rows must be int64");
    const auto* row = static_cast<const int64_t*>(rows->const_data_ptr());
    for (int64_t image = 0; image < rows->size(0); ++image) {
      rows_.push_back(row[image * rows->stride(0)]);
      check_range("rows", rows_.back(), rows_.back(), stored_images);
    }
  }

  const char* at(int64_t image, int64_t layer, int64_t head) const {
    return static_cast<const char*>(kv_.const_data_ptr()) +
           element_ * (rows_[image] * kv_.stride(0) + layer * kv_.stride(1) + head * kv_.stride(3));
  }

  Tensor kv_;
  std::optional<Tensor> k_scales_, v_scales_;
  int64_t element_;
  std::vector<int64_t> rows_, offsets_;
};

// Tokens `index` [B, L, H, K] of k and v [L, B, H, N, D].
class IndexedTokens {
 public:
  IndexedTokens(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index)
      : k_(k), v_(v), index_(index) {
    const int64_t layers = q.size(0), heads = q.size(1);
    check_cpu("k", k);
    check_cpu("v", v);
    check_cpu("index", index);
    stored = stored_of("k", k.scalar_type());
    STD_TORCH_CHECK(stored != Stored::i8 && v.scalar_type() == k.scalar_type(),
                    "v must have the dtype of k, and that be a float");
    element_ = bytes_of(stored);
    check_sizes("k", k, {layers, -1, heads, -1, q.size(3)});
    check_sizes("v", v, {layers, k.size(1), heads, k.size(3), q.size(3)});
    check_sizes("index", index, {k.size(1), layers, heads, -1});
    check_columns("k", k);
    check_columns("v", v);
    wide_ = index.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide_ || index.scalar_type() == ScalarType::Int,
                    "index must be int32 or int64");
    width = q.size(3);
    kept = index.size(3);
    for (int64_t image = 0; image < images(); ++image)
      for (int64_t layer = 0; layer < layers; ++layer)
        for (int64_t head = 0; head < heads; ++head) check_tokens(image, layer, head);
  }

  int64_t images() const { return k_.size(1); }

  // Fills the task for one unit of work; `offsets` keeps what it points to.
  void find(PromptTask& task, std::vector<int64_t>& offsets, int64_t image, int64_t layer,
            int64_t head, int64_t, int64_t, int64_t) const {
    offsets.resize(2 * kept);
    for (int64_t t = 0; t < kept; ++t) {
      const int64_t row = token(image, layer, head, t) * element_;
      offsets[t] = row * k_.stride(3);
      offsets[kept + t] = row * v_.stride(3);
    }
    task.k = {at(k_, image, layer, head), offsets.data(), end_of(k_, element_), false};
    task.v = {at(v_, image, layer, head), offsets.data() + kept, end_of(v_, element_), false};
    task.v_ahead = task.next_k = task.next_v = nullptr;
    task.k_scales = task.v_scales = nullptr;
  }

  Stored stored;
  int64_t kept, width;

 private:
  int64_t token(int64_t image, int64_t layer, int64_t head, int64_t t) const {
    const int64_t at = image * index_.stride(0) + layer * index_.stride(1) +
                       head * index_.stride(2) + t * index_.stride(3);
    const void* data = index_.const_data_ptr();
    return wide_ ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }

  void check_tokens(int64_t image, int64_t layer, int64_t head) const {
    int64_t low = 0, high = 0;
    for (int64_t t = 0; t < kept; ++t) {
      const int64_t chosen = token(image, layer, head, t);
      low = chosen < low ? chosen : low;
      high = chosen > high ? chosen : high;
    }
    check_range("index", low, high, k_.size(3));
  }

  const char* at(const Tensor& tensor, int64_t image, int64_t layer, int64_t head) const {
    return static_cast<const char*>(tensor.const_data_ptr()) +
           element_ * (layer * tensor.stride(0) + image * tensor.stride(1) +
                       head * tensor.stride(2));
  }

  Tensor k_, v_, index_;
  int64_t element_;
  bool wide_;
};

}  // namespace fpt
