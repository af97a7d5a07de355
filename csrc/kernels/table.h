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

// Where the tokens of one head of one image are: row t stands `rows[t]` bytes after `base`.
struct TokenRows {
  const char* base;
  const int64_t* rows;  // [K]
  const char* end;      // nothing at or after it may be read
  bool side_by_side;    // each token begins where the one before it ends
};

enum class Stored : int { f16, bf16, f32, i8 };

// The prompts of one layer and head look at the tokens of one image.  Prompts go by blocks of
// `lanes`, the floats of a vector, and are packed [blocks, D, lanes], with zeros for what is missing;
// that and the scratch are best aligned to 64, so that no vector lies across two lines of the cache.
struct PromptTask {
  TokenRows k, v;
  // Where tokens are side by side: the values, and the tokens of the next task; else null.
  const char *v_ahead, *next_k, *next_v;
  Stored stored;
  bool narrow;  // prompts and what is made of them have the 8 bits of bf16
  int64_t kept, width, prompts;
  const float* k_scales;  // [D], or null
  const float* v_scales;  // [K], or null
  const float* queries;   // packed
  float* lse;             // [P]: written by the forward, read by the backward
  float* scratch;         // of prompt_scratch(K, D) floats
};

struct PromptForward {
  void* out;  // rows of D, `stride` elements apart
  Kind kind;
  int64_t stride;
};

struct PromptBackward {
  const float* grads;  // packed, of the output
  float* grad_q;       // [blocks * lanes, D rounded up to lanes], added to
};

// [P, D] with any strides, counted in elements -> packed.
struct PackTask {
  const void* from;
  Kind kind;
  int64_t prompt_stride, column_stride;
  int64_t prompts, width;
  float* to;
};

// Stripes of 64 bytes of an input, number `first` and following, into the sums of its hash.
struct HashTask {
  const uint8_t* data;
  int64_t first;
  int64_t stripes;
  const uint8_t* secret;  // [192]
  uint64_t* sums;         // in, out: [8]
};

// Softmax attention of one narrow head of one image, in f32; its width is at most 16.
struct SideTask {
  Matrix q;  // [queries, width]
  Matrix k;  // [tokens, width]
  Matrix v;  // [tokens, width]
  int64_t queries, tokens, width;
  float* tops;     // [queries] highest scaled logit: written forward, read backward
  float* shares;   // [queries] 1 over the sum of exponentials above it: likewise
  float* scratch;  // of side_scratch(queries, tokens) floats
};

struct SideGradient {
  Matrix grad;  // [queries, width] of the output
  Matrix out;   // [queries, width]
  float* grad_q;  // rows of width, `stride` elements apart; the others alike
  float* grad_k;
  float* grad_v;
  int64_t stride;
};

// Some columns of a linear map of bf16 rows.
struct LinearTask {
  const uint16_t* x;  // [rows, depth], rows x_stride elements apart; the others likewise
  int64_t x_stride;
  const uint16_t* weight;  // [columns, depth]
  int64_t weight_stride;
  const uint16_t* bias;      // [columns], or null
  const uint16_t* scale;     // [columns], or null
  const uint16_t* residual;  // [rows, columns], or null
  int64_t residual_stride;
  uint16_t* out;  // [rows, columns]
  int64_t out_stride;
  int64_t rows, depth, columns;  // depth and columns are multiples of 32
  bool gelu;                     // only where there is no residual
  void* scratch;                 // as many bytes as linear_scratch says, aligned to 64
};

// Rows of f32, or of bf16 where they are narrow, by runs of 16 values side by side: run j of row i
// begins row[i] + run[j] bytes after `base`.
struct TrainedRows {
  const char* base;
  const int64_t* row;
  const int64_t* run;
  int64_t runs;
  bool narrow;
  int64_t stride;  // elements from row to row where they are narrow, whole and evenly spaced; else 0
};

// Elements of bf16: of packed weights, of the turned gradient, and of the scratch of each kernel.
struct TrainedNeeds {
  int64_t forward, backward, turned, forward_scratch, input_scratch, weight_scratch;
};

// One channel of an image: levels through clamp(scale * level + shift, low, high), rows of the output
// as sums of some of its rows, columns alike, and out_scale * sum + out_shift.
struct ResampleTask {
  const void* levels;  // [height, width] u8, or u16 where it is deep
  bool is_deep;
  int64_t height, width;
  float scale, shift, low, high;
  int64_t rows, columns;  // of the output
  int64_t row_taps, column_taps;
  const int64_t* row_index;     // [rows, taps]
  const float* row_weight;      // [rows, taps]
  const int32_t* column_index;  // [taps, columns rounded up to lanes], as the weight
  const float* column_weight;
  float out_scale, out_shift;
  float* out;      // [rows, columns]
  float* scratch;  // of resample_scratch floats
};

// Some values of one parameter make a step of Adam.
struct AdamTask {
  float* parameter;       // [count], as the others
  const float* gradient;  // clipped by a factor
  float *mean, *square;   // running, of the gradient and of its square
  int64_t count;
  float clip, rate, decay, eps;
  float fresh_mean, fresh_square;  // shares of the present gradient: 1 - beta
  float correction;                // of the root of squares
  bool decoupled;  // decay shrinks the parameter by that part (AdamW); else it adds to the gradient
};

// A layer of the side network; axis letters as in DESIGN.md, `hidden` is the MLP's width.
struct SideSizes {
  int64_t tokens, prompts, queries, width, heads, hidden;
  float eps;
  bool narrow;  // products of bf16
};

// Its weights, contiguous, as torch.nn has them; and their gradients.
template <class T>
struct SideWeightsOf {
  T *norm1, *norm1_bias, *qkv, *qkv_bias, *proj, *proj_bias;
  T *norm2, *norm2_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};
using SideWeights = SideWeightsOf<const float>;
using SideWeightGradients = SideWeightsOf<float>;

// Linear maps that side_pack packs one by one; norms are packed with the first.
constexpr int64_t SIDE_MAPS = 5;

// Groups of images whose rows make the weights' gradients together.
struct SideRound {
  int64_t images, groups;  // of a whole group, of the round
  void* factors;           // aligned to 64
  bool more;               // whether it is added to what is there
};

// What a call needs: bytes of packed weights, of a group's scratch and of a round's factors, all
// aligned to 64; floats of the matrices' gradients and of a group's sums of the vectors'; and how many
// tasks side_multiply_factors has.
struct SideNeeds {
  int64_t packed, scratch, factors, matrices, vectors, tasks;
};

// Some images of a batch, whose rows are contiguous.
struct SideGroup {
  int64_t images;
  const float* tokens;   // [images, T, S]
  const float* prompts;  // [images, P, S]
  float* attended;       // [images, Q, S]: written by the forward, read by the backward
  float* tops;           // [images, H, Q]: likewise
  float* shares;
  float* out;            // [images, Q, S]: the output, or its gradient
  void* packed;
  bool packed_backward;  // whether the weights are packed for a backward, too
  void* scratch;
  float* grad_tokens;
  float* grad_prompts;
  SideRound round;
  int64_t number;        // in the round
  float* vectors;        // sums of the vectors' gradients
};

struct Kernels {
  int64_t lanes;
  int64_t (*prompt_scratch)(int64_t kept, int64_t width);
  void (*pack_prompts)(const PackTask&);
  void (*prompt_forward)(const PromptTask&, const PromptForward&);
  void (*prompt_backward)(const PromptTask&, const PromptBackward&);
  int64_t (*side_scratch)(int64_t queries, int64_t tokens);
  void (*side_forward)(const SideTask&, float* out, int64_t stride);
  void (*side_backward)(const SideTask&, const SideGradient&);
  SideNeeds (*side_needs)(const SideSizes&, const SideRound&, bool backward);
  void (*side_pack)(const SideSizes&, const SideWeights&, bool backward, int64_t map, void* to);
  void (*side_block_forward)(const SideSizes&, const SideGroup&);
  void (*side_block_backward)(const SideSizes&, const SideGroup&);
  // The matrices' gradients from the factors of a round: tasks first .. end.  The last round of a
  // layer writes them to the weights', null for the others.
  void (*side_multiply_factors)(const SideSizes&, const SideRound&, int64_t first, int64_t end,
                                float* matrices, const SideWeightGradients*);
  // Those of the vectors, added up in the groups' order; zeros everywhere where there are no groups.
  void (*side_vector_gradients)(const SideSizes&, float* vectors, int64_t groups,
                                const SideWeightGradients&);
  void (*select_tokens)(const SelectTask&);
  void (*gather_rows)(const GatherTask&);
  int64_t (*attention_scratch)(const AttentionTask&);
  // Lays out k and v of a head in the scratch, for any number of calls of attention_rows.
  void (*attention_pack)(const AttentionTask&);
  void (*attention_rows)(const AttentionTask&);
  void (*hash_stripes)(const HashTask&);
  // Null where the level has no tiles.
  int64_t (*linear_scratch)(int64_t depth, int64_t columns);
  void (*linear_columns)(const LinearTask&);
  float (*sum_of_squares)(const float* values, int64_t count);
  void (*adam_piece)(const AdamTask&);
  // Null where the level has no products of bf16.
  TrainedNeeds (*trained_needs)(int64_t rows, int64_t depth, int64_t columns, int64_t at_once,
                                int64_t runs_at_once);
  void (*trained_pack)(const float* weight, int64_t depth, int64_t columns, bool backward,
                       uint16_t* to);
  // Adds to `bias`, or, where there is `more`, to what `out` holds.
  void (*trained_forward)(const TrainedRows&, int64_t first, int64_t count, const uint16_t* packed,
                          const float* bias, bool more, int64_t columns, float* out,
                          uint16_t* scratch);
  void (*trained_input)(const float* grad, int64_t count, int64_t columns, const uint16_t* packed,
                        int64_t depth, bool narrow, void* out, uint16_t* scratch);
  void (*trained_turn)(const float* grad, int64_t rows, int64_t columns, int64_t first,
                       int64_t at_once, uint16_t* to, float* sums);
  void (*trained_weight)(const TrainedRows&, const uint16_t* turned, int64_t rows, int64_t columns,
                         int64_t first, int64_t count, bool more, float* grad, uint16_t* scratch);
  int64_t (*resample_scratch)(const ResampleTask&);
  void (*resample_image)(const ResampleTask&);
};

}  // namespace fpt
