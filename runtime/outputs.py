"""`OutputRequest`: which outputs a run returns, in which dtype and on which device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfx.checks import flag, is_iterable, one_of, shown
from lfx.errors import ArtifactError, InputError
from lfx.signature import Signature

OUTPUT_DTYPES = ("float32", "float16")
# Limit of the bytes of outputs per token that are kept at a time, of the windows of documents and of a server's texts.
OUTPUT_BYTES = 1 << 30


@dataclass(frozen=True)
class OutputRequest:
    """Which outputs a run returns, in which dtype and on which device.

    Attributes:
        signature: the model's, with the requested outputs only, in the order requested.
        names: the requested outputs; None = all.
        dtype: of floating-point outputs; None = the model's own.
        on_device: whether the outputs stay on the device that computes them.
    """

    signature: Signature
    names: tuple[str, ...] | None = None
    dtype: str | None = None
    on_device: bool = False

    def convert(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Convert floating-point arrays to the requested dtype; a number that float16 cannot hold becomes infinite."""
        if self.dtype is None:
            return dict(outputs)
        with np.errstate(over="ignore"):
            return {
                name: array.astype(self.dtype, copy=False) if array.dtype.kind == "f" else array
                for name, array in outputs.items()
            }


def request_outputs(
    signature: Signature, outputs: Any = None, output_dtype: Any = None, device_outputs: Any = False
) -> OutputRequest:
    """Check which outputs a caller wants; see `lfx.runtime.Engine.run` for the arguments.

    Raises:
        InputError: an output is not known, there is none, or an argument has another type.
    """
    names = None if outputs is None else output_names(signature, outputs)
    dtype = None if output_dtype is None else _dtype_name(output_dtype)
    if flag(device_outputs, "device_outputs") and dtype is not None:
        raise InputError("output_dtype converts on the host; leave it out, and convert the device arrays yourself")
    selected = signature if names is None else signature.with_outputs(names)
    return OutputRequest(selected, names, dtype, device_outputs)


def output_names(signature: Signature, outputs: Any) -> tuple[str, ...]:
    """Check a list of names of outputs; a name that is given twice counts once.

    Raises:
        InputError: it is no list of names, is empty, or has a name that the model does not have.
    """
    if isinstance(outputs, str) or not is_iterable(outputs):
        raise InputError(f"outputs is {shown(outputs)}; give a list of names, such as outputs=['pooler_output']")
    known = [spec.name for spec in signature.outputs]
    names: dict[str, None] = {}
    for name in outputs:
        if not isinstance(name, str) or name not in known:
            raise InputError(f"the model has no output {shown(name)}; its outputs are {', '.join(known)}")
        names[name] = None
    if not names:
        raise InputError(f"outputs is an empty list; give at least one of {', '.join(known)}")
    return tuple(names)


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype that is given as a string or a numpy type."""
    try:
        name = np.dtype(dtype).name
    except Exception:
        name = dtype
    return str(one_of(name, "output_dtype", OUTPUT_DTYPES, InputError))


def output_bytes(signature: Signature, seqlen: int, sequences: int = 1) -> int:
    """Bytes of the outputs with a sequence axis of one input: 200 kB per token for fill-mask with 50,265 tokens.

    Args:
        seqlen: number of tokens of the sequence, or of each choice.
        sequences: number of choices.
    """
    shapes = [spec.shape for spec in signature.outputs if "sequence" in spec.shape]
    whole = [math.prod(size for size in shape if isinstance(size, int)) for shape in shapes]
    return sum(
        4 * size * sequences * seqlen ** shape.count("sequence") for size, shape in zip(whole, shapes, strict=True)
    )


def check_outputs(outputs: Mapping[str, Any], signature: Signature, batch: int) -> None:
    """Raise ArtifactError for an output of a batch that has another form than the signature says."""
    for spec in signature.outputs:
        shape = getattr(outputs[spec.name], "shape", None)  # of an array, or of an output on a device
        if (
            not isinstance(shape, tuple)
            or len(shape) != len(spec.shape)
            or (spec.shape[:1] == ("batch",) and shape[0] != batch)
        ):
            shape = f"shape {shape}" if isinstance(shape, tuple) else type(outputs[spec.name]).__name__
            raise ArtifactError(
                f"output {spec.name} of a batch of {batch} has {shape} where the model's signature says "
                f"({', '.join(map(str, spec.shape))}); export the model again"
            )
