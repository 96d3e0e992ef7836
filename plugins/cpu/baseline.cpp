// The kernels for the instruction set of the compiler's target: vectors of 4, which SSE and NEON have; elsewhere the
// compiler makes them of scalars.
#define LFX_CPU_SET baseline
#define LFX_CPU_LANES 4
#ifdef __aarch64__
#define LFX_CPU_VECTORS 4
#else
#define LFX_CPU_VECTORS 2
#endif
#include "cpu/ops.h"
