"""Loading a checkpoint's model and tokenizer from a folder or the hub, without running code of the checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.parameter import is_lazy

from lfx.checks import one_of
from lfx.errors import ExportError, one_line
from lfx.export import checkpoint
from lfx.export.led import LED_CLASSES
from lfx.export.led_classifier import LEDForSequenceClassification
from lfx.export.loop_attention import asks_for_loop_attention, use_loop_attention
from lfx.export.options import check_pooling
from lfx.export.original import RENAMED
from lfx.export.sentence_model import add_lower_case, add_pooling, has_pooling
from lfx.export.settings import CONFIGS
from lfx.files import temporary_folder
from lfx.signature import SENTENCE_EMBEDDING, TASKS, TEXT_GENERATION

_IN_A_LAYER = re.compile(r"(^|\.)(encoder|decoder|transformer)\.layers?\.\d+\.")
_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile, and of DataParallel and DeepSpeed
# Tied in transformers before 5 whatever tie_word_embeddings says; its safetensors hold such a tensor once.
_ALWAYS_TIED = {
    "lm_head.decoder.bias": "lm_head.bias",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
}
_NEXT_SENTENCE = "cls.seq_relationship."  # BERT's head for pretraining, inside the module of its masked LM head
_BY_ARCHITECTURE = {task.architecture: name for name, task in TASKS.items()} | {
    cls: task for task, cls in LED_CLASSES.items()
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers and torch about loading, padding and tracing."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    exporter = logging.getLogger("torch.onnx")
    exporter_level = exporter.level
    exporter.setLevel(logging.ERROR)
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        exporter.setLevel(exporter_level)
        if bars:
            transformers.logging.enable_progress_bar()


def load(
    model: str, task: str = "auto", pooling: str | None = None, fetch: checkpoint.Fetch | None = None
) -> tuple[nn.Module, str]:
    """Load a Longformer or LED checkpoint in float32, in eval mode; none of its code runs: see `lfx.export.checkpoint`.

    Args:
        model: a folder with config.json and weights, or a model id of the hub.
        task: one of `lfx.signature.TASKS`; "auto" takes it from the architecture in the config, and is
            sentence-embedding for a folder of sentence-transformers with a pooling, or with the argument `pooling`.
        pooling: one of `lfx.signature.POOLINGS`, for sentence embeddings of a checkpoint without a pooling.
        fetch: of the checkpoint, from `lfx.export.checkpoint.fetcher`. Default: a new one.
    Returns:
        The model and the name of its task. The pooler is None if the checkpoint has no weights for it. A model with
        dilation or causal windows has `lfx.export.loop_attention`.
    Raises:
        ExportError: the checkpoint does not exist, or is no Longformer and no LED, or has no such task; weights are
            missing, broken, or of other shapes than the config's; or the pooling is missing, or does something that lfx
            does not know.
    """
    one_of(task, "task", ("auto", *TASKS), ExportError)
    check_pooling(pooling, task)
    with quiet():
        fetch = fetch if fetch is not None else checkpoint.fetcher(model)
        files = checkpoint.find(model, fetch)
        if task == "auto":
            task = SENTENCE_EMBEDDING if pooling is not None or has_pooling(fetch) else _task_of(files)
        settings = dict(files.settings)
        model_type = settings.pop("model_type")
        if model_type == "led" and task not in LED_CLASSES:
            raise ExportError(
                f"{files.name} is an LED, which has no {task}; choose --task from: {', '.join(LED_CLASSES)}"
            )
        if model_type != "led" and task == TEXT_GENERATION:
            raise ExportError(f"{files.name} is a {model_type}, which has no decoder; choose another --task")
        try:
            # Always eager: another attn_implementation may be code of the hub.
            config = getattr(transformers, CONFIGS[model_type])(**settings, attn_implementation="eager")
        except Exception as error:
            raise ExportError(f"{files.folder / 'config.json'} is no config of its class: {_flat(error)}") from error
        cure = f"it was not trained for {task}; choose the --task that it was trained for"
        loader = led_class(task) if model_type == "led" else getattr(transformers, TASKS[task].auto_class)
        loaded = load_weights(loader, config, files, cure, RENAMED)
        if asks_for_loop_attention(config):
            loaded = use_loop_attention(loaded)
        return (add_pooling(loaded, fetch, model, pooling) if task == SENTENCE_EMBEDDING else loaded), task


def led_class(task: str) -> Any:
    """Return the class of an LED for a task."""
    name = LED_CLASSES[task]
    return LEDForSequenceClassification if task == "text-classification" else getattr(transformers, name)


def load_weights(
    loader: Any, config: Any, files: checkpoint.Checkpoint, cure: str, renamed: Mapping[str, str] = MappingProxyType({})
) -> nn.Module:
    """Load a model in float32, in eval mode.

    Args:
        loader: a class of transformers, with `from_pretrained`.
        cure: what to do where weights are missing, for the message.
        renamed: patterns of weights' names, and what replaces them.
    Returns:
        The model. The pooler is None if the checkpoint has no weights for it.
    Raises:
        ExportError: weights are missing, broken, or of other shapes than the config's.
    """
    try:
        loaded, info = loader.from_pretrained(
            files.folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # `_refuse_missing` names them
            use_safetensors=files.is_safetensors,
            weights_only=True,
            local_files_only=True,
            trust_remote_code=False,
            key_mapping=dict(renamed),
            output_loading_info=True,
        )
    except Exception as error:
        raise ExportError(f"the weights of {files.name} cannot be loaded: {_reason(error)}") from error
    tied = _tie_always_tied(loaded, set(info["missing_keys"]))
    _refuse_missing(loaded, {**info, "missing_keys": set(info["missing_keys"]) - tied}, files.name, cure)
    loaded.config.return_dict = True  # a tuple would lose the output names
    model: nn.Module = loaded.eval()
    return model


def load_tokenizer(model: str, fetch: checkpoint.Fetch | None = None, *, lower_case: bool = False) -> Any:
    """Load a checkpoint's tokenizer; returns None if it has none.

    Args:
        fetch: of the checkpoint, from `lfx.export.checkpoint.fetcher`. Default: a new one.
        lower_case: make it convert texts to lower case first.
    Raises:
        ExportError: the tokenizer cannot be loaded, or cannot convert to lower case.
    """
    with quiet(), temporary_folder("tokenizer") as scratch:
        if not checkpoint.copy_tokenizer(model, scratch, fetch):
            return None
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                scratch, local_files_only=True, trust_remote_code=False
            )
        except BaseException as error:
            # A panic in the Rust code of the tokenizers library is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ExportError(f"the tokenizer of {model} cannot be loaded: {_flat(error)}") from error
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):  # such as RagTokenizer, which holds two
            raise ExportError(f"the tokenizer of {model} is a {type(tokenizer).__name__}; set another tokenizer_class")
        _refuse_without_words(tokenizer, model)
        if lower_case:
            add_lower_case(tokenizer)
        return tokenizer


def _refuse_without_words(tokenizer: Any, model: str) -> None:
    """Refuse a tokenizer that knows no word: its vocabulary file is missing, or it has the wrong class."""
    vocabulary = tokenizer.get_vocab()
    # Including that of unknown words. Not `all_special_ids`: it ends in a RecursionError if `unk_token` is empty.
    special = {vocabulary.get(token) for token in tokenizer.all_special_tokens}
    words = {
        number: word for word, number in vocabulary.items() if number not in special and any(map(str.isalnum, word))
    }
    texts = ("the text", *itertools.islice(words.values(), 100))
    try:
        is_empty = all(words.keys().isdisjoint(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    except Exception as error:
        raise ExportError(f"the tokenizer of {model} fails on a text: {_flat(error)}") from error
    if is_empty:
        raise ExportError(
            f"the tokenizer of {model}, a {type(tokenizer).__name__}, knows no word: its vocabulary file is missing or "
            "belongs to another class; add the file, or set tokenizer_class in tokenizer_config.json"
        )


def _task_of(files: checkpoint.Checkpoint) -> str:
    names = files.settings.get("architectures") or []
    if not names:
        return "feature-extraction"
    for name in names:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    shown = ", ".join(names)[:200]
    raise ExportError(f"{files.name} has architecture {shown}; choose --task from: {', '.join(TASKS)}")


def _tie_always_tied(loaded: nn.Module, missing: set[str]) -> set[str]:
    """Give missing weights of `_ALWAYS_TIED` the values of those that are there; returns their names."""
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    tied = set()
    for name in missing:
        end = next((end for end in _ALWAYS_TIED if name.endswith(end)), name)
        source = name.removesuffix(end) + _ALWAYS_TIED.get(end, "")
        if source in parameters.keys() - missing:
            parameters[name].data = parameters[source].data
            tied.add(name)
    return tied


def _refuse_missing(loaded: nn.Module, info: dict[str, Any], model: str, cure: str) -> None:
    mismatched = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get("mismatched_keys", ()))
    if mismatched:
        raise ExportError(
            f"{model} has weights of other shapes than the config's: {_listed(mismatched)}; give the config that "
            "belongs to them"
        )
    # Weights of another head may be ignored. Those of a further layer, or of an adapter in a layer, change the outputs.
    unexpected = sorted(key for key in info.get("unexpected_keys", ()) if _is_in_a_part(key, loaded))
    if unexpected:
        prefix = next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in unexpected)), None)
        remedy = (
            "give the config that belongs to them, and merge an adapter into its model"
            if prefix is None
            else f"the prefix {prefix} is that of a wrapper: save the model that it wraps"
        )
        raise ExportError(f"{model} has weights for which its config has no layer: {_listed(unexpected)}; {remedy}")
    missing = sorted(key for key in info.get("missing_keys", ()) if not key.endswith("position_ids"))
    without_pooler = [key for key in missing if not key.startswith("pooler.")]
    if missing and not without_pooler:
        loaded.pooler = None  # type: ignore[assignment]
        return
    if without_pooler:
        raise ExportError(f"{model} has no weights for {_listed(without_pooler)}: {cure}")


def _is_in_a_part(key: str, model: nn.Module) -> bool:
    """Whether an unexpected weight belongs to a part that the model has, such as an encoder layer or its own head."""
    if key.endswith("position_ids") or key.startswith(_NEXT_SENTENCE):
        return False
    if _IN_A_LAYER.search(key):
        return True
    modules = dict(model.named_modules())
    base = str(model.base_model_prefix)
    path = key if base in modules else key.removeprefix(f"{base}.")
    while path := path.rpartition(".")[0]:
        if path in modules:
            return path != base
    return False


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _reason(error: BaseException) -> str:
    text = one_line(error)
    return text if isinstance(error, (OSError, ValueError, AssertionError)) else f"{type(error).__name__}: {text}"


def check_weights(module: nn.Module) -> None:
    """Check that no parameter or buffer has a NaN, and no parameter an infinity; a buffer may, such as a mask.

    Raises:
        ExportError: names the tensor and the number of such values, or a tensor that is sparse, a wrapper of another
            one, or without values.
    """
    parameters = dict(module.named_parameters())
    buffers = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name not in parameters and isinstance(tensor, torch.Tensor)
    }
    for name, tensor in {**parameters, **buffers}.items():
        if is_lazy(tensor):
            raise ExportError(f"{name} has no shape yet; run the module once before the export")
        if hasattr(type(tensor), "__tensor_flatten__"):  # of torchao or of FSDP
            raise ExportError(
                f"{name} is a {type(tensor).__name__}, which wraps its values; give the model as it was before it was "
                "quantized or sharded"
            )
        if tensor.layout != torch.strided:
            raise ExportError(f"{name} is a sparse tensor; give it as a dense one, with to_dense()")
        if tensor.is_meta:
            raise ExportError(f"{name} is on the device meta, without values; load the weights first")
        values = tensor.detach().float()  # float64 values that overflow float32 count as infinite
        nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
        if nans or (infinities and name in parameters):
            value, count = ("NaN", nans) if nans else ("an infinity", infinities)
            raise ExportError(
                f"{name} holds {value} in {count:,} of {tensor.numel():,} values; give a checkpoint with finite weights"
            )


def _flat(error: BaseException) -> str:
    """Join the lines of an error message and cut it to 300 characters; the reason may be in the second line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of all weights, by name, dtype, shape and bytes; it does not depend on the machine."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue  # a module's extra state
        plain = tensor.detach().contiguous().cpu()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        if plain.numel():
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
