"""The batches of `Engine.warm_up`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lfx.checks import LARGEST, shown, whole_number
from lfx.errors import InputError
from lfx.runtime.inputs import Feeds, prepare, stack
from lfx.signature import Signature

UNLIMITED_SEQLEN = 4096  # length of the longest default batch of a model without a limit


def warm_up_shapes(
    shapes: Any, signature: Signature, supports_shape: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    """Check the shapes that a caller gives, or choose those of the default; see `Engine.warm_up`.

    Args:
        supports_shape: whether the model takes a shape; a plan may have been built for other lengths.
    Raises:
        InputError: `shapes` is no list of pairs, or a shape is out of range.
    """
    if shapes is None:
        default = ((1, 1), (1, signature.max_seqlen or UNLIMITED_SEQLEN))
        return [shape for shape in default if supports_shape(*shape)]
    longest = LARGEST if signature.max_seqlen is None else signature.max_seqlen
    checked = []
    try:
        for batch, seqlen in shapes:
            checked.append((whole_number(batch, "batch", 1), whole_number(seqlen, "seqlen", 1, longest)))
    except (TypeError, ValueError) as error:
        raise InputError(f"shapes is {shown(shapes)}; give a list of pairs (batch, seqlen)") from error
    return checked


def padding_batch(batch: int, seqlen: int, signature: Signature) -> Feeds:
    """The inputs of a batch of padding ids without global tokens.

    Raises:
        InputError: the batch does not fit in memory.
    """
    shape = (batch, 2, seqlen) if signature.has_choices else (batch, seqlen)
    try:
        ids = np.full(shape, signature.pad_token_id, dtype=np.int64)
    except (MemoryError, ValueError) as error:
        raise InputError(f"a batch of {batch} sequences of {seqlen} tokens does not fit in memory") from error
    has_global_mask = any(spec.name == "global_attention_mask" for spec in signature.inputs)
    sequences = prepare(ids, None, np.zeros_like(ids) if has_global_mask else None, signature)
    return stack(sequences, signature.pad_token_id)
