// The kernels for AVX-512; compiled with -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma.
#define LFX_CPU_SET avx512
#define LFX_CPU_LANES 16
#define LFX_CPU_VECTORS 4
#include "cpu/ops.h"
