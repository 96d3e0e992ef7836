"""Torch models as functions from numpy inputs to numpy outputs: unchanged, int8, or float64 with dense attention."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.models.led import modeling_led as led
from transformers.models.longformer import modeling_longformer as hf

from lfx import reference
from lfx.errors import ArtifactError, ExportError, one_line
from lfx.export.expose_layers import layer_name
from lfx.export.load import quiet
from lfx.export.loop_attention import LoopSelfAttention
from lfx.export.rewrite import Attentions, clone, named_attentions, named_outputs
from lfx.export.unpadded import SELF_ATTENTION, replace_attention
from lfx.parity import Arrays, Runner

GlobalTokensRunner = Callable[[Mapping[str, NDArray[np.int64]]], list[NDArray[np.bool_]]]
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _DenseSelfAttention(LoopSelfAttention):
    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        *_: Any,
        output_attentions: Collection[str] = (),
        **__: Any,
    ) -> tuple[torch.Tensor, ...]:
        mask = attention_mask.numpy()
        key_mask, is_global = mask >= 0, mask > 0
        slots = max(1, int(is_global.sum(axis=1).max()))
        index = np.full((len(mask), slots), -1)
        for row, flags in enumerate(is_global):
            positions = np.flatnonzero(flags)
            index[row, : len(positions)] = positions
        global_hidden = hidden_states[torch.arange(len(mask))[:, None], torch.from_numpy(index).clamp(min=0)]
        global_context = reference.global_attention(
            self.query_global(global_hidden).numpy(),
            self.key_global(hidden_states).numpy(),
            self.value_global(hidden_states).numpy(),
            key_mask,
            num_heads=self.num_heads,
        )
        query, key, value = (layer(hidden_states).numpy() for layer in (self.query, self.key, self.value))
        context = np.zeros_like(query)
        for dilation, heads in self.groups.items():
            columns = np.concatenate([np.arange(self.head_dim) + head * self.head_dim for head in heads])
            context[..., columns] = reference.banded_attention(
                query[..., columns],
                key[..., columns],
                value[..., columns],
                key_mask,
                index,
                global_context[..., columns],
                num_heads=len(heads),
                window=self.one_sided_attn_window_size,
                dilation=dilation,
                causal=self.causal,
            )
        if not output_attentions:
            return (torch.from_numpy(context),)
        options = {"num_heads": self.num_heads}
        window = self.one_sided_attn_window_size
        local = reference.banded_probabilities(query, key, key_mask, index, window=window, **options)
        outputs = (torch.from_numpy(context), torch.from_numpy(local).transpose(1, 2))
        if not is_global.any():
            return outputs
        projected = (self.query_global(global_hidden).numpy(), self.key_global(hidden_states).numpy())
        global_ = reference.global_probabilities(*projected, key_mask, index, **options)
        return (*outputs, torch.from_numpy(global_).transpose(2, 3))


def torch_runner(
    model: nn.Module,
    precision: str = "fp32",
    names: tuple[str, ...] | None = None,
    *,
    by_layer: bool = False,
    attentions: Collection[str] = (),
) -> Runner:
    """Return a function that runs the model in `precision`.

    Args:
        precision: fp32, fp16 or bf16.
        names: the inputs that are passed to `model.forward`; None = all.
        by_layer: add the output of each self-attention to the outputs, named by `layer_name`.
        attentions: names of the attention outputs of a graph, which are added to the outputs.
    """
    return _runner(clone(model, TORCH_DTYPES[precision]), names, by_layer, attentions)


def disturbed_runner(model: nn.Module, names: tuple[str, ...], start: int, amount: float) -> Runner:
    """Return a function that runs the model in float32; hidden states from position `start` on are replaced by noise.

    The hidden states are the output of each LongformerEncoder, or of each self-attention if the model has no encoder.

    Args:
        names: the inputs that are passed to `model.forward`.
        start: first position that is replaced.
        amount: standard deviation of the noise; a negative one negates the noise.
    """

    def overwrite(_: nn.Module, __: Any, outputs: Any) -> Any:
        hidden = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype) * amount
        changed = torch.cat([hidden[:, :start], noise[:, start:]], dim=1)
        if isinstance(outputs, torch.Tensor):
            return changed
        if isinstance(outputs, tuple):
            return (changed, *outputs[1:])
        outputs["last_hidden_state"] = changed
        return outputs

    copied = clone(model, torch.float32)
    encoders = [m for m in copied.modules() if isinstance(m, (hf.LongformerEncoder, led.LEDEncoder))]
    for module in encoders or [m for m in copied.modules() if isinstance(m, SELF_ATTENTION)]:
        module.register_forward_hook(overwrite)
    return _runner(copied, names, by_layer=False)


class _RecordedError(ExportError):
    """Ends a run once the first self-attention has been reached."""


def global_tokens_runner(model: nn.Module, names: tuple[str, ...], *, first_layer: bool = False) -> GlobalTokensRunner:
    """Return a function that runs the model and returns, for each self-attention, which tokens attend globally there.

    Args:
        names: the inputs that are passed to `model.forward`.
        first_layer: stop at the first self-attention, which takes a fraction of the time.
    """
    recorded: list[NDArray[np.bool_]] = []

    def record(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        mask = options["attention_mask"] if "attention_mask" in options else arguments[1]
        recorded.append((mask > 0).numpy().copy())
        if first_layer:
            raise _RecordedError

    copied = clone(model, torch.float32)
    for module in copied.modules():
        if isinstance(module, SELF_ATTENTION):
            module.register_forward_pre_hook(record, with_kwargs=True)
    run = _runner(copied, names, by_layer=False)

    def globals_of(inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[np.bool_]]:
        recorded.clear()
        with contextlib.suppress(_RecordedError):
            run(dict(inputs))
        return list(recorded)

    return globals_of


def autocast_layers(model: nn.Module, names: tuple[str, ...], inputs: Arrays) -> list[str]:
    """Return the names of the linear layers that a run in float32 computes in half precision, under torch.autocast."""
    found: dict[str, None] = {}
    copied = clone(model, torch.float32)
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, __, name=name: found.update({name: None} if torch.is_autocast_enabled("cpu") else {})
            )
    _runner(copied, names, by_layer=False)(inputs)
    return list(found)


def reference_runner(
    model: nn.Module,
    names: tuple[str, ...] | None = None,
    *,
    by_layer: bool = False,
    attentions: Collection[str] = (),
    modules: Collection[str] = (),
) -> Runner:
    """Return a function that runs the model in float64 with dense attention: the reference of `lfx.parity`.

    Args:
        names: the inputs that are passed to `model.forward`; None = all.
        by_layer: add the output of each self-attention to the outputs, named by `layer_name`.
        attentions: names of the attention outputs of a graph, which are added to the outputs.
        modules: names of modules whose outputs (rows, sequence, hidden) are added to the outputs.
    """
    return _runner(dense_model(model), names, by_layer, attentions, modules)


def dense_model(model: nn.Module) -> nn.Module:
    """Copy a model in float64, with dense attention."""
    return replace_attention(clone(model, torch.float64), _DenseSelfAttention)


def int8_runner(
    model: nn.Module,
    quantization: Mapping[str, Any],
    names: tuple[str, ...] | None = None,
    *,
    by_layer: bool = False,
    part: Callable[[Any], nn.Module] = lambda model: model,
    modules: Collection[str] = (),
) -> Runner:
    """Return a function that runs `int8_model`.

    Args:
        quantization: the entry of the int8 bundle's manifest, with the scale and zero point of each layer.
        names: the inputs that are passed to `model.forward`; None = all.
        by_layer: add the output of each self-attention to the outputs, named by `layer_name`.
        part: returns the part of the model that runs.
        modules: names of modules in it whose outputs (rows, sequence, hidden) are added to the outputs.
    Raises:
        ArtifactError: the entry is broken, or names a layer that the model does not have.
    """
    return _runner(part(int8_model(model, quantization)), names, by_layer, modules=modules)


def int8_model(model: nn.Module, quantization: Mapping[str, Any]) -> nn.Module:
    """Copy a model in float32, with the inputs and weights of the int8 layers fake-quantized.

    Args:
        quantization: the entry of the int8 bundle's manifest, with the scale and zero point of each layer.
    Raises:
        ArtifactError: the entry is broken, or names a layer that the model does not have.
    """
    copied = clone(model, torch.float32)
    modules = dict(copied.named_modules())
    try:
        activations, bits = quantization["activations"], quantization["weight_bits"]
        layers = {name: (float(q["scale"]), int(q["zero_point"])) for name, q in quantization["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"the bundle's quantization is broken ({error!r}); quantize the model again") from error
    low, high = (0, 255) if activations == "uint8" else (-128, 127)
    weight_max = 127 if bits == 8 else 64
    for name, (scale, zero_point) in layers.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise ArtifactError(
                f"the bundle has an int8 layer {name!r}, which this model does not have; give the model that it was "
                "exported from"
            )
        if not (0.0 < scale < math.inf and low <= zero_point <= high):
            raise ArtifactError(
                f"the bundle's int8 layer {name!r} has a scale or a zero point out of range; quantize the model again"
            )
        weight = layer.weight.detach()
        scales = (weight.abs().amax(dim=1) / weight_max).clamp(min=torch.finfo(torch.float32).tiny)
        zero_points = torch.zeros(len(scales), dtype=torch.int32)
        quantized = torch.fake_quantize_per_channel_affine(weight, scales, zero_points, 0, -weight_max, weight_max)
        layer.weight = nn.Parameter(quantized, requires_grad=False)
        layer.register_forward_pre_hook(_fake_quantize(scale, zero_point, low, high))
    return copied


def _fake_quantize(scale: float, zero_point: int, low: int, high: int) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero_point, low, high), *inputs[1:])

    return hook


def _record_attentions(model: nn.Module, seqlen: list[int]) -> Attentions:
    """Make each self-attention of a model append its probabilities to a list, which is returned.

    They are Hugging Face's, changed to the layout of the graph: its global probabilities are cut to the sequence, since
    they include the padding to a multiple of the window; its unused slots, which are uniform, become 0; and where it
    returns no global probabilities, for lack of global tokens, an empty array stands for them.

    Args:
        seqlen: a list whose last entry is the length of the sequence at the time of the call.
    """
    layers: Attentions = []
    asked: list[bool] = []  # whether the caller reads the probabilities, as a model does whose config asks for them

    def set_output_attentions(
        _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        asked.append(bool(options.get("output_attentions") or any(arguments[5:])))
        return arguments[:5], {**options, "output_attentions": True}

    def record(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], outputs: Any) -> Any:
        if not isinstance(outputs, tuple) or len(outputs) < 2:
            raise ExportError(
                f"{type(module).__name__} returns no attention probabilities; leave output_attentions out"
            )
        mask = options["attention_mask"] if "attention_mask" in options else arguments[1]
        counts = (mask > 0).sum(dim=1)
        local = outputs[1].transpose(1, 2)[:, :, : seqlen[-1]]
        shape = (*local.shape[:3], int(counts.max()))
        global_ = outputs[2].transpose(2, 3)[:, :, : seqlen[-1]] if len(outputs) > 2 else local.new_zeros(shape)
        used = torch.arange(shape[-1]) < counts[:, None]
        layers.append((local, torch.where(used[:, None, None, :], global_, 0.0)))
        return outputs if asked.pop() else outputs[:1]

    for module in model.modules():
        if isinstance(module, SELF_ATTENTION):
            module.register_forward_pre_hook(set_output_attentions, with_kwargs=True)
            module.register_forward_hook(record, with_kwargs=True)
    return layers


def _named(layers: Attentions, names: Collection[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in named_attentions(layers).items() if name in names}


def _runner(
    model: nn.Module,
    names: tuple[str, ...] | None,
    by_layer: bool,
    attentions: Collection[str] = (),
    modules: Collection[str] = (),
) -> Runner:
    contexts: list[torch.Tensor] = []
    module_outputs: dict[str, torch.Tensor] = {}
    lengths = [0]
    layers = _record_attentions(model, lengths) if attentions else []
    for module in model.modules() if by_layer else ():
        if isinstance(module, SELF_ATTENTION):
            module.register_forward_hook(lambda _, __, outputs: contexts.append(outputs[0]))
    for name in modules:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: module_outputs.update({name: out})
        )

    def run(inputs: Arrays) -> Arrays:
        contexts.clear()
        module_outputs.clear()
        layers.clear()
        seqlen = lengths[-1] = inputs["input_ids"].shape[-1]  # Hugging Face pads to a multiple of the window
        tensors = {k: torch.from_numpy(v) for k, v in inputs.items() if names is None or k in names}
        try:
            with torch.inference_mode(), torch.autocast("cpu", enabled=False), quiet():
                outputs = named_outputs(model(**tensors))
        except ExportError:
            raise
        except Exception as error:
            shape = tuple(inputs["input_ids"].shape)
            raise ExportError(f"the PyTorch model itself fails on ids of shape {shape}: {one_line(error)}") from error
        outputs = {
            **{layer_name(i): c[:, :seqlen] for i, c in enumerate(contexts)},
            **{name: out[:, :seqlen] for name, out in module_outputs.items()},
            **outputs,
            **_named(layers, attentions),
        }
        return {name: (out.double() if out.is_floating_point() else out).numpy() for name, out in outputs.items()}

    return run
