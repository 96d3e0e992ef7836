"""Tasks, and the signature of a model: its inputs, outputs and limits, shared by export and runtime."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any

from lfx.checks import COUNT, LARGEST, check_shape
from lfx.errors import ArtifactError

PRECISIONS = ("fp32", "fp16", "bf16")
QUANTIZED = "int8"  # precision of a bundle that `lfx quantize` made from an fp32 bundle
OPSETS = (17, 23)
GLOBAL_MODES = ("mask", "first", "none")
SENTENCE_EMBEDDING = "sentence-embedding"  # the task, whose output is sentence_embedding
TEXT_GENERATION = "text2text-generation"  # the task of an encoder and a decoder, which write texts
POOLINGS = ("mean", "cls", "max", "weightedmean", "mean_sqrt_len_tokens", "lasttoken")  # names of sentence-transformers
# Suffixes by which `runtime.build.prepare_graph` finds three types of nodes that `export.graph` wrote.
GLOBAL_SLOTS, GLOBAL_ROWS, IN_FLOAT32 = "#global_slots", "#global_rows", "#float32"
# Names of the attention outputs, without the dot and the layer's index after them. They are Hugging Face's.
ATTENTIONS, GLOBAL_ATTENTIONS = "attentions", "global_attentions"
GRAPH_INPUTS = ("input_ids", "attention_mask", "global_attention_mask")
# Prefixes of the names of cached keys and values: the decoder's inputs, and the outputs of both graphs.
PAST, PRESENT = "past_key_values", "present"
# The input of a decoder that makes the encoder's keys and values itself, in the layout hf.
HIDDEN_STATES = "encoder_hidden_states"
CACHED = "cached"  # the axis of the encoder's cached tokens in that decoder's inputs
# Names of outputs with the number of a layer in them.
_LAYER = re.compile(rf"({ATTENTIONS}|{GLOBAL_ATTENTIONS}|{PRESENT}|{PAST})\.(\d+)((?:\.\w+)*)")
_TENSORS = [{"name": str, "dtype": str, "shape": [(int, str)]}]
# The fields of a signature in JSON; see `lfx.checks.check_shape`.
_SIGNATURE: dict[str, Any] = {
    "architecture": str,
    "task": str,
    "precision": str,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "attention_windows": [int],
    "causal?": bool,
    "default_global?": str,
    "global_attention?": str,
    "max_seqlen?": COUNT,
    "vocab_size?": COUNT,
    "max_global?": COUNT,
    "pad_token_id?": int,
    "sep_token_id?": COUNT,
    "ignores_padding?": bool,
    "adds_globals?": bool,
    "weight_bits?": COUNT,
    "output_attentions?": bool,
    "lfx_version?": str,
    "decoder?": (dict, NoneType),
}
_DECODER: dict[str, Any] = {
    "model_file": str,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "max_tokens": int,
    "decoder_start_token_id": int,
}


@dataclass(frozen=True)
class Task:
    """One of Hugging Face's tasks, or the sentence embeddings of sentence-transformers.

    Attributes:
        auto_class: the transformers class that loads a model of this task, for sentence embeddings its encoder.
        architecture: the class name in a checkpoint's config; for sentence embeddings a class of `lfx.export.pooling`.
        default_global: the tokens that attend globally when the caller gives no global_attention_mask, by Hugging
            Face's rule: "none", "first" (the first token), "question" (tokens before the first separator) or
            "after_question" (tokens after the second separator).
        needs_pair: whether every input is a pair of texts.
        has_choices: whether the inputs have an axis of choices: (batch, choices, seqlen).
    """

    auto_class: str
    architecture: str
    default_global: str
    needs_pair: bool = False
    has_choices: bool = False


TASKS: dict[str, Task] = {
    "feature-extraction": Task("AutoModel", "LongformerModel", "none"),
    "fill-mask": Task("AutoModelForMaskedLM", "LongformerForMaskedLM", "none"),
    "text-classification": Task("AutoModelForSequenceClassification", "LongformerForSequenceClassification", "first"),
    "token-classification": Task("AutoModelForTokenClassification", "LongformerForTokenClassification", "none"),
    "question-answering": Task(
        "AutoModelForQuestionAnswering", "LongformerForQuestionAnswering", "question", needs_pair=True
    ),
    "multiple-choice": Task(
        "AutoModelForMultipleChoice", "LongformerForMultipleChoice", "after_question", needs_pair=True, has_choices=True
    ),
    SENTENCE_EMBEDDING: Task("AutoModel", "LongformerForSentenceEmbedding", "none"),
    TEXT_GENERATION: Task("AutoModelForSeq2SeqLM", "LEDForConditionalGeneration", "first"),
}


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: its ONNX name, the name of its numpy dtype, and each axis as a size or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Decoder:
    """The decoder's graph of a model that writes texts.

    `present.N.encoder.key` and `.value` of the encoder's graph are its inputs `past_key_values.N.encoder.key` and
    `.value`; its own outputs `present.N.decoder.key` and `.value` are the inputs of the next step. In the layout hf the
    decoder has the input `encoder_hidden_states`, makes the encoder's keys and values at the first step, when those
    inputs have no tokens, and has them as outputs.

    Attributes:
        model_file: path of the ONNX file in the bundle.
        inputs, outputs: inputs and outputs of the graph, in its order. The axis `past` is the number of cached tokens,
            which is 0 at the first step; `sequence` is that of the encoder.
        max_tokens: largest number of tokens, cached ones included.
        decoder_start_token_id: id of the first token, which every text starts with.
    """

    model_file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_tokens: int
    decoder_start_token_id: int

    @classmethod
    def from_dict(cls, data: Any) -> Decoder:
        """Read it from JSON types; other keys are ignored.

        Raises:
            ValueError: a field is missing, of another type or out of range.
        """
        check_shape(data, _DECODER, "the decoder's signature")
        values = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        decoder = cls(**{**values, "inputs": _specs(data["inputs"]), "outputs": _specs(data["outputs"])})
        for name in ("max_tokens", "decoder_start_token_id"):
            low, value = int(name == "max_tokens"), getattr(decoder, name)
            if not low <= value <= LARGEST:
                raise ValueError(f"the decoder's {name} {value} is out of range, {low} to {LARGEST}")
        return decoder


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs and limits of a model; stored in the manifest and in the metadata of the ONNX file.

    Attributes:
        architecture: class name of the PyTorch model.
        task: a key of `TASKS`.
        precision: "fp32", "fp16", "bf16" or "int8".
        inputs, outputs: inputs and outputs of the graph, in its order.
        attention_windows: of each layer, the distance in tokens from a query to the farthest key of its window: the
            one-sided window times the largest dilation of its heads.
        causal: whether no window has keys after the query. Global tokens see all tokens, and are seen by all.
        default_global: global tokens when the caller gives no global_attention_mask: see `Task`, or "required": the
            caller must give the mask, since the model follows a rule that lfx does not know.
        global_attention: "mask" (an input), "first" (the first token, always) or "none".
        max_seqlen: length of the longest sequence in tokens; None = no limit.
        vocab_size: ids are 0 to vocab_size - 1; None = not checked.
        max_global: largest number of global tokens in a sequence; None = no limit.
        pad_token_id: id that fills the padding.
        sep_token_id: id of the separator; None if the model has none.
        ignores_padding: whether the outputs of a sequence do not depend on the padding after it. If False, only
            sequences of one length run together.
        adds_globals: whether the model gives global attention to tokens that global_attention_mask does not mark; for a
            model without that input, to others than the first.
        weight_bits: number of bits that the weights of an int8 model use, 7 or 8; None for other models.
        output_attentions: whether the outputs `attentions.0`, … and, unless global_attention is "none",
            `global_attentions.0`, … are the attention probabilities of each layer.
        lfx_version: version of lfx that exported the model.
        decoder: the second graph of a model that writes texts; None for other models.
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
    adds_globals: bool = False
    weight_bits: int | None = None
    output_attentions: bool = False
    causal: bool = False
    lfx_version: str = ""
    decoder: Decoder | None = None

    @property
    def may_pad(self) -> bool:
        """Whether padding may be added: the model takes an attention_mask and its outputs do not depend on padding."""
        return self.ignores_padding and any(spec.name == "attention_mask" for spec in self.inputs)

    @property
    def attention_outputs(self) -> frozenset[str]:
        """Names of the outputs that are attention probabilities."""
        prefixes = (f"{ATTENTIONS}.", f"{GLOBAL_ATTENTIONS}.") if self.output_attentions else ()
        return frozenset(spec.name for spec in self.outputs if spec.name.startswith(prefixes))

    def with_outputs(self, names: Iterable[str]) -> Signature:
        """The signature with these outputs only, in this order."""
        specs = {spec.name: spec for spec in self.outputs}
        names = tuple(names)
        attentions = not self.attention_outputs.isdisjoint(names)
        return dataclasses.replace(self, outputs=tuple(specs[name] for name in names), output_attentions=attentions)

    @property
    def has_choices(self) -> bool:
        """Whether the inputs have an axis of choices: (batch, choices, seqlen)."""
        return TASKS[self.task].has_choices

    def to_dict(self) -> dict[str, Any]:
        """The signature as JSON types."""
        fields = dataclasses.asdict(self)
        return fields if self.decoder is not None else {k: v for k, v in fields.items() if k != "decoder"}

    @classmethod
    def from_dict(cls, data: Any) -> Signature:
        """Read a signature from JSON types; other keys are ignored.

        Raises:
            ArtifactError: a field is missing, of another type or out of range.
        """
        try:
            check_shape(data, _SIGNATURE, "the model's signature")
            decoder = None if data.get("decoder") is None else Decoder.from_dict(data["decoder"])
        except ValueError as error:
            raise ArtifactError(f"{error}; export the model again") from error
        names = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in names}
        for key in ("inputs", "outputs"):
            values[key] = _specs(values[key])
        values["attention_windows"] = tuple(values["attention_windows"])
        signature = cls(**{**values, "decoder": decoder})
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
            ("weight_bits", self.weight_bits, 7, 8),
            ("sep_token_id", self.sep_token_id, -LARGEST, LARGEST),
        ):
            if value is not None and not low <= value <= high:
                raise ArtifactError(f"{name} {value} is out of range, {low} to {high}; export the model again")
        if (self.decoder is None) != (self.task != TEXT_GENERATION):
            raise ArtifactError(f"a model of task {self.task} has a decoder, or lacks one; export the model again")
        decoder = (self.decoder.inputs, self.decoder.outputs) if self.decoder is not None else ()
        for group in (self.inputs, self.outputs, *decoder):
            if not group or len({spec.name for spec in group}) < len(group):
                raise ArtifactError("the model has no inputs or no outputs, or two of one name; export the model again")


def _specs(entries: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in entries)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Group output names for display: those that differ by the number of a layer, and each other name alone.

    Returns:
        A label -> its names, such as "attentions.0 to 11" -> ["attentions.0", …, "attentions.11"], or
        "present.0 to 5.encoder.key".
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = _LAYER.fullmatch(name)
        groups.setdefault(f"{layer[1]}.N{layer[3]}" if layer else name, []).append(name)
    labels = {}
    for group in groups.values():
        first, last = _LAYER.fullmatch(group[0]), _LAYER.fullmatch(group[-1])
        one = len(group) == 1 or first is None or last is None
        labels[group[0] if one else f"{first[1]}.{first[2]} to {last[2]}{first[3]}"] = group  # type: ignore[index]
    return labels


def is_multi_label(signature: Signature, problem_type: Any) -> bool:
    """Whether a classification head scores each class with its own sigmoid; `problem_type` is the config's."""
    return signature.task == "text-classification" and problem_type == "multi_label_classification"
