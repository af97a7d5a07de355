// Every kernel, compiled once per level: included by level_*.cpp after they have set the target.
// FPT_LEVEL names the level and its namespace, FPT_WIDTH is floats in a vector, and FPT_BF16 says
// that products of bf16 pairs are in hardware; FPT_AMX, that products of tiles of bf16 are.

#define FPT_INLINE inline __attribute__((always_inline))

namespace fpt {
namespace FPT_LEVEL {
namespace {

#include "simd.h"
#include "amx.h"
#include "select_tokens.h"
#include "product.h"
#include "rows.h"
#include "tile_pack.h"
#include "tile_attention.h"
#include "attention.h"
#include "prompt_products.h"
#include "prompt_softmax.h"
#include "prompt_tile_rows.h"
#include "prompt_tile_products.h"
#include "prompt_tiles.h"
#include "prompt_attention.h"
#include "hash_stripes.h"
#include "resample_images.h"
#include "clipped_adam.h"
#include "side_attention.h"
#include "gelu.h"
#include "frozen_linear.h"
#include "side_products.h"
#include "side_parts.h"
#include "trained_linear.h"
#include "side_tile_rows.h"
#include "side_tiles.h"
#include "side_rows.h"
#include "side_single.h"
#include "side_heads.h"
#include "side_factors.h"
#include "side_inner.h"
#include "side_block.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    .lanes = W,
    .prompt_scratch = prompt_scratch,
    .pack_prompts = pack_prompts,
    .prompt_forward = prompt_forward,
    .prompt_backward = prompt_backward,
    .side_scratch = side_scratch,
    .side_forward = side_forward,
    .side_backward = side_backward,
    .side_needs = side_needs,
    .side_pack = side_pack,
    .side_block_forward = side_block_forward,
    .side_block_backward = side_block_backward,
    .side_multiply_factors = side_multiply_factors,
    .side_vector_gradients = side_vector_gradients,
    .select_tokens = select_tokens,
    .gather_rows = gather_rows,
    .attention_scratch = attention_scratch,
    .attention_pack = attention_pack,
    .attention_rows = attention_rows,
    .hash_stripes = hash_stripes,
    .linear_scratch = linear_scratch,
    .linear_columns = linear_columns,
    .sum_of_squares = sum_of_squares,
    .adam_piece = adam_piece,
    .trained_needs = trained_needs,
    .trained_pack = trained_pack,
    .trained_forward = trained_forward,
    .trained_input = trained_input,
    .trained_turn = trained_turn,
    .trained_weight = trained_weight,
    .resample_scratch = resample_scratch,
    .resample_image = resample_image,
};

}  // namespace FPT_LEVEL
}  // namespace fpt
