"""`Tokens`: which tokens are real and which are global, computed once for all layers of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lfx.errors import InputError
from lfx.torch.ops import at_most


class Tokens(NamedTuple):
    """Which tokens are real and which are global.

    Attributes:
        key_mask: (B, S) int32, 1 = real token.
        global_index: (B, G) int32, positions of the global tokens in order, unused slots -1.
        has_globals: False if no slot is used.
    """

    key_mask: torch.Tensor
    global_index: torch.Tensor
    has_globals: bool


def tokens_of(real: torch.Tensor, is_global: torch.Tensor | None, max_global: int | None) -> Tokens:
    """Make the Tokens of a batch.

    Args:
        real: (B, S) bool.
        is_global: (B, S) bool; None = no token is global.
        max_global: number of slots. None = the largest count in the batch, which is read from the device.
    Raises:
        InputError: a row on the CPU has more global tokens than `max_global`; on a GPU the error is an assertion there.
    """
    key_mask = real.to(torch.int32)
    batch, seqlen = real.shape
    slots = max_global
    if is_global is None:
        slots = 0
    elif slots is None:
        slots = int(is_global.sum(dim=1).max().item())
        if _is_traced():  # the trace keeps this number
            max_global = slots
    if not slots or is_global is None:
        if max_global == 0 and is_global is not None:
            key_mask = key_mask.masked_fill(_checked(is_global, 0), 0)  # which is none: compilers keep the check
        return Tokens(key_mask, key_mask.new_full((batch, 1), -1), False)
    if max_global is not None:
        is_global = _checked(is_global, max_global)
    position = torch.arange(seqlen, device=real.device).expand(batch, -1).masked_fill(~is_global, seqlen)
    if max_global is not None:  # topk takes no k above the length
        position = torch.cat([position, position.new_full((batch, slots), seqlen)], dim=1)
    first = position.topk(slots, dim=1, largest=False, sorted=True).values  # (B, G)
    return Tokens(key_mask, first.masked_fill(first == seqlen, -1).to(torch.int32), True)


def _checked(is_global: torch.Tensor, most: int) -> torch.Tensor:
    """`is_global`, if no row has more than `most` global tokens; on a GPU checked without waiting for it."""
    if torch.compiler.is_compiling() or _is_traced() or is_global.is_cuda or is_global.is_meta:
        checked: torch.Tensor = at_most(is_global, most)
        return checked
    if not (is_global.sum(dim=1) <= most).all():
        raise InputError(f"a row has more than max_global={most} global tokens; accelerate with a larger max_global")
    return is_global


def _is_traced() -> bool:
    """Whether torch.jit.trace records the call: of what Python decides it keeps the result alone."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
