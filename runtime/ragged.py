"""Runs sequences of different lengths in batches, and slices the outputs to each sequence's own length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from lfx.errors import ArtifactError, InputError, LfxError
from lfx.runtime.batching import batches
from lfx.runtime.inputs import Feeds, seqlen_of, stack
from lfx.signature import Signature

Row = dict[str, NDArray[Any]]  # outputs of one sequence, without the batch axis


def run_rows(
    sequences: Sequence[Feeds | LfxError],
    infer: Callable[[Feeds], Row],
    signature: Signature,
    token_budget: int,
    supports_shape: Callable[[int, int], bool],
    *,
    keep_errors: bool,
) -> list[Row | LfxError]:
    """Run prepared sequences in batches of similar lengths; in batches of equal lengths if the model may not be padded.

    Args:
        sequences: prepared sequences; an error among them is returned at its index.
        infer: runs one batch: input name -> array, to output name -> array, both with the batch axis first.
        token_budget: largest number of tokens of a batch, padding included.
        supports_shape: see `lfx.runtime.batching.batches`.
        keep_errors: return the error of a batch that fails in the backend for each of its sequences; do not raise it.
    Returns:
        For each sequence: output name -> its unpadded array, without the batch axis; or its error.
    Raises:
        InputError: the sequences have different numbers of choices; or the model has an output that cannot be sliced
            and the sequences have different lengths.
        LfxError: what `infer` raises.
    """
    rows: list[Row | LfxError] = [item if isinstance(item, LfxError) else {} for item in sequences]
    valid = [(i, item) for i, item in enumerate(sequences) if not isinstance(item, LfxError)]
    if not valid:
        return rows
    lengths = [seqlen_of(feeds) for _, feeds in valid]
    # A batch cannot be split into rows of these outputs, even if all lengths are equal.
    has_unsplittable = signature.output_attentions or any(spec.shape[:1] != ("batch",) for spec in signature.outputs)
    if len(set(lengths)) > 1 or has_unsplittable:
        check_cuttable(signature)
    choices = valid[0][1]["input_ids"].size // lengths[0]  # 1 except for multiple choice
    for group in batches(lengths, max(token_budget // choices, 1), supports_shape, pad=signature.may_pad):
        feeds = stack([valid[i][1] for i in group], signature.pad_token_id)
        try:
            results = list(_cut_rows(infer(feeds), [lengths[i] for i in group], signature))
        except ArtifactError:
            raise
        except LfxError as error:
            if not keep_errors:
                raise
            results = [error] * len(group)
        for i, result in zip(group, results, strict=True):
            rows[valid[i][0]] = result
    return rows


def _cut_rows(outputs: Row, lengths: Sequence[int], signature: Signature) -> Iterator[Any]:
    """Split the outputs of a batch into those of its sequences."""
    for i, length in enumerate(lengths):
        yield {spec.name: cut(outputs[spec.name][i], spec.shape, length) for spec in signature.outputs}


def cut(row: NDArray[Any], axes: tuple[int | str, ...], length: int) -> NDArray[Any]:
    """Copy one sequence's row of an output, sliced to `length` on its sequence axes.

    Args:
        axes: the output's axes, batch first.
    """
    return row[tuple(slice(length) if axis == "sequence" else slice(None) for axis in axes[1:])].copy()


def check_cuttable(signature: Signature) -> None:
    """Raise InputError for an output that `cut` cannot slice: batch is not its first axis, or an axis is unknown."""
    if signature.output_attentions:
        raise InputError(
            "the width of this model's attention outputs depends on the whole batch; give Engine.run one sequence or "
            "an array (batch, seqlen), or use a bundle exported without --output-attentions"
        )
    for spec in signature.outputs:
        unknown = [axis for axis in spec.shape[1:] if isinstance(axis, str) and axis not in ("sequence", "choices")]
        if not spec.shape or spec.shape[0] != "batch" or unknown:
            raise InputError(
                f"output {spec.name} ({', '.join(map(str, spec.shape))}) cannot be cut to each sequence's length; "
                "run the sequences one by one"
            )
