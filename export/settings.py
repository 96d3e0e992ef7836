"""Reading a checkpoint's config.json: checking its values, and removing the keys that name code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import transformers
from transformers.activations import ACT2FN

from lfx.checks import LARGEST, one_of, parse_json, real_number, shown, whole_number
from lfx.errors import ExportError, one_line
from lfx.export.families import CONVERTIBLE
from lfx.export.original import from_original, is_original
from lfx.export.windows import layer_dilations

# Keys that make transformers fetch or import code, or load another model.
CODE_KEYS = frozenset(
    {
        "adapter_config",
        "adapter_kwargs",
        "attn_implementation",
        "audio_tokenizer",
        "auto_map",
        "base_model_name_or_path",
        "custom_generate",
        "custom_pipelines",
        "experts_implementation",
        "kernel_config",
        "name_or_path",
        "quantization_config",
        "transformers_weights",
        "use_kernels",
    }
)
CONFIGS = {"longformer": "LongformerConfig", "led": "LEDConfig"}  # model_type -> the config's class in transformers
_JSON_BYTES = 16_000_000  # a config.json has about 1 kB, the index of a sharded checkpoint about 1 MB
_LABELS = 1_000_000
_LAYERS = 1000  # each costs about 100 kB and 6 ms, however few weights it has
# Largest memory of one attention layer in PyTorch for a short sequence, which is padded to the window.
_ATTENTION_BYTES = 8_000_000_000
_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def read_settings(path: Path, model: str) -> dict[str, Any]:
    """Read a checkpoint's config.json, Hugging Face's or that of the original code, as arguments for its config class.

    Returns:
        The settings, with model_type, "longformer" or "led".
    Raises:
        ExportError: the config is not a Longformer's or an LED's, has an invalid value, or names weights that
            transformers can load only with other code.
    """
    data = read_object(path)
    if is_original(data):
        data = from_original(data, path)
    declared = data.get("model_type")
    if not isinstance(declared, str) or declared not in CONFIGS:
        model_type = declared if isinstance(declared, str) else "model without a model_type"
        convert = f"; make one of it with: lfx convert --model {shlex.quote(model)} --output FOLDER"
        cure = convert if model_type in CONVERTIBLE else ""
        rule = "lfx exports Longformer and LED models only"
        raise ExportError(f"{model} is a {model_type}, not a longformer; {rule}{cure}")
    refuse_other_weights(data, path, model)
    a_model = "a Longformer" if declared == "longformer" else "an LED"
    plain = getattr(transformers, CONFIGS[declared])()
    known = {*plain.to_dict(), *plain.attribute_map, "num_labels", "output_attentions", "torch_dtype"} - {"model_type"}
    settings = {}
    for key, value in data.items():
        if _names_code(key) or key.startswith("_") or key in ("model_type", "transformers_version"):
            continue
        if key not in known and hasattr(plain, key):  # it would overwrite a method or a class attribute
            raise ExportError(f"{path} has the key {key[:80]!r}, which is no setting of {a_model}; remove it")
        settings[key] = without_code(value)
    settings = without_aliases(settings, type(plain))
    check = check_settings if declared == "longformer" else check_led_settings
    check({**plain.to_dict(), **settings}, path)
    # Weights of any dtype are loaded in float32.
    settings = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
    return {**settings, "model_type": declared}


def refuse_other_weights(data: dict[str, Any], path: Path, model: str) -> None:
    """Refuse a config that names weights which transformers can load only with other code.

    Raises:
        ExportError: it does.
    """
    if data.get("quantization_config") is not None:
        raise ExportError(
            f"{model} holds quantized weights (quantization_config), whose loaders fetch code; export the float "
            "checkpoint that it was made from, and use: lfx quantize"
        )
    if data.get("transformers_weights") is not None:
        raise ExportError(
            f"{path} names its weights file with transformers_weights; rename that file to model.safetensors and "
            "remove the key"
        )


def check_settings(values: dict[str, Any], path: Path) -> None:
    """Check the values of LongformerConfig's settings.

    Args:
        values: all of them, by their names in LongformerConfig.
        path: of the config.json that they are from, for messages.
    Raises:
        ExportError: one is invalid, or two do not fit each other.
    """

    def integer(name: str, low: int, high: int = LARGEST) -> int:
        return whole_number(values[name], f"{path}: {name}", low, high, ExportError)

    vocab_size = integer("vocab_size", 1)
    pad = integer("pad_token_id", 0, vocab_size - 1)
    if values["sep_token_id"] is not None:
        integer("sep_token_id", 0, vocab_size - 1)
    hidden, heads = integer("hidden_size", 1), integer("num_attention_heads", 1)
    if hidden % heads:
        raise ExportError(f"{path}: num_attention_heads {heads} does not divide hidden_size {hidden}")
    for name in ("intermediate_size", "type_vocab_size"):
        integer(name, 1)
    positions = integer("max_position_embeddings", pad + 2)
    layers = integer("num_hidden_layers", 1, _LAYERS)
    check_windows(values["attention_window"], layers, heads, positions, f"{path}: attention_window")
    layer_dilations(values.get("attention_dilation"), layers, heads, f"{path}: attention_dilation", positions)
    one_of(values["hidden_act"], f"{path}: hidden_act", ACT2FN, ExportError)
    real_number(values["layer_norm_eps"], f"{path}: layer_norm_eps", 0.0, 1.0, ExportError)
    _check_shared_settings(values, path)


def _check_shared_settings(values: dict[str, Any], path: Path) -> None:
    autoregressive = values.get("autoregressive")
    if autoregressive is not None and not isinstance(autoregressive, bool):
        raise ExportError(f"{path}: autoregressive is {shown(autoregressive)}; give true or false")
    for name in ("dtype", "torch_dtype"):
        if values.get(name) is not None:
            one_of(values[name], f"{path}: {name}", _DTYPES, ExportError)
    if values["problem_type"] is not None:
        one_of(values["problem_type"], f"{path}: problem_type", _PROBLEMS, ExportError)
    _check_labels(values, path)


def check_led_settings(values: dict[str, Any], path: Path) -> None:
    """Check the values of LEDConfig's settings; the arguments are those of `check_settings`.

    Raises:
        ExportError: one is invalid, or two do not fit each other.
    """

    def integer(name: str, low: int, high: int = LARGEST) -> int:
        return whole_number(values[name], f"{path}: {name}", low, high, ExportError)

    vocab_size = integer("vocab_size", 1)
    for name in ("pad_token_id", "decoder_start_token_id"):
        integer(name, 0, vocab_size - 1)
    hidden = integer("d_model", 1)
    for part in ("encoder", "decoder"):
        heads = integer(f"{part}_attention_heads", 1)
        if hidden % heads:
            raise ExportError(f"{path}: {part}_attention_heads {heads} does not divide d_model {hidden}")
        integer(f"{part}_ffn_dim", 1)
        integer(f"{part}_layers", 1, _LAYERS)
        integer(f"max_{part}_position_embeddings", 1)
    positions, name = values["max_encoder_position_embeddings"], f"{path}: attention_window"
    window = values["attention_window"]
    layers, heads = values["encoder_layers"], values["encoder_attention_heads"]
    check_windows(window, layers, heads, positions, name)
    layer_dilations(values.get("attention_dilation"), layers, heads, f"{path}: attention_dilation", positions)
    widest = max(window) if isinstance(window, list) else window
    if widest > positions:
        raise ExportError(
            f"{name} {widest} is above max_encoder_position_embeddings {positions}, so that Hugging Face itself cannot "
            "run the model; give a smaller window"
        )
    one_of(values["activation_function"], f"{path}: activation_function", ACT2FN, ExportError)
    _check_shared_settings(values, path)


def check_windows(window: Any, layers: int, heads: int, positions: int, name: str) -> None:
    """Check an attention_window: an even number, or a list of one for each layer.

    Args:
        layers, heads, positions: num_hidden_layers, num_attention_heads and max_position_embeddings.
        name: of the setting or option, for messages.
    Raises:
        ExportError: a number is odd or out of range, takes too much memory, or the list has another length.
    """
    # Hugging Face pads a sequence to a multiple of the window, so a huge window would allocate memory for padding.
    widest = max(2 * positions, 1024)
    if isinstance(window, list) and len(window) != layers:
        raise ExportError(f"{name} has {len(window)} entries for {layers} layers; give one for each layer, or a number")
    for width in window if isinstance(window, list) else [window]:
        if whole_number(width, name, 2, widest, ExportError) % 2:
            raise ExportError(f"{name} {width} is odd; give an even number, both sides together")
        check_window_memory(width, heads, name)


def check_window_memory(width: int, heads: int, name: str) -> None:
    """Check the memory that Hugging Face's attention takes for a sequence of any length, which it pads to the window.

    Args:
        width: attention window in tokens, both sides together.
        name: of the window, for messages.
    Raises:
        ExportError: it is more than 8 GB.
    """
    needed = 4 * 4 * heads * width * width  # four float32 copies of the scores, as measured
    if needed > _ATTENTION_BYTES:
        raise ExportError(
            f"{name} {width} would take {needed / 1e9:.0f} GB for any sequence in Hugging Face's attention, above "
            f"the {_ATTENTION_BYTES / 1e9:.0f} GB allowed; give a smaller window"
        )


def _check_labels(values: dict[str, Any], path: Path) -> None:
    architectures = values["architectures"]
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ExportError(f"{path}: architectures is no list of class names; give one, such as LongformerModel")
    if values.get("num_labels") is not None:
        whole_number(values["num_labels"], f"{path}: num_labels", 1, _LABELS, ExportError)
    for name in ("id2label", "label2id"):
        if values[name] is not None and not isinstance(values[name], dict):
            raise ExportError(f"{path}: {name} is no JSON object; give labels by number, or leave it out")
    labels = values["id2label"] or {}
    if {str(key) for key in labels} != {str(i) for i in range(len(labels))}:
        raise ExportError(
            f"{path}: the keys of id2label are not the numbers from 0 to {len(labels) - 1}; renumber them"
        )
    if not all(isinstance(label, str) for label in labels.values()):
        raise ExportError(f"{path}: id2label has a label that is no text; give strings")


def model_size(settings: dict[str, Any]) -> int:
    """Return the number of weights of the model that settings of `read_settings` describe, or a little less."""
    return led_size(settings) if settings["model_type"] == "led" else longformer_size(settings)


def led_size(settings: dict[str, Any]) -> int:
    """Return the number of weights of the LED that a config describes, or a little less."""
    values = {**transformers.LEDConfig().to_dict(), **settings}
    hidden = values["d_model"]
    rows = sum(values[f"max_{part}_position_embeddings"] for part in ("encoder", "decoder"))
    encoder, decoder = (
        values[f"{part}_layers"] * (matrices * hidden * hidden + 2 * hidden * values[f"{part}_ffn_dim"])
        for part, matrices in (("encoder", 7), ("decoder", 8))
    )
    return int((values["vocab_size"] + rows) * hidden + encoder + decoder)


def longformer_size(settings: dict[str, Any]) -> int:
    """Return the number of weights of the Longformer that a config describes, or a little less."""
    values = {**transformers.LongformerConfig().to_dict(), **settings}
    hidden = values["hidden_size"]
    rows = values["vocab_size"] + values["max_position_embeddings"] + values["type_vocab_size"]
    layer = 7 * hidden * hidden + 2 * hidden * values["intermediate_size"]
    labels = max(values.get("num_labels") or 0, len(values["id2label"] or {}))
    return int((rows + labels) * hidden + values["num_hidden_layers"] * layer)


def check_size(numbers: int, stored: int, path: Path) -> None:
    """Check that the weight files can hold the model that the config describes.

    transformers allocates the model by the config before it reads the weights, so a large size in a small checkpoint
    would take memory.

    Args:
        numbers: number of weights that the config describes.
        stored: bytes of all weight files.
    Raises:
        ExportError: they are fewer than the number of weights.
    """
    if numbers > stored:
        raise ExportError(
            f"{path} describes a model of {numbers:,} weights or more, but its weight files have {stored:,} bytes; "
            "fetch them again, or give the config that belongs to them"
        )


def read_object(path: Path, limit: int = _JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
        ExportError: the file cannot be read, is larger than `limit` bytes, or is no JSON object.
    """
    try:
        if path.stat().st_size > limit:
            raise ExportError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
        data = parse_json(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path} is not a JSON object: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} is not a JSON object but a {type(data).__name__}")
    return data


def without_aliases(settings: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Return settings by their names in the config's class, which reads some of them under a second name too.

    Of a setting under both names the second name counts, as in transformers, which sets it last.
    """
    aliases = config_class.attribute_map
    return {aliases.get(name, name): settings[name] for name in sorted(settings, key=aliases.__contains__)}


def without_code(value: Any) -> Any:
    """Remove the keys that name code from a config's JSON, at any depth."""
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if not _names_code(key)}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def _names_code(key: Any) -> bool:
    return isinstance(key, str) and (key in CODE_KEYS or key.removeprefix("_") in CODE_KEYS or key == "_auto_class")
