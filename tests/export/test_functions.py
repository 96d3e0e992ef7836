"""The function bodies against the dense float64 reference, with all attributes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from lfx import reference
from lfx.export import functions
from tests.marks import fast_if

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# Largest absolute errors for values of order one. Chosen, not derived: 34, 8 and 8 unit roundoffs of the dtype, for the
# four rounded operations of the op in sequence.
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


def _model(op: str, inputs: dict[str, np.ndarray], opset: int = 17, bodies: Any = None, **attributes: Any) -> bytes:
    def info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        data_type = TYPES.get(array.dtype.name, TensorProto.INT32)
        return helper.make_tensor_value_info(name, data_type, [f"{name}_{axis}" for axis in range(array.ndim)])

    first = next(iter(inputs.values()))
    node = helper.make_node(op, list(inputs), ["out"], domain=functions.DOMAIN, **attributes)
    output = helper.make_tensor_value_info("out", TYPES[first.dtype.name], ["b", "s", "w"])
    protos = [ir.to_proto(functions.function(body, opset)) for body in bodies or functions.OPS]
    model = helper.make_model(
        helper.make_graph([node], op, [info(n, a) for n, a in inputs.items()], [output]),
        functions=protos,
        opset_imports=[
            helper.make_opsetid("", opset),
            helper.make_opsetid(functions.DOMAIN, functions.VERSION),
        ],
        ir_version=10,
    )
    return model.SerializeToString()


def _run(op: str, inputs: dict[str, np.ndarray], opset: int = 17, bodies: Any = None, **attributes: Any) -> np.ndarray:
    model = _model(op, inputs, opset, bodies, **attributes)
    if next(iter(inputs.values())).dtype == ml_dtypes.bfloat16:
        return np.asarray(ReferenceEvaluator(onnx.load_from_string(model)).run(None, inputs)[0])
    return np.asarray(_session(model).run(None, inputs)[0])


@functools.lru_cache(16)  # a model has no sizes, and tests run it at many
def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options)


def _banded(
    seqlen: int,
    heads: int = 2,
    size: int = 8,
    batch: int = 2,
    slots: int = 3,
    seed: int = 0,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """Make random inputs: rows with no, some and all slots used, in random order; a mask with holes."""
    random = np.random.default_rng([seed, seqlen, heads, batch])
    q, k, v = random.standard_normal((3, batch, seqlen, heads * size)).astype(dtype)
    mask = (random.random((batch, seqlen)) > 0.25).astype(np.int32)
    index = np.full((batch, slots), -1, dtype=np.int32)
    for row in range(batch):
        real = np.flatnonzero(mask[row])
        chosen = random.permutation(real)[: min(len(real), (row * 2) % (slots + 1))]
        index[row, random.permutation(slots)[: len(chosen)]] = chosen
    rows = random.standard_normal((batch, slots, heads * size)).astype(dtype)
    return {"q": q, "k": k, "v": v, "mask": mask, "index": index, "rows": rows}


def _wide(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [a.astype(np.float64) if a.dtype != np.int32 else a for a in inputs.values()]


WINDOWS = (1, 3, 8)
LENGTHS = (1, 2, 7, 8, 9, 16, 17, 25, 127, 128, 129, 200)


@fast_if(lambda seqlen, window: (seqlen, window) in ((1, 1), (17, 3), (25, 8), (129, 8), (200, 3)))
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS)
def test_banded_attention_is_the_reference_at_every_length_dilation_and_direction(seqlen: int, window: int) -> None:
    for dilation, causal in itertools.product((1, 2, 3), (0, 1)):
        inputs = _banded(seqlen, batch=3, seed=window)
        options = {"num_heads": 2, "window": window, "dilation": dilation, "causal": causal}
        actual = _run("BandedAttention", inputs, **options)
        expected = reference.banded_attention(*_wide(inputs), **options)
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE["float32"], err_msg=str(options))


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (2, 32), (3, 64), (2, 128)])
def test_banded_attention_takes_any_head_size_and_scale(heads: int, size: int) -> None:
    inputs = _banded(40, heads, size)
    for scale in (None, 0.05, 1.0):
        options = {} if scale is None else {"scale": scale}
        actual = _run("BandedAttention", inputs, num_heads=heads, window=5, **options)
        expected = reference.banded_attention(*_wide(inputs), num_heads=heads, window=5, scale=scale)
        # The rounding error of a score grows with the score, whose standard deviation is scale·√D.
        spread = max(1.0, 4.0 * (scale or size**-0.5) * size**0.5)
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE["float32"] * spread)


def test_a_window_beyond_the_sequence_and_blocks_beyond_one() -> None:
    for seqlen, window in ((5, 1000), (300, 1000), (300, 140), (513, 256)):
        inputs = _banded(seqlen)
        actual = _run("BandedAttention", inputs, num_heads=2, window=window)
        expected = reference.banded_attention(*_wide(inputs), num_heads=2, window=window)
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE["float32"])


@fast_if(lambda opset: opset == 17)
@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize(("seqlen", "dilation", "causal"), [(300, 2, 0), (700, 3, 1), (270, 1, 1), (9, 40, 0)])
def test_many_blocks_of_many_subsequences_heads_and_rows(seqlen: int, dilation: int, causal: int, opset: int) -> None:
    inputs = _banded(seqlen, heads=3, batch=3, slots=5)
    options = {"num_heads": 3, "window": 10, "dilation": dilation, "causal": causal}
    actual = _run("BandedAttention", inputs, opset, **options)
    np.testing.assert_allclose(actual, reference.banded_attention(*_wide(inputs), **options), atol=TOLERANCE["float32"])


def test_masked_keys_of_any_finite_value_do_not_leak() -> None:
    inputs = _banded(50)
    clean = _run("BandedAttention", inputs, num_heads=2, window=4)
    masked = (inputs["mask"] == 0)[:, :, None]
    for name in ("q", "k", "v"):
        inputs[name] = np.where(masked, np.float32(1e4), inputs[name])
    np.testing.assert_array_equal(_run("BandedAttention", inputs, num_heads=2, window=4), clean)


def test_a_masked_row_is_zero_and_all_global_rows_are_given() -> None:
    inputs = _banded(12, batch=2, slots=12)
    inputs["mask"][0] = 0
    inputs["index"][0] = -1
    inputs["mask"][1] = 1
    inputs["index"][1] = np.random.default_rng(1).permutation(12)
    actual = _run("BandedAttention", inputs, num_heads=2, window=4)
    assert not actual[0].any()
    np.testing.assert_array_equal(actual[1][inputs["index"][1]], inputs["rows"][1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bodies_run_in_half_precision(dtype: str) -> None:
    numpy_dtype = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    inputs = _banded(40, 2, 32, dtype=numpy_dtype)
    # The reference evaluator does not fill in defaults, so all attributes are set.
    options = {"num_heads": 2, "window": 5, "dilation": 1, "causal": 0, "scale": 32**-0.5}
    actual = _run("BandedAttention", inputs, **options).astype(np.float64)
    expected = reference.banded_attention(*_wide(inputs), num_heads=2, window=5)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE[dtype])
    inputs = _banded(300, 2, 8, dtype=numpy_dtype)  # several blocks
    options |= {"scale": 8**-0.5, "causal": 1}
    actual = _run("BandedAttention", inputs, **options).astype(np.float64)
    expected = reference.banded_attention(*_wide(inputs), num_heads=2, window=5, causal=1)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE[dtype])
    glob = _global(20, 3, dtype=numpy_dtype)
    actual = _run("GlobalAttention", glob, num_heads=2, scale=8**-0.5).astype(np.float64)
    np.testing.assert_allclose(actual, reference.global_attention(*_wide(glob), num_heads=2), atol=TOLERANCE[dtype])


def _global(seqlen: int, slots: int, size: int = 8, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng([seqlen, slots, size])
    mask = (random.random((2, seqlen)) > 0.3).astype(np.int32)
    mask[:, 0] = 1
    return {
        "q": random.standard_normal((2, slots, 2 * size)).astype(dtype),
        "k": random.standard_normal((2, seqlen, 2 * size)).astype(dtype),
        "v": random.standard_normal((2, seqlen, 2 * size)).astype(dtype),
        "mask": mask,
    }


@pytest.mark.parametrize("seqlen", [1, 2, 15, 100])
@pytest.mark.parametrize("slots", [1, 5])
def test_global_attention_is_the_reference(seqlen: int, slots: int) -> None:
    inputs = _global(seqlen, slots)
    for scale in (None, 0.1):
        options = {} if scale is None else {"scale": scale}
        actual = _run("GlobalAttention", inputs, num_heads=2, **options)
        expected = reference.global_attention(*_wide(inputs), num_heads=2, scale=scale)
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE["float32"])


def test_global_attention_over_a_row_without_real_keys_is_zero() -> None:
    inputs = _global(9, 2)
    inputs["mask"][1] = 0
    actual = _run("GlobalAttention", inputs, num_heads=2)
    assert not actual[1].any()
    assert actual[0].any()


@fast_if(lambda opset: opset in (21, 23))
@pytest.mark.parametrize("opset", range(17, 24))
def test_bodies_give_the_same_outputs_in_every_opset(opset: int) -> None:
    inputs = _banded(37)
    model = _model("BandedAttention", inputs, opset, num_heads=2, window=4, dilation=2)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    actual = _run("BandedAttention", inputs, opset, num_heads=2, window=4, dilation=2)
    np.testing.assert_array_equal(actual, _run("BandedAttention", inputs, 17, num_heads=2, window=4, dilation=2))


def test_bodies_hold_no_loop_scan_or_scatter_of_data() -> None:
    for body in functions.OPS:
        op_types = {node.op_type for node in body.to_function_proto().node}
        assert not op_types & {"Loop", "Scan", "If", "ScatterND"}


def _rows(slots: int, size: int = 8, heads: int = 2, seqlen: int = 30) -> dict[str, np.ndarray]:
    random = np.random.default_rng([slots, size])
    hidden = heads * size
    mask = np.ones((2, seqlen), dtype=np.int32)
    mask[1, 20:] = 0
    arrays = {"q": (2, slots, hidden), "x": (2, seqlen, hidden), "mask": mask}
    arrays |= {"wk": (hidden, hidden), "bk": (hidden,), "wv": (hidden, hidden), "bv": (hidden,)}
    return {
        name: shape if isinstance(shape, np.ndarray) else random.standard_normal(shape).astype(np.float32) * 0.4
        for name, shape in arrays.items()
    }


@fast_if(lambda slots: slots in (1, 8, 40))
@pytest.mark.parametrize("slots", [1, 5, 7, 8, 9, 40])
def test_folded_and_projected_global_rows_are_the_same_numbers(slots: int) -> None:
    inputs = _rows(slots)
    bodies = (*functions.OPS, *functions.HELPERS)
    options = {"num_heads": 2, "scale": 8**-0.5}
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    expected = reference.global_attention(
        wide["q"],
        wide["x"] @ wide["wk"].T + wide["bk"],
        wide["x"] @ wide["wv"].T + wide["bv"],
        inputs["mask"],
        num_heads=2,
    )
    forms = {
        name: _run(name, inputs, bodies=bodies, **options) for name in ("FoldedGlobalContext", "ProjectedGlobalContext")
    }
    for name, actual in forms.items():
        np.testing.assert_allclose(actual, expected, atol=3e-6, err_msg=name)  # chosen, as TOLERANCE
    # GlobalContext takes the folded form if there are fewer slots than the head size, 8.
    selected = forms["FoldedGlobalContext" if slots < 8 else "ProjectedGlobalContext"]
    actual = _run("GlobalContext", inputs, bodies=bodies, **options)
    np.testing.assert_array_equal(actual, selected)
