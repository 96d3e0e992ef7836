"""Arithmetic instructions of the interpreter, one by one, with results that are written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.plugins.ptx.interpreter import Interpreter
from tests.plugins.ptx.one_warp import execute

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-140  # subnormal
LARGEST = 3.4028234663852886e38

# Opcode, sources, result.
Row = tuple[str, tuple[Any, ...], Any]
INTEGERS: list[Row] = [
    ("add.s32", (0x7FFFFFFF, 1), 0x80000000),
    ("sub.s32", (1, 3), 0xFFFFFFFE),
    ("mul.lo.s32", (0x10001, 0x10001), 0x20001),
    ("mul.hi.u32", (0x80000000, 6), 3),
    ("mul.hi.s32", (0x80000000, 6), 0xFFFFFFFD),
    ("mad.lo.s32", (7, 6, 0xFFFFFFFF), 41),
    ("div.s32", (0xFFFFFFF9, 2), 0xFFFFFFFD),  # -7 / 2 = -3
    ("rem.s32", (0xFFFFFFF9, 2), 0xFFFFFFFF),
    ("div.s32", (0x80000000, 0xFFFFFFFF), 0x80000000),
    ("div.u32", (0xFFFFFFF9, 2), 0x7FFFFFFC),
    ("rem.u32", (0xFFFFFFF9, 2), 1),
    ("min.s32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
    ("max.s32", (0xFFFFFFFF, 1), 1),
    ("min.u32", (0xFFFFFFFF, 1), 1),
    ("max.u32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
    ("neg.s32", (5,), 0xFFFFFFFB),
    ("abs.s32", (0xFFFFFFFB,), 5),
    ("and.b32", (0b1100, 0b1010), 0b1000),
    ("or.b32", (0b1100, 0b1010), 0b1110),
    ("xor.b32", (0b1100, 0b1010), 0b0110),
    ("not.b32", (0x0F0F0F0F,), 0xF0F0F0F0),
    ("shl.b32", (3, 31), 0x80000000),
    ("shl.b32", (3, 32), 0),
    ("shr.u32", (0x80000000, 31), 1),
    ("shr.u32", (0x80000000, 32), 0),
    ("shr.s32", (0x80000000, 4), 0xF8000000),
    ("shr.s32", (0x80000000, 40), 0xFFFFFFFF),
    ("shf.l.wrap.b32", (0x89ABCDEF, 0x01234567, 8), 0x23456789),
    ("shf.l.wrap.b32", (0x89ABCDEF, 0x01234567, 40), 0x23456789),
    ("shf.l.clamp.b32", (0x89ABCDEF, 0x01234567, 40), 0x89ABCDEF),
    ("shf.r.wrap.b32", (0x89ABCDEF, 0x01234567, 8), 0x6789ABCD),
    ("shf.r.clamp.b32", (0x89ABCDEF, 0x01234567, 40), 0x01234567),
    ("bfi.b32", (0xFF, 0, 4, 3), 0x70),
    ("bfi.b32", (0, 0xFFFFFFFF, 28, 4), 0x0FFFFFFF),
    ("bfi.b32", (1, 7, 32, 4), 7),
    ("bfe.u32", (0x12345678, 8, 12), 0x456),
    ("popc.b32", (0xF0F00001,), 9),
    ("clz.b32", (0x00010000,), 15),
    ("clz.b32", (0,), 32),
    ("brev.b32", (0x00000003,), 0xC0000000),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7250), 0x77225500),
    ("prmt.b32", (0x33221180, 0, 0x0008), 0x808080FF),  # byte 0 replicates its sign
    ("lop3.b32", (0b11110000, 0b11001100, 0b10101010, 0x80), 0b10000000),  # a & b & c
    ("lop3.b32", (0b11110000, 0b11001100, 0b10101010, 0xFE), 0b11111110),  # a | b | c
    ("lop3.b32", (0b11110000, 0b11001100, 0b10101010, 0x96), 0b10010110),  # a ^ b ^ c
    ("lop3.b32", (0b11110000, 0b11001100, 0b10101010, 0xCA), 0b11001010),  # a ? b : c
    ("mov.u32", (7,), 7),
    ("mov.b32", (7,), 7),
]
FLOATS: list[Row] = [
    ("add.f32", (1.0, 2.0**-24), 1.0),
    ("add.f32", (1.0 + 2.0**-23, 2.0**-24), 1.0 + 2.0**-22),
    ("add.f32", (TINY, TINY), 2 * TINY),
    ("add.ftz.f32", (TINY, TINY), 0.0),
    ("sub.f32", (INF, INF), NAN),
    ("mul.f32", (LARGEST, 2.0), INF),
    ("mul.f32", (TINY, 0.5), TINY / 2),
    ("mul.ftz.f32", (-TINY, 4.0), -0.0),
    ("fma.rn.f32", (1.0 + 2.0**-12, 1.0 + 2.0**-12, -1.0), 2.0**-11 + 2.0**-24),  # the product is not rounded
    ("fma.rn.f32", (LARGEST, 2.0, -LARGEST), LARGEST),
    ("div.rn.f32", (1.0, 3.0), 0.3333333432674408),
    ("div.rn.f32", (1.0, -0.0), -INF),
    ("rcp.rn.f32", (3.0,), 0.3333333432674408),
    ("rcp.approx.ftz.f32", (4.0,), 0.25),
    ("sqrt.rn.f32", (2.0,), 1.4142135381698608),
    ("neg.f32", (0.0,), -0.0),
    ("abs.f32", (-INF,), INF),
    ("max.f32", (NAN, 1.0), 1.0),
    ("max.f32", (-0.0, 0.0), 0.0),
    ("max.f32", (-INF, -1.0), -1.0),
    ("min.f32", (NAN, NAN), NAN),
    ("min.f32", (0.0, -0.0), -0.0),
    ("ex2.approx.ftz.f32", (3.0,), 8.0),
    ("ex2.approx.ftz.f32", (-INF,), 0.0),
    ("ex2.approx.ftz.f32", (-126.0,), 2.0**-126),
    ("ex2.approx.ftz.f32", (-127.0,), 0.0),
    ("ex2.approx.ftz.f32", (TINY,), 1.0),
    ("ex2.approx.ftz.f32", (200.0,), INF),
    ("ex2.approx.ftz.f32", (NAN,), NAN),
    ("ex2.approx.f32", (-127.0,), 2.0**-127),
    ("lg2.approx.f32", (8.0,), 3.0),
    ("lg2.approx.ftz.f32", (TINY,), -INF),
    ("mov.f32", (-0.0,), -0.0),
    ("cvt.rn.f32.s32", (np.uint32(0xFFFFFFFF),), -1.0),
    ("cvt.rn.f32.u32", (np.uint32(0x01000001),), 16777216.0),
]
COMPARISONS: list[Row] = [
    ("setp.eq.s32", (1, 1), True),
    ("setp.ne.s32", (1, 1), False),
    ("setp.lt.s32", (0xFFFFFFFF, 0), True),
    ("setp.lt.u32", (0xFFFFFFFF, 0), False),
    ("setp.le.s32", (1, 1), True),
    ("setp.le.u32", (2, 1), False),
    ("setp.gt.s32", (0, 0xFFFFFFFF), True),
    ("setp.gt.u32", (0, 0xFFFFFFFF), False),
    ("setp.ge.s32", (0, 0), True),
    ("setp.ge.u32", (0, 1), False),
    ("setp.ne.u32", (0, 1), True),
    ("setp.eq.b32", (3, 3), True),
    ("setp.eq.s16", (np.uint16(3), np.uint16(4)), False),
    ("setp.eq.s64", (np.uint64(2**63), np.uint64(2**63)), True),
    ("setp.gt.s64", (np.uint64(1), np.uint64(2**64 - 1)), True),
    ("setp.eq.f32", (np.float32(0.0), np.float32(-0.0)), True),
    ("setp.eq.f32", (np.float32(NAN), np.float32(NAN)), False),
    ("setp.ne.f32", (np.float32(NAN), np.float32(1)), False),
    ("setp.neu.f32", (np.float32(NAN), np.float32(1)), True),
    ("setp.gt.f32", (np.float32(NAN), np.float32(1)), False),
    ("setp.leu.f32", (np.float32(NAN), np.float32(1)), True),
    ("setp.leu.f32", (np.float32(2), np.float32(1)), False),
    ("setp.nan.f32", (np.float32(NAN), np.float32(1)), True),
]
OTHER_SIZES: list[Row] = [
    ("mul.wide.s32", (np.uint32(0xFFFFFFFF), np.uint32(3)), np.uint64(2**64 - 3)),
    ("mul.wide.u32", (np.uint32(0xFFFFFFFF), np.uint32(3)), np.uint64(0x2FFFFFFFD)),
    ("mad.wide.s32", (np.uint32(0xFFFFFFFF), np.uint32(3), np.uint64(5)), np.uint64(2)),
    ("mul.wide.u16", (np.uint16(0xFFFF), np.uint16(3)), np.uint32(0x2FFFD)),
    ("mul.wide.s16", (np.uint16(0xFFFF), np.uint16(3)), np.uint32(0xFFFFFFFD)),
    ("add.s16", (np.uint16(0xFFFF), np.uint16(3)), np.uint16(2)),
    ("and.b16", (np.uint16(12), np.uint16(10)), np.uint16(8)),
    ("xor.b16", (np.uint16(12), np.uint16(10)), np.uint16(6)),
    ("shr.u16", (np.uint16(0x8000), np.uint32(15)), np.uint16(1)),
    ("mad.lo.s64", (np.uint64(2**63 + 3), np.uint64(2), np.uint64(5)), np.uint64(11)),
    ("or.b64", (np.uint64(2**40), np.uint64(1)), np.uint64(2**40 + 1)),
    ("setp.ne.s64", (np.uint64(2**40), np.uint64(2**40 + 1)), np.bool_(True)),
    ("cvt.u16.u32", (np.uint32(0x12345),), np.uint16(0x2345)),
    ("selp.s32", (np.uint32(1), np.uint32(2), np.bool_(True)), np.uint32(1)),
    ("add.s64", (np.uint64(2**64 - 1), np.uint64(2)), np.uint64(1)),
    ("mul.lo.s64", (np.uint64(2**63 + 3), np.uint64(2)), np.uint64(6)),
    ("shl.b64", (np.uint64(3), np.uint32(63)), np.uint64(2**63)),
    ("shr.u64", (np.uint64(2**63), np.uint32(62)), np.uint64(2)),
    ("shr.s64", (np.uint64(2**63), np.uint32(62)), np.uint64(2**64 - 2)),
    ("and.b64", (np.uint64(12), np.uint64(10)), np.uint64(8)),
    ("bfi.b64", (np.uint64(5), np.uint64(9), np.uint32(32), np.uint32(32)), np.uint64(5 * 2**32 + 9)),
    ("mov.u64", (np.uint64(2**40),), np.uint64(2**40)),
    ("mov.u16", (np.uint16(9),), np.uint16(9)),
    ("cvt.s64.s32", (np.uint32(0xFFFFFFFE),), np.uint64(2**64 - 2)),
    ("cvt.u64.u32", (np.uint32(0xFFFFFFFE),), np.uint64(0xFFFFFFFE)),
    ("cvt.u32.u64", (np.uint64(2**40 + 7),), np.uint32(7)),
    ("cvt.u16.u64", (np.uint64(0x12345),), np.uint16(0x2345)),
    ("cvt.rzi.s32.f32", (np.float32(-2.9),), np.uint32(0xFFFFFFFE)),
    ("cvt.rni.s32.f32", (np.float32(2.5),), np.uint32(2)),
    ("cvt.rzi.u32.f32", (np.float32(-1),), np.uint32(0)),
    ("selp.b16", (np.uint16(1), np.uint16(2), np.bool_(False)), np.uint16(2)),
    ("selp.b32", (np.uint32(1), np.uint32(2), np.bool_(True)), np.uint32(1)),
    ("selp.b64", (np.uint64(1 << 40), np.uint64(2), np.bool_(True)), np.uint64(1 << 40)),
    ("selp.f32", (np.float32(1), np.float32(2), np.bool_(False)), np.float32(2)),
    ("selp.u16", (np.uint16(1), np.uint16(2), np.bool_(False)), np.uint16(2)),
    ("selp.u32", (np.uint32(1), np.uint32(2), np.bool_(False)), np.uint32(2)),
    ("and.pred", (np.bool_(True), np.bool_(False)), np.bool_(False)),
    ("or.pred", (np.bool_(True), np.bool_(False)), np.bool_(True)),
    ("xor.pred", (np.bool_(True), np.bool_(True)), np.bool_(False)),
    ("not.pred", (np.bool_(False),), np.bool_(True)),
    ("mov.pred", (np.bool_(True),), np.bool_(True)),
]
HALVES: list[Row] = [  # of float16 and bfloat16; 1 + 2^-11 and so on are ties
    ("cvt.rn.f16.f32", (1.0 + 2.0**-11,), 0x3C00),
    ("cvt.rn.f16.f32", (1.0 + 3 * 2.0**-11,), 0x3C02),
    ("cvt.rn.f16.f32", (1.0 + 2.0**-11 + 2.0**-20,), 0x3C01),
    ("cvt.rn.f16.f32", (65519.0,), 0x7BFF),
    ("cvt.rn.f16.f32", (65520.0,), 0x7C00),
    ("cvt.rn.f16.f32", (-1e9,), 0xFC00),
    ("cvt.rn.f16.f32", (2.0**-24,), 0x0001),
    ("cvt.rn.f16.f32", (2.0**-25,), 0x0000),
    ("cvt.rn.f16.f32", (1.5 * 2.0**-25,), 0x0001),
    ("cvt.rn.f16.f32", (-(2.0**-14) + 2.0**-25,), 0x8400),
    ("cvt.rn.f16.f32", (NAN,), 0x7FFF),
    ("cvt.rn.f16.f32", (INF,), 0x7C00),
    ("cvt.rn.bf16.f32", (1.0 + 2.0**-8,), 0x3F80),
    ("cvt.rn.bf16.f32", (1.0 + 3 * 2.0**-8,), 0x3F82),
    ("cvt.rn.bf16.f32", (LARGEST,), 0x7F80),
    ("cvt.rn.bf16.f32", (-NAN,), 0x7FFF),
    ("cvt.rn.f16x2.f32", (2.0, 1.0), 0x40003C00),  # the first source is the upper half
    ("cvt.rn.bf16x2.f32", (2.0, 1.0), 0x40003F80),
]


def as_sources(values: tuple[Any, ...], dtype: type) -> dict[str, Any]:
    """Registers a, b, c and d with the values; those without a dtype get `dtype`."""
    return {
        name: value if isinstance(value, np.generic) else dtype(value)
        for name, value in zip("abcd", values, strict=False)
    }


def check(interpreter: Interpreter, opcode: str, sources: dict[str, Any], expected: Any) -> None:
    """Every lane has the expected result, bit by bit, or NaN."""
    instruction = f"{opcode} %r, {', '.join(f'%{name}' for name in sources)};"
    result = execute(interpreter, instruction, sources, {"r": str(expected.dtype)})["r"]
    wanted = np.full(32, expected)
    if np.isnan(float(expected)):
        assert np.isnan(result).all()
    else:
        assert result.tobytes() == wanted.tobytes(), (result[0], expected)


def identifier(row: Row) -> str:
    return f"{row[0]}-{'-'.join(str(value) for value in row[1])}"


@pytest.mark.parametrize(("opcode", "values", "expected"), INTEGERS, ids=map(identifier, INTEGERS))
def test_integers(interpreter: Interpreter, opcode: str, values: tuple[Any, ...], expected: int) -> None:
    check(interpreter, opcode, as_sources(values, np.uint32), np.uint32(expected))


@pytest.mark.parametrize(("opcode", "values", "expected"), FLOATS, ids=map(identifier, FLOATS))
def test_floats(interpreter: Interpreter, opcode: str, values: tuple[Any, ...], expected: float) -> None:
    check(interpreter, opcode, as_sources(values, np.float32), np.float32(expected))


@pytest.mark.parametrize(("opcode", "values", "expected"), COMPARISONS, ids=map(identifier, COMPARISONS))
def test_comparisons(interpreter: Interpreter, opcode: str, values: tuple[Any, ...], expected: bool) -> None:
    check(interpreter, opcode, as_sources(values, np.uint32), np.bool_(expected))


@pytest.mark.parametrize(("opcode", "values", "expected"), OTHER_SIZES, ids=map(identifier, OTHER_SIZES))
def test_registers_of_other_sizes(
    interpreter: Interpreter, opcode: str, values: tuple[Any, ...], expected: Any
) -> None:
    check(interpreter, opcode, as_sources(values, np.uint32), expected)


@pytest.mark.parametrize(("opcode", "values", "expected"), HALVES, ids=map(identifier, HALVES))
def test_16_bit_floats(interpreter: Interpreter, opcode: str, values: tuple[Any, ...], expected: int) -> None:
    result = np.uint32(expected) if "x2" in opcode else np.uint16(expected)
    check(interpreter, opcode, as_sources(values, np.float32), result)
