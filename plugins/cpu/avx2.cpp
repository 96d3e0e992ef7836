// The kernels for AVX2 and FMA; compiled with -mavx2 -mfma.
#define LFX_CPU_SET avx2
#define LFX_CPU_LANES 8
#define LFX_CPU_VECTORS 2
#include "cpu/ops.h"
