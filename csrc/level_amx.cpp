// The kernels for AVX-512 with bf16 in tile registers (AMX): Sapphire Rapids and later.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/table.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define FPT_LEVEL amx
#define FPT_WIDTH 16
#define FPT_BF16 1
#define FPT_AMX 1
#include "kernels/level.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
