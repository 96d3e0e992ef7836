// The layout of the tensor cores' tiles in shared memory, for tests/plugins/test_banks.py.
#include "banded/tensor_core_tiles.cuh"

// Offset in a tile of head size 32, 64 or 128 of a row's 16-byte chunk, in elements of 2 bytes.
extern "C" int32_t lfxSwizzled(int32_t headSize, int32_t row, int32_t chunk)
{
    using namespace lfx::banded;
    switch (headSize)
    {
    case 32: return swizzled<32>(row, chunk);
    case 64: return swizzled<64>(row, chunk);
    default: return swizzled<128>(row, chunk);
    }
}
