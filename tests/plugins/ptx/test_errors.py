"""What the interpreter refuses, each in a small kernel, and the reason that it gives."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.plugins.ptx.interpreter import Interpreter, PtxError
from tests.plugins.ptx.one_warp import kernel, run

SHARED = ".extern .shared .align 16 .b8 memory[];\n"
# %w0: thread; %w1: shared memory; %w2: the thread's 4 bytes of it; %p0: whether it is not thread 0.
START = (
    "mov.u32 %w0, %tid.x; mov.u32 %w1, memory; shl.b32 %w2, %w0, 2; add.u32 %w2, %w1, %w2; setp.ne.u32 %p0, %w0, 0;\n"
)
NEIGHBOUR = "xor.b32 %w3, %w2, 4; ld.shared.u32 %w4, [%w3];"  # of lane 1 for lane 0, and so on
OTHER_WARP = "xor.b32 %w3, %w0, 32; shl.b32 %w3, %w3, 2; add.u32 %w3, %w1, %w3; ld.shared.u32 %w4, [%w3];"
COPY = "cp.async.cg.shared.global [%w1], [%g0], 16; "
READ_COPY = "ld.shared.u32 %w4, [%w1];"
ONE_THREAD = "@%p0 bra END; "
HALF_WARP = "setp.ge.u32 %p1, %w0, 16; "
WARP_1 = "setp.ge.u32 %p1, %w0, 32; "
STORED = "undefined register is used as a value to store"
UNFINISHED = "before the copy to it has been waited for"

# Instructions and the reason to refuse them. %g0 has 64 bytes of input, %g1 64 bytes of output.
REFUSED = {
    "an undefined address": ("ld.global.u32 %w4, [%l5];", "undefined register is used as an address"),
    "an undefined guard": ("@%p5 mov.u32 %w4, 1;", "undefined register is used as a predicate"),
    "an undefined branch": ("setp.lt.u32 %p5, %w6, 3; @%p5 bra END;", "undefined register is used as a predicate"),
    "an undefined vote": ("vote.sync.any.pred %p6, %p5, -1;", "undefined register is used as a vote"),
    "a sum with an undefined register": ("add.u32 %w5, %w6, 1; st.global.u32 [%g1], %w5;", STORED),
    "a copy of an undefined register": ("mov.u32 %w5, %w6; st.shared.u32 [%w2], %w5;", STORED),
    "an undefined element": ("@!%p0 st.global.v2.u32 [%g1], {%w0, %w6};", STORED),
    "a division by zero": ("div.u32 %w5, %w0, 0; st.global.u32 [%g1], %w5;", STORED),
    "an undefined choice": ("selp.u32 %w5, %w0, %w6, %p0; st.shared.u32 [%w2], %w5;", STORED),
    "a register that one side of a branch leaves undefined": (
        "@%p0 bra SKIP; mov.u32 %w5, 1; SKIP: st.shared.u32 [%w2], %w5;",
        STORED + ".*lane 1,",
    ),
    "a shuffle of an undefined register": (
        "@%p0 bra SKIP; mov.u32 %w5, 1; SKIP: shfl.sync.bfly.b32 %w5, %w5, 1, 31, -1; @!%p0 st.shared.u32 [%w2], %w5;",
        STORED,
    ),
    "an unaligned word": ("ld.global.u32 %w4, [%g0+2];", "unaligned access of 4 bytes"),
    "an unaligned vector": ("ld.global.v4.u32 {%w4, %w5, %w6, %w7}, [%g0+8];", "unaligned access of 16 bytes"),
    "an unaligned pair": ("st.shared.v2.u32 [%w1+4], {%w0, %w0};", "unaligned access of 8 bytes"),
    "past the end of a buffer": ("ld.global.u32 %w4, [%g0+64];", "access outside the buffers"),
    "before a buffer": ("st.global.u32 [%g1+-4], 1;", "access outside the buffers"),
    "past the end of shared memory": (ONE_THREAD + "st.shared.u32 [%w1+256], 1;", "outside the block's shared memory"),
    "before shared memory": (ONE_THREAD + "st.shared.u32 [%w1+-4], 1;", "outside the block's shared memory"),
    "a store to an input": ("st.global.u32 [%g0], 1;", "an input is written"),
    "an output that is read": ("ld.global.u32 %w4, [%g1];", "global memory is read before it is written"),
    "shared memory that nobody wrote": ("ld.shared.u32 %w4, [%w2];", "shared memory is read before it is written"),
    "a copy without a wait": (ONE_THREAD + COPY + "cp.async.commit_group;" + READ_COPY, UNFINISHED),
    "a copy without a commit": (ONE_THREAD + COPY + "cp.async.wait_group 0;" + READ_COPY, UNFINISHED),
    "a copy in a group that may be pending": (
        ONE_THREAD + COPY + "cp.async.commit_group; cp.async.wait_group 1;" + READ_COPY,
        UNFINISHED,
    ),
    "a store over a copy": (ONE_THREAD + COPY + "st.shared.u32 [%w1], 1;", UNFINISHED),
    "a copy from an unaligned address": ("cp.async.cg.shared.global [%w1], [%g0+8], 16, 0;", "no multiple of 16"),
    "a copy to an unaligned address": ("cp.async.cg.shared.global [%w1+8], [%g0], 16;", "unaligned access of 16 bytes"),
    "a copy of too many bytes": ("cp.async.cg.shared.global [%w1], [%g0], 16, 32;", "more than 16 bytes"),
    "a copy past the end": (ONE_THREAD + "cp.async.cg.shared.global [%w1], [%g0+64], 16;", "outside the buffers"),
    "ldmatrix of an unaligned address": (
        "st.shared.u32 [%w2], 0; bar.sync 0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%w4}, [%w1+8];",
        "no multiple of 16",
    ),
    "a barrier in both sides of a branch": (
        "@%p0 bra APART; bar.sync 0; bra END; APART: bar.sync 0;",
        "lanes of a warp wait for one another forever",
    ),
    "a barrier that a warp does not reach": (
        WARP_1 + "@%p1 bra END; bar.sync 0;",
        "not reached by threads that have ended",
    ),
    "different barriers": (
        WARP_1 + "@%p1 bra OTHER; bar.sync 0; bra END; OTHER: bar.red.or.pred %p2, 0, %p1;",
        "warps wait at different kinds of barriers",
    ),
    "a shuffle with lanes that have ended": (
        HALF_WARP + "@%p1 exit; shfl.sync.bfly.b32 %w4, %w0, 1, 31, -1;",
        "some of its lanes have ended",
    ),
    "a barrier with lanes that have ended": (HALF_WARP + "@%p1 exit; bar.sync 0;", "some of its lanes have ended"),
    "masks that differ": ("bar.warp.sync %w0;", "lanes with different masks"),
    "a shuffle in some lanes": ("@%p0 shfl.sync.bfly.b32 %w4, %w0, 1, 31, -1;", "wait for one another forever"),
    "a shuffle from the other side of a branch": (
        HALF_WARP + "@%p1 bra END; shfl.sync.idx.b32 %w4, %w0, 20, 31, 0xffff;",
        "from a lane that does not execute it",
    ),
    "a read in the warp without a barrier": (
        "st.shared.u32 [%w2], %w0;" + NEIGHBOUR,
        "this read of shared memory from another thread's write",
    ),
    "a read in another warp without a barrier": (
        WARP_1 + "@%p1 bra READ; st.shared.u32 [%w2], %w0; bra END; READ:" + OTHER_WARP,
        "this read of shared memory from another thread's write",
    ),
    "two writes": ("st.shared.u32 [%w1], %w0;", "this write of shared memory from another thread's write"),
    "a write after a read in the warp": (
        "st.shared.u32 [%w2], %w0; bar.warp.sync -1;" + NEIGHBOUR + "st.shared.u32 [%w2], %w0;",
        "this write of shared memory from another thread's read",
    ),
    "a write after a read in another warp": (
        "st.shared.u32 [%w2], %w0; bar.sync 0;"
        + WARP_1
        + "@%p1 bra WRITE;"
        + OTHER_WARP
        + "bra END; WRITE: st.shared.u32 [%w2], %w0;",
        "this write of shared memory from another thread's read",
    ),
    "a copy over what is read": (
        "@%p0 bra READ; st.shared.v4.u32 [%w1], {%w0, %w0, %w0, %w0}; READ: bar.sync 0;"
        + READ_COPY
        + ONE_THREAD
        + COPY,
        "this write of shared memory from another thread's read",
    ),
    "a read beside atomic operations": (
        "st.shared.u32 [%w2], 0; bar.sync 0; atom.shared.add.u32 %w4, [%w1], 1; ld.shared.u32 %w5, [%w1];",
        "this read of shared memory from another thread's write",
    ),
    "a loop without end": ("FOREVER: bra FOREVER;", "a loop that does not end"),
    "an unknown modifier": ("add.sat.s32 %w4, %w0, %w0;", "does not know the opcode add.sat.s32"),
    "an unknown copy": ("cp.async.ca.shared.global [%w1], [%g0], 16;", "does not know the opcode cp.async.ca"),
    "an unknown hint": (
        "ld.global.L1::no_allocate.u32 %w4, [%g0];",
        "does not know the opcode ld.global.L1::no_allocate",
    ),
    "another barrier": ("bar.sync 1;", "only barrier 0 is supported"),
    "a register of 64 bits in an operation of 32": ("add.s32 %w4, %l1, 1;", "%l1 is not one that the opcode takes"),
    "an address of 32 bits in global memory": ("ld.global.u32 %w4, [%w0];", "%w0 is not one that the opcode takes"),
    "a predicate in arithmetic": ("add.s32 %w4, %p1, 1;", "%p1 is not one that the opcode takes"),
    "a register that is not declared": ("add.s32 %w4, %unknown, 1;", "%unknown is not one that the opcode takes"),
    "too few operands": ("add.s32 %w4, %w0;", "expected 3 operands"),
    "a vector of the wrong length": (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%w4, %w5}, [%w1];",
        "expected a vector of 4",
    ),
    "local memory": (".local .align 4 .b8 depot[4];", "directive .local is not supported"),
    "a decimal fraction": ("mov.f32 %w4, 1.5;", "a number that is not supported"),
}
ALLOWED = {
    "an undefined register may be copied": (
        "mov.u32 %w5, %w6; add.u32 %w7, %w5, 1; shfl.sync.bfly.b32 %w8, %w7, 1, 31, -1;"
    ),
    "an undefined choice that is not chosen": "selp.u32 %w5, %w0, %w6, %p0; @%p0 st.shared.u32 [%w2], %w5;",
    "a predicate that does not hold guards an access": "and.pred %p1, %p0, 0; @%p1 ld.global.u32 %w4, [%g0+640];",
    "nothing is read by a copy of no bytes": "@!%p0 cp.async.cg.shared.global [%w1], [%g0+6400], 16, 0;",
    "a barrier of the warp separates its lanes": "st.shared.u32 [%w2], %w0; bar.warp.sync -1;" + NEIGHBOUR,
    "a barrier of the block separates warps": (
        "st.shared.u32 [%w2], %w0; bar.sync 0;" + OTHER_WARP + "bar.sync 0; st.shared.u32 [%w2], %w0;"
    ),
    "a barrier of the block separates lanes, too": (
        "st.shared.u32 [%w2], %w0; bar.sync 0;"
        + NEIGHBOUR
        + "bar.sync 0; ld.shared.u32 %w4, [%w2]; st.shared.u32 [%w2], %w4;"
    ),
    "a thread reads what it wrote": "st.shared.u32 [%w2], %w0; ld.shared.u32 %w4, [%w2]; st.shared.u32 [%w2], %w4;",
    "threads read the same": "st.shared.u32 [%w2], %w0; bar.sync 0; ld.shared.u32 %w4, [%w1];",
    "a barrier in each side of a branch that whole warps take": (
        WARP_1 + "@%p1 bra OTHER; bar.sync 0; bra END; OTHER: bar.sync 0;"
    ),
}


def run_instructions(interpreter: Interpreter, instructions: str) -> None:
    body = START + "\n".join(f"{line};" for line in instructions.split(";") if line.strip()) + "\nEND:"
    run(
        interpreter,
        kernel(body, 2, SHARED),
        [np.arange(16, dtype=np.uint32)],
        [np.zeros(16, np.uint32)],
        threads=64,
        shared_bytes=256,
    )


@pytest.mark.parametrize("name", REFUSED)
def test_refused(interpreter: Interpreter, name: str) -> None:
    instructions, reason = REFUSED[name]
    with pytest.raises(PtxError, match=reason):
        run_instructions(interpreter, instructions)


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(interpreter: Interpreter, name: str) -> None:
    run_instructions(interpreter, ALLOWED[name])


def test_an_error_says_where(interpreter: Interpreter) -> None:
    with pytest.raises(PtxError) as caught:
        run_instructions(interpreter, "setp.ne.u32 %p1, %w0, 37; @!%p1 ld.global.u32 %w4, [%g0+1024];")
    assert "access outside the buffers: 4 bytes at 0x" in str(caught.value)
    assert "(test, warp 1, lane 5, PTX line 15: @!%p1 ld.global.u32 %w4, [%g0+1024];)" in str(caught.value)


def test_the_number_of_threads_is_checked(interpreter: Interpreter) -> None:
    for threads in (33, 2048):
        with pytest.raises(PtxError, match=f"blocks of {threads} threads"):
            run(interpreter, kernel(""), threads=threads)


def test_a_kernel_that_is_not_loaded(interpreter: Interpreter) -> None:
    with pytest.raises(PtxError, match="no kernel missing is loaded"):
        interpreter.launch("missing", (1,), (32,), 0)


def test_a_launch_may_take_as_much_shared_memory_as_its_function_was_allowed(interpreter: Interpreter) -> None:
    """The stand-in for the CUDA runtime, called as host code calls it."""

    class Dimensions(ctypes.Structure):
        _fields_ = tuple((axis, ctypes.c_uint32) for axis in "xyz")

    cuda, function = interpreter.library, ctypes.c_void_p(0x1000)
    invalid_value, max_dynamic_shared_memory = 1, 8
    interpreter.load(kernel(""))
    interpreter.set_buffers([])
    register = getattr(cuda, "__cudaRegisterFunction")
    register(None, function, None, b"test", -1, None, None, None, None, None)

    def launch(host_function: ctypes.c_void_p, shared_bytes: int) -> int:
        size = ctypes.c_size_t(shared_bytes)
        return int(cuda.cudaLaunchKernel(host_function, Dimensions(1, 1, 1), Dimensions(32, 1, 1), None, size, None))

    assert launch(function, 48 * 1024) == 0
    assert launch(function, 48 * 1024 + 1) == invalid_value
    assert "more shared memory than cudaFuncSetAttribute allowed" in interpreter.error()
    assert cuda.cudaGetLastError() == invalid_value
    assert cuda.cudaFuncSetAttribute(function, max_dynamic_shared_memory, 101376) == 0
    assert launch(function, 101376) == 0
    assert launch(ctypes.c_void_p(0x2000), 0) == invalid_value
