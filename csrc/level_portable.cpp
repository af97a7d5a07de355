// The kernels for any processor: vectors of four floats, which every 64-bit processor has.

#include "kernels/table.h"

#define FPT_LEVEL portable
#define FPT_WIDTH 4
#define FPT_BF16 0
#include "kernels/level.h"
