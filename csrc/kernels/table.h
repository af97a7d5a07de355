// What a level offers: plain functions over plain pointers.  Axis letters as in DESIGN.md section 2.
//
// No templates of the standard library and no torch below this line of the tree: an inline function
// that was compiled for AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace fpt {

enum class Kind : int { f16, bf16, f32, f64 };

// The `keep` highest of `tokens` scores; on ties the lower index; ascending.
struct SelectTask {
  const void* scores;  // [tokens], `stride` elements apart
  Kind kind;
  int64_t stride;
  int64_t tokens;
  int64_t keep;
  void* keys;      // scratch: `tokens` of 8 bytes
  int32_t* index;  // out: [keep]
};

// Rows `index` of a matrix, converted: f64 by way of f32 where it goes to 16 bits, as in torch.
struct GatherTask {
  const void* from;  // rows `row_stride` elements apart, columns `column_stride`
  Kind from_kind;
  int64_t row_stride;
  int64_t column_stride;
  int64_t width;
  const int32_t* index;  // [rows]
  int64_t rows;
  void* to;  // [rows, width], contiguous
  Kind to_kind;
};

struct Matrix {
  const void* data;  // null: there is none
  int64_t row_stride;  // in elements
  int64_t column_stride;
};

// Softmax attention of some queries of one head to all of its tokens.
struct AttentionTask {
  Matrix q;  // [rows, width]
  Matrix k;  // [tokens, width]
  Matrix v;  // [tokens, width], or none
  Kind kind;
  int64_t rows;
  int64_t tokens;
  int64_t width;
  float scale;
  const float* known_lse;  // [rows] row log-sum-exp of the scaled logits, or null
  float* lse;              // out: [rows], or null
  float* columns;          // out: [tokens] sums of the map over the rows, or null
  void* out;               // out: [rows, width] of `kind`, where there is v
  int64_t out_stride;
  void* scratch;  // as many bytes as attention_scratch says, aligned to 64
};

struct Kernels {
  void (*select_tokens)(const SelectTask&);
  void (*gather_rows)(const GatherTask&);
  int64_t (*attention_scratch)(const AttentionTask&);
  // Lays out k and v of a head in the scratch, for any number of calls of attention_rows.
  void (*attention_pack)(const AttentionTask&);
  void (*attention_rows)(const AttentionTask&);
};

}  // namespace fpt
