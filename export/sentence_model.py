"""Reading the pooling of a folder of sentence-transformers, and adding it to the folder's Longformer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
from torch import nn

from lfx.checks import LARGEST, flag, whole_number
from lfx.errors import ExportError
from lfx.export.checkpoint import Fetch, readable
from lfx.export.pooling import ACTIVATIONS, Dense, LongformerForSentenceEmbedding, Normalize
from lfx.export.sentence_folder import (
    MODULES,
    check_function,
    class_name,
    list_modules,
    module_weights,
    read_modules,
    read_settings_of,
)
from lfx.export.settings import read_object
from lfx.runtime.text_files import PROMPTS
from lfx.signature import POOLINGS

# The flags of a Pooling before sentence-transformers 5.6, in the order in which it concatenates the vectors.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Settings of the encoder that change what it computes from a text; lfx knows one value of each.
_FIXED: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "config_args": {},
    "config_kwargs": {},
    "tokenizer_args": {},
    "processor_kwargs": {},
    "processing_kwargs": {},
    "query_expansion": None,
}
_BARE = "export the bare model with --task feature-extraction"


@dataclass(frozen=True)
class EncoderSettings:
    """What sentence-transformers does to a text before the encoder.

    Attributes:
        max_seqlen: length in tokens to which it truncates; None = the tokenizer's own.
        lower_case: whether it converts the text to lower case.
    """

    max_seqlen: int | None = None
    lower_case: bool = False


def has_pooling(fetch: Fetch) -> bool:
    """Return whether a checkpoint has a pooling of sentence-transformers.

    Raises:
        ExportError: its modules.json is broken.
    """
    path = fetch(MODULES)
    return path is not None and any(class_name(module) == "Pooling" for module in list_modules(path))


def read_encoder_settings(fetch: Fetch) -> EncoderSettings:
    """Read the settings of the encoder of a folder of sentence-transformers.

    Raises:
        ExportError: a setting is of another type, or lfx cannot follow it.
    """
    path, settings = read_settings_of(fetch)
    for name, known in _FIXED.items():
        if settings.get(name) and settings[name] != known:
            raise ExportError(f"{path}: lfx knows no {name} but {known!r}; save the model without it, or {_BARE}")
    modality = settings.get("modality_config")
    if modality is not None:
        text = modality.get("text") if isinstance(modality, dict) else None
        if text != {"method": "forward", "method_output_name": "last_hidden_state"}:
            raise ExportError(f"{path}: modality_config pools another output than last_hidden_state; {_BARE}")
    limit = settings.get("max_seq_length")
    if limit is not None:
        limit = whole_number(limit, f"{path}: max_seq_length", 1, error=ExportError)
    lower_case = flag(settings.get("do_lower_case") or False, f"{path}: do_lower_case", ExportError)
    return EncoderSettings(limit, lower_case)


def add_lower_case(tokenizer: Any) -> None:
    """Make a tokenizer convert texts to lower case first, in place, unless it does so already.

    Raises:
        ExportError: it is no fast tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            "do_lower_case needs a fast tokenizer; save the checkpoint with one that has a tokenizer.json"
        )
    normalizers: Any = tokenizers.normalizers
    current = backend.normalizer
    parts = list(current) if isinstance(current, normalizers.Sequence) else [current] if current is not None else []
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def add_pooling(longformer: nn.Module, fetch: Fetch, model: str, pooling: str | None) -> nn.Module:
    """Add a pooling to a Longformer: the one that its folder has, or `pooling`.

    Args:
        longformer: a LongformerModel.
        fetch: of the checkpoint. model: its name, for messages.
        pooling: one of `lfx.signature.POOLINGS` for a folder without one; None = the folder's.
    Raises:
        ExportError: the folder has none and `pooling` is None, or both are there; or a module of the folder is broken,
            or computes what lfx does not know.
    """
    if pooling is not None:
        if has_pooling(fetch):
            raise ExportError(f"{model} has a pooling of its own, in {MODULES}; leave pooling {pooling!r} out")
        return LongformerForSentenceEmbedding(longformer, (pooling,)).eval()
    path = fetch(MODULES)
    if path is None or not has_pooling(fetch):
        raise ExportError(f"{model} has no pooling of sentence-transformers; choose one, such as --pooling mean")
    modules = read_modules(path)
    if class_name(modules[1]) != "Pooling" or any(class_name(module) == "Pooling" for module in modules[2:]):
        raise ExportError(f"{path}: a Pooling must follow the Transformer, and there must be one; {_BARE}")
    config: Any = longformer.config
    modes = _read_pooling(fetch, modules[1]["path"], config.hidden_size)
    size, added = config.hidden_size * len(modes), []
    for module in modules[2:]:
        made, size = _read_module(fetch, class_name(module), module["path"], size)
        if made is not None:
            added.append(made)
    return LongformerForSentenceEmbedding(longformer, modes, added, _dimensions(fetch, size)).eval()


def _read_pooling(fetch: Fetch, name: str, hidden_size: int) -> tuple[str, ...]:
    """Return the modes of a Pooling, in any form that a version of sentence-transformers has written."""
    path = fetch(f"{name}/config.json")
    if path is None:
        raise ExportError(f"{name} has no config.json, which says how to pool; save the model again")
    settings = read_object(path)
    for key in ("embedding_dimension", "word_embedding_dimension"):
        if settings.get(key, hidden_size) != hidden_size:
            raise ExportError(f"{path}: {key} is {str(settings[key])[:80]}, and the Longformer's is {hidden_size}")
    if not flag(settings.get("include_prompt", True), f"{path}: include_prompt", ExportError):
        raise ExportError(
            f"{path}: include_prompt is false, so the tokens of a prompt are not pooled; a graph does not know which "
            f"these are: pool them too, or {_BARE}"
        )
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _FLAGS.items() if flag(settings.get(key, False), f"{path}: {key}", ExportError)]
        return tuple(modes) or ("mean",)
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) > len(POOLINGS) or not all(isinstance(mode, str) for mode in modes):
        raise ExportError(
            f"{path}: pooling_mode is no name, and no list of up to {len(POOLINGS)}; save the model again"
        )
    return tuple(modes)


def _read_module(fetch: Fetch, module_class: str, name: str, size: int) -> tuple[nn.Module | None, int]:
    """Read the module in the folder `name`.

    Args:
        module_class: of sentence-transformers.
        size: length of its input vector.
    Returns:
        The module, None for one that does nothing; and the length of its output vector.
    """
    path = fetch(f"{name}/config.json")
    settings = {} if path is None else read_object(path)
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise ExportError(
                f"{path}: {key} is {str(settings[key])[:80]!r}, and lfx knows sentence_embedding alone; {_BARE}"
            )
    if module_class == "Normalize":
        return Normalize(), size
    if module_class == "Dropout":
        return None, size
    weights = _load_weights(fetch, name)
    if module_class == "LayerNorm":
        return _with_weights(nn.LayerNorm(size), weights, "norm", name), size
    return _read_dense(settings, path, weights, name, size)


def _read_dense(
    settings: dict[str, Any], path: Path | None, weights: dict[str, torch.Tensor], name: str, size: int
) -> tuple[nn.Module, int]:
    path = path or Path(name)
    weight = weights.get("linear.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != size:
        shape = "no linear.weight" if weight is None else f"a linear.weight {tuple(weight.shape)}"
        raise ExportError(f"{name} has {shape}, and gets {size} values; save the model again")
    if "activation_function" in settings:
        check_function(settings, "activation_function", path)
    activation = str(settings.get("activation_function") or "Tanh").rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise ExportError(f"{path}: activation_function {activation[:80]!r} is none of {', '.join(ACTIVATIONS)}")
    dense = Dense(
        size,
        len(weight),
        ACTIVATIONS[activation](),
        bias=flag(settings.get("bias", True), f"{path}: bias", ExportError),
        residual=flag(settings.get("use_residual", False), f"{path}: use_residual", ExportError),
    )
    return _with_weights(dense, weights, "", name), len(weight)


def _load_weights(fetch: Fetch, name: str) -> dict[str, torch.Tensor]:
    """Read the weights of a module, in float32, without running code."""
    file = module_weights(fetch, name)
    if file is None:
        raise ExportError(
            f"{name} has no weights: neither model.safetensors nor pytorch_model.bin; save the model again"
        )
    with readable(file):
        if file.suffix == ".safetensors":
            weights = safetensors.torch.load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        return {str(key): tensor.to(torch.float32, copy=True) for key, tensor in weights.items()}


def _with_weights(module: nn.Module, weights: dict[str, torch.Tensor], inner: str, name: str) -> nn.Module:
    """Load weights into a module; sentence-transformers has them under the name `inner` in its own."""
    prefix = f"{inner}." if inner else ""
    expected = {f"{prefix}{key}": tensor.shape for key, tensor in module.state_dict().items()}
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    if shapes != expected:
        raise ExportError(
            f"{name} has the weights {_shapes(shapes)}, and its config describes {_shapes(expected)}; save the model "
            "again"
        )
    module.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in weights.items()})
    return module.eval()


def _shapes(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{key[:80]} {tuple(shape)}" for key, shape in list(shapes.items())[:4]) or "none"


def _dimensions(fetch: Fetch, size: int) -> int | None:
    """Return the number of values that sentence-transformers keeps of a vector; None = all."""
    path = fetch(PROMPTS)
    kept = None if path is None else read_object(path).get("truncate_dim")
    if kept is None:
        return None
    kept = whole_number(kept, f"{path}: truncate_dim", 1, LARGEST, ExportError)
    return kept if kept < size else None
