// The kernels for AVX-512 F, BW, DQ and VL: Skylake-SP and later.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/table.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define FPT_LEVEL avx512
#define FPT_WIDTH 16
#define FPT_BF16 0
#include "kernels/level.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
