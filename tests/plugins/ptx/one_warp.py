"""PTX of small kernels that load a value for each lane of a warp, execute a few instructions, and store the results."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.interpreter import Buffer, Interpreter

LANES = 32
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
WORDS = "%w<10>"  # registers that bodies may use
REGISTER_TYPES = {"bool": "pred", "uint16": "b16", "uint32": "b32", "float32": "b32", "uint64": "b64"}
# dtype -> type of a load or store, and bytes. Predicates are in memory as 32 bits.
MEMORY_TYPES = {
    "bool": ("u32", 4),
    "uint16": ("u16", 2),
    "uint32": ("u32", 4),
    "float32": ("f32", 4),
    "uint64": ("u64", 8),
}


def kernel(body: str, parameters: int = 0, shared: str = "", name: str = "test") -> str:
    """A module with one kernel; `body` may use %w, %l and %p, and the addresses %g0, %g1 ... of its parameters."""
    listed = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %g{i}, [p{i}];\n" for i in range(parameters))
    registers = f".reg .b32 {WORDS};\n.reg .b64 %l<10>;\n.reg .b64 %g<{parameters + 1}>;\n.reg .pred %p<10>;\n"
    return f"{HEADER}{shared}.visible .entry {name}({listed})\n{{\n{registers}{loads}{body}\nret;\n}}\n"


def run(
    interpreter: Interpreter,
    text: str,
    inputs: Sequence[NDArray[Any]] = (),
    outputs: Sequence[NDArray[Any]] = (),
    *,
    threads: int = LANES,
    blocks: int = 1,
    shared_bytes: int = 0,
) -> None:
    """Run the kernel `test`; its parameters are the addresses of the inputs, and then of the outputs."""
    interpreter.load(text)
    arrays = [*inputs, *outputs]
    buffers = [Buffer(a.ctypes.data, a.nbytes, i >= len(inputs)) for i, a in enumerate(arrays)]
    interpreter.set_buffers(buffers)
    addresses = [ctypes.c_uint64(buffer.address) for buffer in buffers]
    interpreter.launch("test", (blocks,), (threads,), shared_bytes, *addresses)


def execute(
    interpreter: Interpreter, instructions: str, sources: Mapping[str, Any], targets: Mapping[str, str]
) -> dict[str, NDArray[Any]]:
    """Execute instructions in every lane of a warp.

    Args:
        sources: register -> its value in each lane, or one for all, as an array or scalar of numpy.
        targets: register -> dtype.
    Returns:
        register -> its value in each lane.
    """
    arrays = {name: np.ascontiguousarray(np.broadcast_to(value, LANES)) for name, value in sources.items()}
    dtypes = {name: str(array.dtype) for name, array in arrays.items()} | dict(targets)
    lines = ["mov.u32 %w0, %laneid;"]
    lines += [f".reg .{REGISTER_TYPES[dtype]} %{name};" for name, dtype in dtypes.items()]
    for i, name in enumerate(arrays):
        memory_type, size = MEMORY_TYPES[dtypes[name]]
        lines.append(f"mad.wide.u32 %l0, %w0, {size}, %g{i};")
        if dtypes[name] == "bool":
            lines.append(f"ld.global.u32 %w1, [%l0]; setp.ne.u32 %{name}, %w1, 0;")
        else:
            lines.append(f"ld.global.{memory_type} %{name}, [%l0];")
    lines.append(instructions)
    results = {name: np.zeros(LANES, np.uint32 if dtype == "bool" else dtype) for name, dtype in targets.items()}
    for i, (name, dtype) in enumerate(targets.items(), len(arrays)):
        memory_type, size = MEMORY_TYPES[dtype]
        lines.append(f"mad.wide.u32 %l0, %w0, {size}, %g{i};")
        if dtype == "bool":
            lines.append(f"selp.u32 %w1, 1, 0, %{name}; st.global.u32 [%l0], %w1;")
        else:
            lines.append(f"st.global.{memory_type} [%l0], %{name};")
    inputs = [array.astype(np.uint32) if array.dtype == bool else array for array in arrays.values()]
    run(interpreter, kernel("\n".join(lines), len(arrays) + len(targets)), inputs, list(results.values()))
    return {name: array.astype(targets[name]) for name, array in results.items()}
