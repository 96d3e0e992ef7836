"""Instructions of the interpreter that move values between lanes and memory, and the order in which lanes run."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.plugins.ptx.interpreter import Buffer, Interpreter, PtxError
from tests.plugins.ptx.one_warp import LANES, execute, kernel, run

LANE = np.arange(LANES, dtype=np.uint32)
DYNAMIC = ".extern .shared .align 16 .b8 memory[];\n"


@pytest.mark.parametrize(
    ("mode", "b", "c", "sources", "in_range"),
    [
        ("bfly", 1, 0x1F, LANE ^ 1, LANE >= 0),
        ("bfly", 16, 0x1F, LANE ^ 16, LANE >= 0),
        ("up", 3, 0, np.where(LANE < 3, LANE, LANE - 3), LANE >= 3),
        ("down", 3, 0x1F, np.where(LANE > 28, LANE, LANE + 3), LANE <= 28),
        ("idx", 5, 0x1F, np.full(LANES, 5), LANE >= 0),
        # Segments of 8 lanes: bits 8 to 12 of c keep the upper bits of the lane.
        ("down", 1, 0x181F, np.where(LANE % 8 == 7, LANE, LANE + 1), LANE % 8 != 7),
        ("up", 1, 0x1800, np.where(LANE % 8 == 0, LANE, LANE - 1), LANE % 8 != 0),
        ("idx", 2, 0x181F, LANE // 8 * 8 + 2, LANE >= 0),
    ],
)
def test_shuffle(
    interpreter: Interpreter, mode: str, b: int, c: int, sources: NDArray[Any], in_range: NDArray[Any]
) -> None:
    values = (LANE * 1000 + 7).astype(np.uint32)
    instruction = f"shfl.sync.{mode}.b32 %r|%in_range, %a, {b}, {c}, -1;"
    results = execute(interpreter, instruction, {"a": values}, {"r": "uint32", "in_range": "bool"})
    np.testing.assert_array_equal(results["r"], values[sources])
    np.testing.assert_array_equal(results["in_range"], in_range)


def test_votes_matches_and_reductions(interpreter: Interpreter) -> None:
    odd = LANE % 2 == 1
    instructions = (
        "vote.sync.ballot.b32 %ballot, %odd, -1; vote.sync.any.pred %any, %odd, -1; vote.sync.all.pred %all, %odd, -1;"
        "match.any.sync.b32 %same, %third, -1; redux.sync.max.s32 %largest, %signed, -1;"
        "redux.sync.add.u32 %sum, %third, -1; activemask.b32 %active;"
    )
    sources = {"odd": odd, "third": LANE % 3, "signed": LANE - np.uint32(40)}
    targets = {"ballot": "uint32", "any": "bool", "all": "bool", "same": "uint32", "largest": "uint32"}
    results = execute(interpreter, instructions, sources, targets | {"sum": "uint32", "active": "uint32"})
    assert set(results["ballot"]) == {0xAAAAAAAA}
    assert results["any"].all()
    assert not results["all"].any()
    assert results["same"][0] == sum(1 << lane for lane in range(0, 32, 3))
    assert set(results["largest"].view(np.int32)) == {-9}
    assert set(results["sum"]) == {sum(lane % 3 for lane in range(32))}
    assert set(results["active"]) == {0xFFFFFFFF}


def test_halves_of_registers(interpreter: Interpreter) -> None:
    instructions = "mov.b32 {%low, %high}, %a; mov.b32 %swapped, {%high, %low}; mov.b64 %wide, {%a, %swapped};"
    targets = {"low": "uint16", "high": "uint16", "swapped": "uint32", "wide": "uint64"}
    results = execute(interpreter, instructions, {"a": np.uint32(0x12345678)}, targets)
    assert (results["low"][3], results["high"][3]) == (0x5678, 0x1234)
    assert results["swapped"][3] == 0x56781234
    assert results["wide"][3] == 0x5678123412345678


def test_the_source_of_cvt_may_be_wider_than_its_type(interpreter: Interpreter) -> None:
    results = execute(interpreter, "cvt.s64.s32 %r, %a;", {"a": np.uint64(0x5FFFFFFFE)}, {"r": "uint64"})
    assert results["r"][0] == 2**64 - 2


def test_inline_assembly_declares_registers_in_braces(interpreter: Interpreter) -> None:
    once = "{ .reg .b32 low; add.s32 low, %a, 1; mov.u32 %r, low; }"
    result = execute(interpreter, once + once.replace("%a", "%r"), {"a": LANE}, {"r": "uint32"})["r"]
    np.testing.assert_array_equal(result, LANE + 2)


def test_lanes_part_and_meet_again(interpreter: Interpreter) -> None:
    """A loop of a different length in each lane, within one side of a branch; then the whole warp shuffles."""
    body = (
        "mov.u32 %r, 0; setp.lt.u32 %p1, %a, 16; @!%p1 bra OTHER; mov.u32 %w1, 0;"
        "LOOP: add.u32 %r, %r, %w1; add.u32 %w1, %w1, 1; setp.le.u32 %p2, %w1, %a; @%p2 bra LOOP; bra.uni JOIN;"
        "OTHER: mov.u32 %r, 1000; JOIN: shfl.sync.bfly.b32 %other, %r, 16, 31, -1;"
    )
    results = execute(interpreter, body, {"a": LANE}, {"r": "uint32", "other": "uint32"})
    expected = np.where(LANE < 16, LANE * (LANE + 1) // 2, 1000)
    np.testing.assert_array_equal(results["r"], expected)
    np.testing.assert_array_equal(results["other"], expected[LANE ^ 16])


def test_lanes_that_end_early_do_not_execute_the_rest(interpreter: Interpreter) -> None:
    output = np.zeros(LANES, np.uint32)
    body = (
        "mov.u32 %w0, %tid.x; mad.wide.u32 %l0, %w0, 4, %g0; st.global.u32 [%l0], 1; setp.lt.u32 %p0, %w0, 20;"
        "@%p0 exit; st.global.u32 [%l0], 2;"
    )
    run(interpreter, kernel(body, 1), outputs=[output])
    np.testing.assert_array_equal(output, np.where(LANE < 20, 1, 2))


def test_indices_of_threads_and_blocks(interpreter: Interpreter) -> None:
    output = np.zeros((3, 64, 4), np.uint32)
    body = (
        "mov.u32 %w0, %tid.x; mov.u32 %w1, %ctaid.x; mov.u32 %w2, %ntid.x; mov.u32 %w3, %nctaid.x;"
        "mad.lo.u32 %w4, %w1, %w2, %w0; mad.wide.u32 %l0, %w4, 16, %g0; st.global.v4.u32 [%l0], {%w0, %w1, %w2, %w3};"
    )
    run(interpreter, kernel(body, 1), outputs=[output], threads=64, blocks=3)
    for block, thread in ((0, 0), (1, 33), (2, 63)):
        np.testing.assert_array_equal(output[block, thread], [thread, block, 64, 3])


def test_loads_and_stores_of_each_width(interpreter: Interpreter) -> None:
    source = np.arange(16, dtype=np.uint8) + 0xF0
    target = np.zeros(64, np.uint8)
    body = (
        ".reg .b16 %h<4>; mov.u32 %w0, %laneid; setp.ne.u32 %p0, %w0, 0; @%p0 exit;"
        "ld.global.u8 %h0, [%g0+3]; st.global.u8 [%g1], %h0; ld.global.s8 %h1, [%g0]; st.global.u16 [%g1+2], %h1;"
        "ld.global.u16 %h2, [%g0+6]; st.global.u16 [%g1+4], %h2;"
        "ld.global.f32 %w1, [%g0+4]; st.global.f32 [%g1+8], %w1;"
        "ld.global.v2.f32 {%w2, %w3}, [%g0+8]; st.global.v2.f32 [%g1+16], {%w3, %w2};"
        "ld.global.v4.u32 {%w1, %w2, %w3, %w4}, [%g0]; st.global.v4.f32 [%g1+32], {%w1, %w2, %w3, %w4};"
        "ld.global.u32 %l1, [%g0]; st.global.u64 [%g1+48], %l1; ld.global.nc.u64 %l2, [%g0]; st.u64 [%g1+56], %l2;"
    )
    run(interpreter, kernel(body, 2), [source], [target])
    assert target[0] == 0xF3
    assert target[2:4].view(np.uint16) == 0xFFF0
    np.testing.assert_array_equal(target[4:6], source[6:8])
    np.testing.assert_array_equal(target[8:12], source[4:8])
    np.testing.assert_array_equal(target[16:24], np.roll(source[8:16], 4))
    np.testing.assert_array_equal(target[32:48], source)
    assert list(target[48:56]) == [*source[:4], 0, 0, 0, 0]  # a register may be wider than what is loaded
    np.testing.assert_array_equal(target[56:64], source[:8])


@pytest.mark.parametrize(
    ("store", "load", "registers"),
    [
        ("st.shared.u16", "ld.shared.u16", "%h0"),
        ("st.shared.u32", "ld.shared.u32", "%w4"),
        ("st.shared.f32", "ld.shared.f32", "%w4"),
        ("st.shared.v2.f32", "ld.shared.v2.f32", "{%w4, %w5}"),
        ("st.shared.v4.u32", "ld.shared.v4.f32", "{%w4, %w5, %w6, %w7}"),
    ],
)
def test_shared_memory_of_each_width(interpreter: Interpreter, store: str, load: str, registers: str) -> None:
    """Each lane stores a part of its 16 bytes, and loads and returns that of its neighbour."""
    count = 2 if registers == "%h0" else 4 * registers.count("%")
    source = np.arange(LANES * 16, dtype=np.uint16).astype(np.uint8).reshape(LANES, 16)
    output = np.zeros((LANES, 16), np.uint8)
    shared, result = ("[%w3]", "[%l2]")
    body = (
        ".reg .b16 %h<1>; mov.u32 %w0, %laneid; mov.u32 %w1, memory; mul.wide.u32 %l0, %w0, 16; add.s64 %l1, %g0, %l0;"
        "add.s64 %l2, %g1, %l0; shl.b32 %w2, %w0, 4; add.u32 %w3, %w1, %w2;"
        f"{load.replace('shared', 'global')} {registers}, [%l1]; {store} {shared}, {registers}; bar.warp.sync -1;"
        f"xor.b32 %w2, %w2, 16; add.u32 %w3, %w1, %w2; {load} {registers}, {shared};"
        f"{store.replace('shared', 'global')} {result}, {registers};"
    )
    run(interpreter, kernel(body, 2, DYNAMIC), [source], [output], shared_bytes=LANES * 16)
    np.testing.assert_array_equal(output, source[LANE ^ 1] * (np.arange(16) < count))


def test_parameters_of_a_struct(interpreter: Interpreter) -> None:
    text = (
        ".version 8.0 .target sm_80 .address_size 64 .visible .entry test(.param .u64 out, .param .align 8 .b8 s[24]) {"
        ".reg .b32 %w<4>; .reg .b64 %l<3>; ld.param.u64 %l0, [out]; ld.param.v2.u32 {%w0, %w1}, [s+8];"
        "ld.param.f32 %w2, [s+16]; ld.param.u32 %w3, [s+20]; st.global.v4.u32 [%l0], {%w0, %w1, %w2, %w3}; ret; }"
    )
    output = np.zeros(4, np.uint32)
    struct = np.arange(6, dtype=np.uint32)
    interpreter.load(text)
    interpreter.set_buffers([Buffer(output.ctypes.data, output.nbytes, True)])
    arguments = (ctypes.c_uint64(output.ctypes.data), (ctypes.c_uint32 * 6)(*struct))
    interpreter.launch("test", (1,), (32,), 0, *arguments)
    assert list(output) == [2, 3, 4, 5]


STRUCT = (
    ".version 8.0 .target sm_80 .address_size 64 .visible .entry test(.param .u64 out, .param .align 8 .b8 s[24]) {"
    '.reg .b32 %w<4>; .reg .b64 %l<4>; ld.param.u64 %l0, [out]; mov.b64 %l1, s; .pragma "used_bytes_mask 15";'
)


def launch_with_struct(interpreter: Interpreter, body: str, struct: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Run `STRUCT` and the body with six numbers; %l0 is the address of two outputs, and %l1 that of the struct."""
    output = np.zeros(2, np.uint64)
    interpreter.load(f"{STRUCT}{body} ret; }}")
    interpreter.set_buffers([Buffer(output.ctypes.data, output.nbytes, True)])
    arguments = (ctypes.c_uint64(output.ctypes.data), (ctypes.c_int32 * 6)(*struct))
    interpreter.launch("test", (1,), (32,), 0, *arguments)
    return output


def test_parameters_at_the_address_of_a_struct(interpreter: Interpreter) -> None:
    body = (
        "add.s64 %l1, %l1, 12; ld.param.v2.u32 {%w0, %w1}, [%l1+-4]; ld.param.s32 %l2, [%l1+4]; cvt.u64.u32 %l3, %w1;"
        "st.global.v2.u64 [%l0], {%l2, %l3};"
    )
    output = launch_with_struct(interpreter, body, np.array([0, 1, 2, 3, -4, 5], np.int32))
    assert output.astype(np.int64).tolist() == [-4, 3]  # a 32-bit number is extended by its sign


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.param.u32 %w0, [%l1+24];", "ld.param outside the parameters"),
        ("ld.param.u32 %w0, [%l1+-12];", "ld.param outside the parameters"),
        ("ld.param.u64 %l2, [%l1+4];", "no multiple of its size"),
        ("ld.global.u32 %w0, [%l1];", "access outside the buffers"),
        ("ld.u32 %w0, [%l1];", "access outside the buffers"),
    ],
)
def test_wrong_addresses_of_parameters_are_refused(interpreter: Interpreter, body: str, reason: str) -> None:
    with pytest.raises(PtxError, match=reason):
        launch_with_struct(interpreter, body, np.arange(6, dtype=np.int32))


def test_atomic_operations(interpreter: Interpreter) -> None:
    output = np.zeros(4, np.uint32)
    body = (
        "mov.u32 %w0, %tid.x; mov.u32 %w1, memory; setp.ne.u32 %p0, %w0, 0; @%p0 bra READY;"
        "st.shared.u32 [%w1], 0; st.shared.u32 [%w1+4], 4095; READY: bar.sync 0;"
        "atom.shared.max.s32 %w2, [%w1], %w0; not.b32 %w3, %w0; atom.shared.and.b32 %w2, [%w1+4], %w3; bar.sync 0;"
        "@%p0 exit; ld.shared.v2.u32 {%w2, %w3}, [%w1]; st.global.v2.u32 [%g0], {%w2, %w3};"
        "st.global.u32 [%g0+8], 5; atom.global.add.u32 %w2, [%g0+8], 7; st.global.u32 [%g0+12], %w2;"
    )
    run(interpreter, kernel(body, 1, DYNAMIC), outputs=[output], threads=64, shared_bytes=8)
    assert list(output) == [63, 4095 & ~63, 12, 5]


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LDMATRIX_TRANS = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


@pytest.mark.parametrize("opcode", [LDMATRIX, LDMATRIX_TRANS])
def test_ldmatrix(interpreter: Interpreter, opcode: str) -> None:
    """Lanes 8i to 8i + 7 have the rows of matrix i; a lane gets columns 2 · (lane % 4) and the next of row lane / 4."""
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)  # row r of shared memory is the row of lane 31 - r
    output = np.zeros((LANES, 4, 2), np.uint16)
    transposed = opcode == LDMATRIX_TRANS
    body = (
        "mov.u32 %w0, %laneid; mov.u32 %w1, memory; "
        "shl.b32 %w2, %w0, 4; add.u32 %w3, %w1, %w2; mul.wide.u32 %l0, %w0, 16;"
        "add.s64 %l1, %g0, %l0; ld.global.v4.u32 {%w4, %w5, %w6, %w7}, [%l1];"
        "st.shared.v4.u32 [%w3], {%w4, %w5, %w6, %w7};"
        "bar.warp.sync -1; sub.u32 %w2, 496, %w2; add.u32 %w3, %w1, %w2;"
        f"{opcode} {{%w4, %w5, %w6, %w7}}, [%w3];"
        "add.s64 %l1, %g1, %l0; st.global.v4.u32 [%l1], {%w4, %w5, %w6, %w7};"
    )
    run(interpreter, kernel(body, 2, DYNAMIC), [rows], [output], shared_bytes=512)
    assert list(output[5, 0]) == (
        [8 * (31 - 2) + 1, 8 * (31 - 3) + 1] if transposed else [8 * (31 - 1) + 2, 8 * 30 + 3]
    )
    matrices = rows[::-1].reshape(4, 8, 8)
    for lane in range(LANES):
        for i in range(4):
            matrix = matrices[i].T if transposed else matrices[i]
            np.testing.assert_array_equal(output[lane, i], matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])


@pytest.mark.parametrize(
    "opcode",
    ["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"],
)
def test_mma(interpreter: Interpreter, opcode: str) -> None:
    """The fragments of PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    dtype = ml_dtypes.bfloat16 if "bf16" in opcode else np.float16

    def pair(low: Any, high: Any) -> int:
        return int(np.array([low, high], dtype).view(np.uint32)[0])

    sources = {f"a{i}": np.zeros(LANES, np.uint32) for i in range(4)} | {
        f"b{i}": np.zeros(LANES, np.uint32) for i in (0, 1)
    }
    sources |= {f"c{i}": np.zeros(LANES, np.float32) for i in range(4)}
    for lane in range(LANES):
        group, thread = lane // 4, lane % 4
        for i in range(4):
            row, column = group + i % 2 * 8, thread * 2 + i // 2 * 8
            sources[f"a{i}"][lane] = pair(a[row, column], a[row, column + 1])
            sources[f"c{i}"][lane] = c[group + i // 2 * 8, thread * 2 + i % 2]
        for i in range(2):
            row = thread * 2 + i * 8
            sources[f"b{i}"][lane] = pair(b[row, group], b[row + 1, group])
    instruction = opcode + " {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3};"
    results = execute(interpreter, instruction, sources, {f"d{i}": "float32" for i in range(4)})
    expected = a @ b + c
    for lane in range(LANES):
        for i in range(4):
            assert results[f"d{i}"][lane] == expected[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2]


def test_asynchronous_copies(interpreter: Interpreter) -> None:
    """Of each lane's 16 bytes, lane bytes are copied (at most 16), and the rest are zeros."""
    source = np.arange(1, 513, dtype=np.uint16).view(np.uint8)[: LANES * 16].copy()
    output = np.zeros((LANES, 16), np.uint8)
    body = (
        "mov.u32 %w0, %laneid; mov.u32 %w1, memory; "
        "shl.b32 %w2, %w0, 4; add.u32 %w3, %w1, %w2; mul.wide.u32 %l0, %w0, 16;"
        "add.s64 %l1, %g0, %l0; min.u32 %w8, %w0, 16; cp.async.cg.shared.global [%w3], [%l1], 16, %w8;"
        "cp.async.commit_group; cp.async.wait_group 0; ld.shared.v4.u32 {%w4, %w5, %w6, %w7}, [%w3];"
        "add.s64 %l1, %g1, %l0; st.global.v4.u32 [%l1], {%w4, %w5, %w6, %w7};"
    )
    run(interpreter, kernel(body, 2, DYNAMIC), [source], [output], shared_bytes=512)
    expected = source.reshape(LANES, 16) * (np.arange(16) < LANE[:, None])
    np.testing.assert_array_equal(output, expected)


def test_a_wait_leaves_the_newest_groups_pending(interpreter: Interpreter) -> None:
    source = np.arange(8, dtype=np.uint32)
    output = np.zeros(4, np.uint32)
    body = (
        "mov.u32 %w0, %laneid; setp.ne.u32 %p0, %w0, 0; @%p0 exit; mov.u32 %w1, memory;"
        "cp.async.cg.shared.global [%w1], [%g0], 16; cp.async.commit_group;"
        "cp.async.cg.shared.global [%w1+16], [%g0+16], 16; cp.async.commit_group; cp.async.wait_group 1;"
        "ld.shared.v4.u32 {%w4, %w5, %w6, %w7}, [%w1]; st.global.v4.u32 [%g1], {%w4, %w5, %w6, %w7};"
    )
    run(interpreter, kernel(body, 2, DYNAMIC), [source], [output], shared_bytes=32)
    assert list(output) == [0, 1, 2, 3]


def test_a_barrier_reduces_over_the_block(interpreter: Interpreter) -> None:
    for sought, expected in ((50, 1), (99, 0)):
        output = np.full(64, 7, np.uint32)
        body = (
            f"mov.u32 %w0, %tid.x; setp.eq.u32 %p0, %w0, {sought}; bar.red.or.pred %p1, 0, %p0;"
            "selp.u32 %w1, 1, 0, %p1; mad.wide.u32 %l0, %w0, 4, %g0; st.global.u32 [%l0], %w1;"
        )
        run(interpreter, kernel(body, 1), outputs=[output], threads=64)
        assert set(output) == {expected}


def test_addresses_of_shared_memory_as_generic_ones(interpreter: Interpreter) -> None:
    output = np.zeros(1, np.uint32)
    body = (
        "mov.u32 %w0, %laneid; setp.ne.u32 %p0, %w0, 0; @%p0 exit; mov.u64 %l0, memory; cvta.shared.u64 %l1, %l0;"
        "st.u32 [%l1+4], 9; cvta.to.shared.u64 %l2, %l1; ld.shared.u32 %w1, [%l2+4]; cvta.to.global.u64 %l3, %g0;"
        "st.global.u32 [%l3], %w1;"
    )
    run(interpreter, kernel(body, 1, DYNAMIC), outputs=[output], shared_bytes=16)
    assert output[0] == 9
