"""`accelerate`: puts the lfx ops into a Longformer or LED of transformers, for inference."""

from __future__ import annotations

import functools
from inspect import getattr_static
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

from lfx.checks import whole_number
from lfx.errors import InputError, require

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, max_global: int | None = None) -> Model:
    """Make a Longformer or LED of transformers compute its self-attention with the lfx ops, in place, for inference.

    The model then takes a sequence of any length as it is, without padding to the attention window, and its outputs
    keep Hugging Face's names and shapes. It computes no attention weights, does not train, and runs the feed-forward
    layers in one piece: their chunks need a length that is a multiple. Weights, their names and `save_pretrained` stay
    the same; for a model beside it, copy it first: accelerate(copy.deepcopy(model)).

    Args:
        model: a model, or a module that contains transformers' LongformerSelfAttention or LEDEncoderSelfAttention.
        max_global: number of slots for the global tokens of a row; a row with more is refused. 0 = no token is global.
            With a fixed number nothing is read back from the device, which CUDA graphs and torch.compile with
            fullgraph=True need. Default: the largest count in each batch.
    Returns:
        `model`.
    Raises:
        InputError: the model has no such module, or one with a method of its own in place of one of transformers'; an
            encoder has other layers than transformers', or layers with a forward of their own; or max_global is out of
            range.
    """
    require("transformers", "torch")
    if max_global is not None:
        max_global = whole_number(max_global, "max_global", 0)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}; give a Longformer or LED of transformers")
    replacements = _replacements()
    attention = [cls for cls in replacements if cls.__name__.endswith("SelfAttention")]
    if not any(isinstance(module, tuple(attention)) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has no Longformer self-attention; give a Longformer or LED")
    new_classes = {module: _new_class(module, replacements) for module in model.modules()}
    for module in model.modules():
        for original, parts in _parts().items():
            if isinstance(module, original):
                _check_parts(module, parts)
    for module, cls in new_classes.items():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0  # type: ignore[assignment]
        if cls is not None:
            module.__class__ = cls
            module.is_accelerated, module.max_global = True, max_global  # type: ignore[assignment]
    return model


def _replacements() -> dict[type[nn.Module], type[nn.Module]]:
    """Class of transformers -> ours."""
    from transformers.models.led import modeling_led
    from transformers.models.longformer import modeling_longformer

    from lfx.torch import led, longformer

    return {
        modeling_longformer.LongformerSelfAttention: longformer.LongformerSelfAttention,
        modeling_longformer.LongformerEncoder: longformer.LongformerEncoder,
        modeling_longformer.LongformerModel: longformer.LongformerModel,
        modeling_led.LEDEncoderSelfAttention: led.LEDEncoderSelfAttention,
        modeling_led.LEDEncoder: led.LEDEncoder,
    }


def _parts() -> dict[type[nn.Module], list[tuple[str, type[nn.Module]]]]:
    """Class of transformers -> the parts down to its self-attention, see `_check_parts`."""
    from transformers.models.led import modeling_led as led
    from transformers.models.longformer import modeling_longformer as longformer

    of_encoder: list[tuple[str, type[nn.Module]]] = [
        ("layer", longformer.LongformerLayer),
        ("attention", longformer.LongformerAttention),
        ("self", longformer.LongformerSelfAttention),
    ]
    return {
        longformer.LongformerModel: [("encoder", longformer.LongformerEncoder), *of_encoder],
        longformer.LongformerEncoder: of_encoder,
        led.LEDEncoder: [
            ("layers", led.LEDEncoderLayer),
            ("self_attn", led.LEDEncoderAttention),
            ("longformer_self_attn", led.LEDEncoderSelfAttention),
        ],
    }


def _new_class(module: nn.Module, replacements: dict[type[nn.Module], type[nn.Module]]) -> Any:
    """The class that a module gets; None if it stays as it is.

    A subclass of a user's gets a class of the same name whose bases are the subclass and ours.

    Raises:
        InputError: a subclass or the module has a method of its own that `original.forward` is or may call: ours would
            not call it.
    """
    cls: Any = type(module)
    replacement: Any
    for original, replacement in replacements.items():
        if not isinstance(module, original):
            continue
        known = replacement if isinstance(module, replacement) else original
        _check_methods(module, known, _methods(original), original.__name__)
        if known is replacement:
            return cls
        if cls is original:
            return replacement
        return _combined(cls, replacement)
    return None


@functools.cache
def _combined(cls: Any, replacement: Any) -> type[Any]:
    """A class named as a user's subclass, whose bases are ours and the subclass; its modules can be pickled."""

    def reduce(module: Any) -> tuple[Any, ...]:
        return _empty, (cls, replacement), module.__getstate__()

    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce__": reduce}
    return type(cls.__name__, (replacement, cls), names)


def _empty(cls: Any, replacement: Any) -> Any:
    """A module of the combined class without its state, for pickle."""
    return object.__new__(_combined(cls, replacement))


def _check_parts(owner: nn.Module, parts: list[tuple[str, type[nn.Module]]]) -> None:
    """Check what is between a model or an encoder and its self-attention: only transformers' own hands the Tokens on.

    Args:
        parts: the attribute of `owner` that has its part or parts, and their class; then the same of these parts.
    Raises:
        InputError: a part is of another class, or has a forward of its own.
    """
    if not parts:
        return
    name, original = parts[0]
    value = getattr(owner, name)
    for part in value if isinstance(value, nn.ModuleList | nn.Sequential) else [value]:
        if not isinstance(part, original):
            raise InputError(
                f"{type(owner).__name__} has a {type(part).__name__} where transformers has a {original.__name__}, "
                "which accelerate cannot replace; if it is a wrapper, accelerate the model before it is wrapped"
            )
        if original not in _replacements():
            _check_methods(part, original, ["forward"], original.__name__)
        _check_parts(part, parts[1:])


def _check_methods(module: nn.Module, known: type[nn.Module], names: list[str], original: str) -> None:
    """Raise InputError if a module has another method of one of these names than the class `known`."""
    for name in names:
        if getattr_static(type(module), name) is not getattr_static(known, name) or name in vars(module):
            raise InputError(
                f"{type(module).__name__} has a {name} of its own, which accelerate cannot replace; give a model whose "
                f"{original} is transformers' own"
            )


def _methods(original: type[nn.Module]) -> list[str]:
    """The methods of a class of transformers that its `forward` is or may call."""
    unused = {"__init__", "get_input_embeddings", "set_input_embeddings"}
    return [name for name, value in vars(original).items() if _is_method(value) and name not in unused]


def _is_method(value: Any) -> bool:
    return isinstance(value, FunctionType | staticmethod | classmethod | property)
