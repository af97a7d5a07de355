// The kernels for AVX2, FMA and F16C: most x86 processors since 2013.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/table.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FPT_LEVEL avx2
#define FPT_WIDTH 8
#define FPT_BF16 0
#include "kernels/level.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
