"""Random attention problems, their results by the dense definition, and calls of the C interface with them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lfx import reference
from lfx.parity import Case, inputs_of
from scripts.bench.launch import INPUTS, banded_params, global_params
from tests.plugins.tensors import Guarded, Tensors

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass
class Banded:
    """A call of BandedAttention: inputs, rounded to the dtype, attributes, and the layout of rows in memory."""

    inputs: dict[str, NDArray[Any]]
    num_heads: int
    window: int
    dilation: int = 1
    causal: int = 0
    precision: str = "fp32"
    layout: str = ""

    @property
    def attributes(self) -> dict[str, int]:
        """The op's attributes, in the order of the plugin's."""
        return {name: getattr(self, name) for name in ("num_heads", "window", "dilation", "causal")}

    def dense(self) -> NDArray[np.float64]:
        """Returns the context by the dense definition."""
        arrays = {name: np.asarray(array, np.float64) for name, array in self.inputs.items()}
        return reference.banded_attention(**arrays, **{**self.attributes, "causal": bool(self.causal)})

    def run(self, function: Callable[..., Any], *rest: Any) -> NDArray[np.float64]:
        """Returns the context by a function of the C interface; the output starts as NaN."""
        return self.outputs(function, *rest)[0]

    def outputs(
        self, function: Callable[..., Any], *rest: Any
    ) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
        """Returns the context, and in a layout the log-sum-exp (B, H, S)."""
        tensors = Tensors(self.inputs, self.num_heads, DTYPES[self.precision], self.layout)
        params = banded_params(self.inputs, tensors.addresses, self.precision, **self.attributes)
        tensors.set_strides(params)
        assert not function(ctypes.byref(params), *rest)
        return tensors.outputs()

    def tolerance(self) -> float:
        """The largest error that rounding explains; see `rounding`."""
        longest = self.inputs["query"].shape[1] + self.inputs["global_index"].shape[1]
        return rounding(self.inputs, self.num_heads, longest, self.precision)


def rounding(inputs: dict[str, NDArray[Any]], num_heads: int, keys: int, precision: str) -> float:
    """The largest error that rounding explains in the kernels' arithmetic.

    Scores, exponentials and sums are float32: a score of D products is off by √D·u·Σ|q·k|·scale (Higham & Mary 2019),
    which moves a weight by that share, and sums of `keys` weights, in numerator and denominator, by √keys·u each. In
    float16 and bfloat16 every weight is rounded once (a share u of each, so at most u·max|v| of the sum), and the
    result is.
    """
    query, key, value = (np.abs(np.asarray(inputs[name], np.float64)) for name in ("query", "key", "value"))
    size = query.shape[2] // num_heads
    by_head = [array.reshape(*array.shape[:2], num_heads, size) for array in (query, key)]
    largest = np.einsum("bqhd,bkhd->bhqk", *by_head).max() * size**-0.5
    in_float32 = (2 * size**0.5 * largest + 2 * keys**0.5 + 2) * UNIT_ROUNDOFF["fp32"]
    stored = 0.0 if precision == "fp32" else 2 * UNIT_ROUNDOFF[precision]
    return float((in_float32 + stored) * value.max())


def rounding_of_sums(inputs: dict[str, NDArray[Any]], num_heads: int, keys: int) -> float:
    """The largest error of a log-sum-exp that rounding explains.

    A share by which the sum is off is an error of its logarithm, which is float32 in all types. log2 of a sum of `keys`
    weights up to 2^8 is off by a share of 2^-22.
    """
    ones = {**inputs, "value": np.ones(1)[None, None]}
    return rounding(ones, num_heads, keys, "fp32") + 2.0**-22 * (8 + np.log2(keys))


def masks(case: Case) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """key_mask and global_index of a case of the parity suite; unused slots are among the used ones."""
    arrays = inputs_of(case, vocab_size=9, pad_token_id=1)
    flags = arrays["global_attention_mask"] > 0
    slots = max(int(flags.sum(axis=1).max()), 1) + 1
    index = np.full((case.batch, slots), -1, np.int32)
    random = np.random.default_rng(case.seqlen)
    for row, marks in enumerate(flags):
        positions = np.flatnonzero(marks)
        index[row, random.permutation(slots)[: len(positions)]] = positions
    return (arrays["attention_mask"] > 0).astype(np.int32), index


def banded(
    case: Case, num_heads: int, head_size: int, window: int, *, precision: str = "fp32", **attributes: int
) -> Banded:
    """A random problem with the masks of a case."""
    random = np.random.default_rng([case.seqlen, case.batch, window, head_size])
    key_mask, index = masks(case)
    shape = (case.batch, case.seqlen, num_heads * head_size)

    def draw(*sizes: int) -> NDArray[Any]:
        return random.standard_normal(sizes).astype(DTYPES[precision])

    inputs = {
        "query": draw(*shape),
        "key": draw(*shape),
        "value": draw(*shape),
        "key_mask": key_mask,
        "global_index": index,
        "global_context": draw(case.batch, index.shape[1], shape[2]),
    }
    return Banded(inputs, num_heads, window, precision=precision, **attributes)


@dataclass
class Global:
    """A call of GlobalAttention."""

    inputs: dict[str, NDArray[Any]]
    num_heads: int
    precision: str = "fp32"
    layout: str = ""

    @property
    def attributes(self) -> dict[str, int]:
        """The op's attributes."""
        return {"num_heads": self.num_heads}

    def dense(self) -> NDArray[np.float64]:
        """Returns the context by the dense definition."""
        arrays = {name: np.asarray(array, np.float64) for name, array in self.inputs.items()}
        return reference.global_attention(**arrays, num_heads=self.num_heads)

    def run(
        self, function: Callable[..., Any], workspace: Callable[..., int] | None = None, share_values: bool = False
    ) -> NDArray[np.float64]:
        """Returns the context by a function of the C interface; output and workspace start as NaN."""
        return self.outputs(function, workspace, share_values)[0]

    def outputs(
        self, function: Callable[..., Any], workspace: Callable[..., int] | None = None, share_values: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
        """Returns the context, and in a layout the log-sum-exp (B, H, G)."""
        tensors = Tensors(self.inputs, self.num_heads, DTYPES[self.precision], self.layout)
        if share_values:
            tensors.addresses["value"] = tensors.addresses["key"]
            tensors.strides["value_stride"] = tensors.strides["key_stride"]
        batch, queries, width = self.inputs["query"].shape
        sizes = (batch, queries, self.num_heads, width // self.num_heads)
        scratch = Guarded(np.full(workspace(*sizes) // 4 if workspace is not None else 0, np.nan, np.float32))
        addresses = tensors.addresses | {"workspace": scratch.address}
        params = global_params(self.inputs, addresses, self.precision, self.num_heads)
        tensors.set_strides(params)
        assert not (function(ctypes.byref(params), None) if workspace is not None else function(ctypes.byref(params)))
        return tensors.outputs()

    def tolerance(self) -> float:
        """The largest error that rounding explains."""
        return rounding(self.inputs, self.num_heads, self.inputs["key"].shape[1], self.precision)


def global_(case: Case, queries: int, num_heads: int, head_size: int, *, precision: str = "fp32") -> Global:
    """A random problem with the key mask of a case."""
    random = np.random.default_rng([case.seqlen, case.batch, queries, head_size])
    key_mask, _ = masks(case)

    def draw(rows: int) -> NDArray[Any]:
        return random.standard_normal((case.batch, rows, num_heads * head_size)).astype(DTYPES[precision])

    inputs = {"query": draw(queries), "key": draw(case.seqlen), "value": draw(case.seqlen), "key_mask": key_mask}
    return Global(inputs, num_heads, precision)


def enqueue_through_creator(
    helper: ctypes.CDLL,
    library: str,
    problem: Banded | Global,
    addresses: dict[str, int],
    context: int,
    workspace: tuple[int, int],
    stream: int | None,
) -> int:
    """Run the plugin as TensorRT does; see tests/plugins/enqueue.cpp.

    Args:
        addresses: addresses of the inputs; context: address of the output; workspace: its address and bytes.
    Returns:
        0, or the step that failed.
    """
    op = "BandedAttention" if isinstance(problem, Banded) else "GlobalAttention"
    attributes = problem.attributes.values()
    names = [name for name in INPUTS if name in problem.inputs]
    dims: list[int] = []
    for name in (*names, "query"):  # the context has the shape of the query
        shape = problem.inputs[name].shape
        dims += [len(shape), *shape, *([0] * (3 - len(shape)))]
    return int(
        helper.enqueueThroughCreator(
            library.encode(),
            op.encode(),
            (ctypes.c_int32 * len(attributes))(*attributes),
            ctypes.c_float(0.0),
            {"fp32": 0, "fp16": 1, "bf16": 7}[problem.precision],  # nvinfer1::DataType
            len(names),
            (ctypes.c_int32 * len(dims))(*dims),
            (ctypes.c_void_p * len(names))(*(addresses[name] for name in names)),
            ctypes.c_void_p(context),
            ctypes.c_void_p(workspace[0]),
            ctypes.c_size_t(workspace[1]),
            ctypes.c_void_p(stream),
        )
    )
