"""What export and runtime agree on: tasks, and the signature of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lfx.checks import COUNT, LARGEST, check_shape
from lfx.errors import ArtifactError

PRECISIONS = ("fp32", "fp16", "bf16")
QUANTIZED = "int8"  # what `lfx quantize` makes of an fp32 bundle
OPSETS = (17, 23)
GLOBAL_MODES = ("mask", "first", "none")
# How the exporter ends the names of two kinds of node; see `export.graph` and `runtime.build.prepare_graph`.
GLOBAL_SLOTS, GLOBAL_ROWS = "#global_slots", "#global_rows"
GRAPH_INPUTS = ("input_ids", "attention_mask", "global_attention_mask")
_TENSORS = [{"name": str, "dtype": str, "shape": [(int, str)]}]
# What the JSON of a signature holds; see `lfx.checks.check_shape`.
_SIGNATURE: dict[str, Any] = {
    "architecture": str,
    "task": str,
    "precision": str,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "attention_windows": [int],
    "default_global?": str,
    "global_attention?": str,
    "max_seqlen?": COUNT,
    "vocab_size?": COUNT,
    "max_global?": COUNT,
    "pad_token_id?": int,
    "sep_token_id?": COUNT,
    "ignores_padding?": bool,
    "lfx_version?": str,
}


@dataclass(frozen=True)
class Task:
    """One task of Hugging Face's.

    Attributes:
        auto_class: the transformers class that loads it.
        architecture: the class name that a checkpoint's config carries.
        default_global: which tokens attend globally when the caller gives no mask, as Hugging Face decides it:
            "none", "first" (the first token), "question" (before the first separator) or "after_question"
            (behind the second separator).
    """

    auto_class: str
    architecture: str
    default_global: str


TASKS: dict[str, Task] = {
    "feature-extraction": Task("AutoModel", "LongformerModel", "none"),
    "fill-mask": Task("AutoModelForMaskedLM", "LongformerForMaskedLM", "none"),
    "text-classification": Task("AutoModelForSequenceClassification", "LongformerForSequenceClassification", "first"),
    "token-classification": Task("AutoModelForTokenClassification", "LongformerForTokenClassification", "none"),
    "question-answering": Task("AutoModelForQuestionAnswering", "LongformerForQuestionAnswering", "question"),
    "multiple-choice": Task("AutoModelForMultipleChoice", "LongformerForMultipleChoice", "after_question"),
}


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ONNX name, numpy dtype name, and axes as sizes or names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """What a runtime must know of a model to feed it; stored in the bundle and in the ONNX file itself.

    Attributes:
        max_seqlen: longest sequence in tokens; None = no limit.
        vocab_size: ids are 0 to vocab_size - 1; None = not checked.
        max_global: most global tokens a row may have; None = no limit.
        default_global: what happens when the caller gives no global_attention_mask: see `Task`, or "required": it is
            an error, since the model follows a rule of its own that lfx does not know.
        attention_windows: one-sided window of each layer, tokens.
        ignores_padding: whether padding behind a sequence leaves its outputs what they are. Where it does not, only
            sequences of one length run together.
    """

    architecture: str
    task: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attention_windows: tuple[int, ...]
    default_global: str = "none"
    global_attention: str = "mask"
    max_seqlen: int | None = None
    vocab_size: int | None = None
    max_global: int | None = None
    pad_token_id: int = 1
    sep_token_id: int | None = None
    ignores_padding: bool = True
    lfx_version: str = ""

    @property
    def may_pad(self) -> bool:
        """Whether sequences of different lengths may be padded into one batch: masked, and without being looked at."""
        return self.ignores_padding and any(spec.name == "attention_mask" for spec in self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Signature:
        """Raises: ArtifactError: a field is missing, of another type or out of range."""
        try:
            check_shape(data, _SIGNATURE, "the model's signature")
        except ValueError as error:
            raise ArtifactError(f"{error}; export the model again") from error
        names = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in names}
        for key in ("inputs", "outputs"):
            values[key] = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in values[key])
        values["attention_windows"] = tuple(values["attention_windows"])
        signature = cls(**values)
        signature._check_choices()
        signature._check_ranges()
        return signature

    def _check_choices(self) -> None:
        for name, allowed in (
            ("task", TASKS),
            ("precision", (*PRECISIONS, QUANTIZED)),
            ("global_attention", GLOBAL_MODES),
            ("default_global", {"required", *(task.default_global for task in TASKS.values())}),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ArtifactError(f"{name} {value!r} is not one that this lfx knows; export the model again")

    def _check_ranges(self) -> None:
        ids = self.vocab_size if self.vocab_size is not None else LARGEST
        for name, value, low, high in (
            *(("attention_windows", window, 1, LARGEST) for window in self.attention_windows),
            ("max_seqlen", self.max_seqlen, 1, LARGEST),
            ("vocab_size", self.vocab_size, 1, LARGEST),
            ("max_global", self.max_global, 1, LARGEST),
            ("pad_token_id", self.pad_token_id, 0, ids - 1),
            ("sep_token_id", self.sep_token_id, -LARGEST, LARGEST),
        ):
            if value is not None and not low <= value <= high:
                raise ArtifactError(f"{name} {value} is out of range, {low} to {high}; export the model again")
        for group in (self.inputs, self.outputs):
            if not group or len({spec.name for spec in group}) < len(group):
                raise ArtifactError("the model's inputs or outputs are none, or named twice; export the model again")


def is_multi_label(signature: Signature, problem_type: Any) -> bool:
    """Whether each class of a head is a decision of its own; `problem_type` of the checkpoint's config."""
    return signature.task == "text-classification" and problem_type == "multi_label_classification"
