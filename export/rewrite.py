"""`rewrite`: copy a torch model, sharing its weights, and replace its Longformer self-attention by the lfx ops.

torch.onnx traces the copy. The modules keep their names and parameters; these classes are replaced:

    LongformerSelfAttention, LEDEncoderSelfAttention -> _SelfAttention
        three projections, the global context, lfx::BandedAttention
    LongformerEncoder, LEDEncoder, LEDEncoderLayer -> those of unpadded
        no `.item()`, no padding to a multiple of the window and no removal of it
    LEDModel, LEDDecoder -> those of led
        no branch on the number of tokens, and no cache
    LongformerModel -> unpadded.LongformerModel
        no padding to a multiple of the window, no 4-D mask

The heads of one dilation are one node of BandedAttention.

A user's subclass of such a class is replaced by a subclass of both, the user's first in the method resolution order,
so that its own `forward` and the `super()` calls in it still work.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.onnx import ops
from transformers.modeling_outputs import ModelOutput
from transformers.models.led import modeling_led as led
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError
from lfx.export.functions import DOMAIN, VERSION
from lfx.export.led import GenerationEncoder, LEDDecoder, LEDModel
from lfx.export.loop_attention import LoopSelfAttention
from lfx.export.unpadded import SELF_ATTENTION, replace_attention, replace_classes
from lfx.export.windows import both_sides
from lfx.signature import ATTENTIONS, GLOBAL_ATTENTIONS
from lfx.torch.attention import is_plain

# Local and global probabilities of each self-attention, in the order of the calls; the second is None without globals.
Attentions = list[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class GlobalTokens:
    """The rule for global tokens in the graph, and the cached indices of the current mask.

    Attributes:
        mode: "mask" reads the graph input, "first" takes the first token of each row, "none" has no global tokens.
        max_slots: the constant number of slots G; None = the largest count in the batch, at least 1.
    """

    mode: str = "mask"
    max_slots: int | None = None
    _mask: torch.Tensor | None = field(default=None, repr=False)
    _cached: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)

    def indices(self, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split a Hugging Face mask into key mask and global indices; computed once for all layers with the same mask.

        Args:
            attention_mask: (B, S), < 0 masked, 0 local, > 0 global.
        Returns:
            key_mask (B, S) int32, 1 = real token; global_index (B, G) int32, unused slots -1; and the same index
            for GatherND, (B, G, 1) int64, unused slots 0.
        """
        if self._mask is not attention_mask or self._cached is None:
            key_mask = (attention_mask >= 0).to(torch.int32)
            index = self._global_index(attention_mask > 0)
            gather_index = torch.clamp(index, min=0).to(torch.int64).unsqueeze(-1)
            self._mask, self._cached = attention_mask, (key_mask, index, gather_index)
        return self._cached

    def _global_index(self, is_global: torch.Tensor) -> torch.Tensor:
        batch, seqlen = is_global.shape
        if self.mode == "none":
            return torch.full((batch, 1), -1, dtype=torch.int32)
        if self.mode == "first":
            return is_global[:, :1].to(torch.int32) - 1
        # TopK over 0 and 1 lists the global tokens by position: for equal values, the lower index comes first.
        flags = is_global.to(torch.int32)
        if self.max_slots is None:
            slots = torch.clamp(flags.sum(dim=1).max(), min=1).item()
            torch._check(slots >= 1)  # type: ignore[no-untyped-call]
            torch._check(slots <= seqlen)  # type: ignore[no-untyped-call]
        else:
            slots = self.max_slots
            flags = nn.functional.pad(flags, (0, slots))  # TopK allows no K above the axis length
        top = torch.topk(flags, slots, dim=1)  # type: ignore[arg-type]
        return torch.where(top.values > 0, top.indices.to(torch.int32), -1)


def _op(
    name: str, inputs: list[torch.Tensor], shape: Any, *, dtype: torch.dtype | None = None, **attributes: int | float
) -> torch.Tensor:
    """Add a node of domain lfx to the trace; `dtype` is the output's, None = that of the first input."""
    dtype = inputs[0].dtype if dtype is None else dtype
    return ops.symbolic(f"{DOMAIN}::{name}", inputs, {**attributes}, dtype=dtype, shape=shape, version=VERSION)


class _SelfAttention(LoopSelfAttention):
    lfx_globals: GlobalTokens
    lfx_attentions: Attentions | None = None  # None = the probabilities are not computed

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_index_masked: torch.Tensor | None = None,
        is_index_global_attn: torch.Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor]:
        if output_attentions:
            raise ExportError(
                "output_attentions is set in a call; leave it out, and export with output_attentions=True"
            )
        if attention_mask is None:
            raise ExportError("LongformerSelfAttention was called without attention_mask; pass (batch, seqlen)")
        key_mask, index, gather_index = self.lfx_globals.indices(attention_mask)
        batch, slots = index.shape
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        global_query = None
        if self.lfx_globals.mode == "none":
            global_context = hidden_states.new_zeros((batch, 1, self.embed_dim))
        else:
            global_hidden = ops.symbolic(
                "GatherND",
                (hidden_states, gather_index),
                {"batch_dims": 1},
                dtype=hidden_states.dtype,
                shape=(batch, slots, hidden_states.shape[2]),
                version=13,
            )
            global_query = self.query_global(global_hidden)
            global_context = self._global_context(global_query, hidden_states, key_mask)
        if self.lfx_attentions is not None:
            global_key = None if global_query is None else self.key_global(hidden_states)
            self.lfx_attentions.append(self._probabilities(query, key, global_query, global_key, key_mask, index))
        contexts = {}
        for dilation, heads in self.groups.items():
            inputs = [self._columns(x, heads) for x in (query, key, value, global_context)]
            contexts[dilation] = _op(
                "BandedAttention",
                [*inputs[:3], key_mask, index, inputs[3]],
                inputs[0].shape,
                num_heads=len(heads),
                window=int(self.one_sided_attn_window_size),
                dilation=dilation,
                causal=int(self.causal),
                scale=self.head_dim**-0.5,
            )
        return (self._in_head_order(contexts),)

    def _probabilities(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        global_query: torch.Tensor | None,
        global_key: torch.Tensor | None,
        key_mask: torch.Tensor,
        index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the nodes of the probabilities; returns the local and the global ones, None without global attention."""
        (batch, seqlen), slots, window = key_mask.shape, index.shape[1], int(self.one_sided_attn_window_size)
        attributes = {"num_heads": self.num_heads, "scale": self.head_dim**-0.5}
        local = _op(
            "BandedAttentionProbabilities",
            [query, key, key_mask, index],
            (batch, self.num_heads, seqlen, slots + both_sides(window) + 1),
            dtype=torch.float32,
            window=window,
            **attributes,
        )
        if global_query is None or global_key is None:
            return local, None
        inputs, shape = [global_query, global_key, key_mask, index], (batch, self.num_heads, seqlen, slots)
        return local, _op("GlobalAttentionProbabilities", inputs, shape, dtype=torch.float32, **attributes)

    def _in_head_order(self, contexts: dict[int, torch.Tensor]) -> torch.Tensor:
        """Join the contexts (B, S, h·D) of the groups of heads, by dilation, to (B, S, H·D)."""
        dilations = {head: dilation for dilation, heads in self.groups.items() for head in heads}
        parts = []
        for dilation, run in itertools.groupby(range(self.num_heads), key=dilations.__getitem__):
            columns = [self.groups[dilation].index(head) for head in run]
            parts.append(self._columns(contexts[dilation], columns))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _columns(self, tensor: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """Return the columns (B, S, len(heads)·D) of some heads, in ascending order, of a tensor (B, S, h·D)."""
        if tensor.shape[-1] == len(heads) * self.head_dim:
            return tensor
        slices = [tensor[..., first * self.head_dim : end * self.head_dim] for first, end in _ranges(heads)]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=-1)

    def _global_context(self, query: torch.Tensor, hidden_states: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
        """Compute the context of the global tokens.

        Args:
            query: (B, G, H·D), their projected queries.
        Returns:
            (B, G, H·D).
        """
        projections = (self.key_global, self.value_global)
        if all(map(is_plain, projections)):
            op = self._global_context_op()
            inputs = [query, hidden_states, key_mask, *(t for p in projections for t in (p.weight, p.bias))]
        else:  # an adapter's projection is more than its weight and bias, so the module is called
            op = "GlobalAttention"
            inputs = [query, *(p(hidden_states) for p in projections), key_mask]
        shape = (*query.shape[:2], self.embed_dim)
        return _op(op, inputs, shape, num_heads=self.num_heads, scale=self.head_dim**-0.5)

    def _global_context_op(self) -> str:
        slots = 1 if self.lfx_globals.mode == "first" else self.lfx_globals.max_slots
        if slots is None:
            return "GlobalContext"
        return "FoldedGlobalContext" if slots < self.head_dim else "ProjectedGlobalContext"


def _ranges(heads: list[int]) -> list[tuple[int, int]]:
    """Join ascending head numbers into ranges: [0, 1, 4] becomes [(0, 2), (4, 5)]."""
    ranges: list[tuple[int, int]] = []
    for head in heads:
        if ranges and ranges[-1][1] == head:
            ranges[-1] = (ranges[-1][0], head + 1)
        else:
            ranges.append((head, head + 1))
    return ranges


def attention_windows(model: nn.Module) -> list[int]:
    """Return how far each Longformer self-attention sees on one side, in tokens, in module order.

    It is the one-sided window times the largest dilation of its heads.
    """
    return [
        m.reach if isinstance(m, LoopSelfAttention) else int(m.one_sided_attn_window_size)
        for m in model.modules()
        if isinstance(m, SELF_ATTENTION)
    ]


def attention_layers(model: nn.Module) -> int:
    """Return the number of attentions that the outputs of a model depend on, one after the other, decoders included."""
    decoders = (
        [] if isinstance(model, GenerationEncoder) else [m for m in model.modules() if isinstance(m, led.LEDDecoder)]
    )
    return len(attention_windows(model)) + sum(2 * len(decoder.layers) for decoder in decoders)


def chunked_attention(model: nn.Module) -> list[hf.LongformerSelfAttention]:
    """Return the self-attention modules with Hugging Face's chunks, which take multiples of the window only."""
    return [m for m in model.modules() if isinstance(m, SELF_ATTENTION) and not isinstance(m, LoopSelfAttention)]


def is_causal(model: nn.Module) -> bool:
    """Return whether no window of any layer has keys after the query."""
    layers = [m for m in model.modules() if isinstance(m, SELF_ATTENTION)]
    return bool(layers) and all(isinstance(m, LoopSelfAttention) and m.causal for m in layers)


def clone(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy the modules and buffers of `model`, in eval mode; the parameters are shared.

    Floating-point parameters of another dtype than `dtype` are converted. In other attributes dicts, lists, sets and
    tuples are copied, and modules, parameters, buffers and methods in them are those of the copy; copy.deepcopy would
    fail on modules with attributes that cannot be pickled, such as rotary_embedding_torch's.
    """
    parameters: dict[int, nn.Parameter] = {}
    modules: dict[int, nn.Module] = {}
    copies: dict[int, Any] = {}  # of tensors that are no parameters, and of containers

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    def parameter(original: nn.Parameter) -> nn.Parameter:
        if id(original) not in parameters:
            same = not original.is_floating_point() or original.dtype == dtype
            if original.is_inference():  # torch.export does not accept inference tensors
                parameters[id(original)] = nn.Parameter(convert(original).clone(), requires_grad=False)
            else:
                parameters[id(original)] = original if same else nn.Parameter(convert(original), requires_grad=False)
        return parameters[id(original)]

    def module(original: nn.Module) -> nn.Module:
        if id(original) in modules:
            return modules[id(original)]
        cls = type(original)
        new: nn.Module = object.__new__(cls)  # without the arguments that a __new__ of the class may need
        modules[id(original)] = new
        new.__dict__.update(vars(original))
        for name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = copy.copy(new.__dict__[name])
        new.__dict__["training"] = False
        new.__dict__["_compiled_call_impl"] = None  # of module.compile(), which would call the original
        if "chunk_size_feed_forward" in new.__dict__:
            new.__dict__["chunk_size_feed_forward"] = 0  # chunking needs a length that is a multiple of the chunk size
        for name, weight in original._parameters.items():
            new._parameters[name] = None if weight is None else parameter(weight)
        for name, buffer in original._buffers.items():
            new._buffers[name] = None if buffer is None else copies.setdefault(id(buffer), convert(buffer).clone())
        for name, child in original._modules.items():
            new._modules[name] = None if child is None else module(child)
        return new

    def attribute(value: Any) -> Any:
        """Copy the containers in an attribute, and replace what it reaches of the original model by its copy."""
        if isinstance(value, nn.Module):
            return modules.get(id(value), value)
        if isinstance(value, nn.Parameter):
            return parameters.get(id(value), value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, attribute(value.__self__))
        if id(value) in copies:
            return copies[id(value)]
        if type(value) is torch.Tensor and dtype == torch.float64:
            # In half precision, a tensor that is no buffer may be meant to stay in float32.
            copies[id(value)] = convert(value)
        elif type(value) is tuple:
            copies[id(value)] = tuple(map(attribute, value))
        elif isinstance(value, tuple) and hasattr(value, "_make"):  # a named tuple
            copies[id(value)] = value._make(map(attribute, value))
        elif isinstance(value, set):
            changed = copies[id(value)] = copy.copy(value)  # before its items, which may reach it
            changed.clear()
            changed.update(map(attribute, value))
        elif isinstance(value, (dict, list)):
            container = copies[id(value)] = copy.copy(value)
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if (replaced := attribute(item)) is not item:
                    container[key] = replaced
        return copies.get(id(value), value)

    copied = module(model)
    for new in modules.values():
        for name, value in vars(new).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                new.__dict__[name] = attribute(value)
    return copied


def rewrite(
    model: nn.Module, tokens: GlobalTokens, dtype: torch.dtype, attentions: Attentions | None = None
) -> nn.Module:
    """Copy `model` and replace its self-attention by the lfx ops, for torch.onnx to trace; `model` is not changed.

    Args:
        attentions: a list that each self-attention appends its probabilities to; None = they are not computed.
    """
    rewritten = replace_attention(clone(model, dtype), _SelfAttention)
    replace_classes(rewritten, {led.LEDModel: LEDModel, led.LEDDecoder: LEDDecoder})
    for module in rewritten.modules():
        if isinstance(module, _SelfAttention):
            module.lfx_globals, module.lfx_attentions = tokens, attentions
    return rewritten


class ExportWrapper(nn.Module):
    """Calls a rewritten model with the graph's inputs and returns its outputs as a flat dict.

    Args:
        model: from `rewrite`.
        inputs: names of the graph inputs, a subset of the parameters of `model.forward`.
        tokens: the GlobalTokens that were given to `rewrite`.
        takes_global_mask: whether `model.forward` has the parameter global_attention_mask.
        attentions: the list that was given to `rewrite`, whose tensors become outputs; None = no attention outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: list[str],
        tokens: GlobalTokens,
        takes_global_mask: bool,
        attentions: Attentions | None = None,
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.tokens, self.takes_global_mask = model, inputs, tokens, takes_global_mask
        self.attentions = attentions

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        arguments = dict(zip(self.inputs, tensors, strict=True))
        if self.takes_global_mask and "global_attention_mask" not in arguments:
            # The model's default for its task would override "first" and "none".
            mask = torch.zeros_like(arguments["input_ids"])
            if self.tokens.mode == "first":
                mask = torch.cat([torch.ones_like(mask[..., :1]), mask[..., 1:]], dim=-1)
            arguments["global_attention_mask"] = mask
        if self.attentions is not None:
            self.attentions.clear()
        outputs = named_outputs(self.model(**arguments))
        # Outputs are float32 in any precision: numpy has no bfloat16, and float16 would round once more.
        half_outputs = getattr(self.model, "half_outputs", ())
        outputs = {
            name: out.float()
            if out.is_floating_point() and out.dtype != torch.float32 and name not in half_outputs
            else out
            for name, out in outputs.items()
        }
        if self.attentions is None:
            return outputs
        named = named_attentions(self.attentions)
        if taken := named.keys() & outputs.keys():
            raise ExportError(
                f"the model has an output {min(taken)!r} of its own; rename it, or leave output_attentions out"
            )
        return {**outputs, **named}


def named_attentions(layers: Attentions) -> dict[str, torch.Tensor]:
    """Name the probabilities of all layers: `attentions.0`, …, then `global_attentions.0`, …."""
    local = {f"{ATTENTIONS}.{i}": probabilities for i, (probabilities, _) in enumerate(layers)}
    return {**local, **{f"{GLOBAL_ATTENTIONS}.{i}": p for i, (_, p) in enumerate(layers) if p is not None}}


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """Name a model's outputs: by the keys of a ModelOutput or dict, `output` for a tensor, `output_i` for a tuple.

    Raises:
        ExportError: an output has no name, is no tensor, or is complex; or there is none.
    """
    if isinstance(outputs, torch.Tensor):
        named = {"output": outputs}
    elif isinstance(outputs, (ModelOutput, Mapping)):
        named = dict(outputs.items())
    elif isinstance(outputs, (tuple, list)):
        named = {f"output_{i}": item for i, item in enumerate(outputs)}
    else:
        raise ExportError(f"the model returns {type(outputs).__name__}; return a tensor, a tuple or a dict of tensors")
    if not isinstance(outputs, ModelOutput):  # a ModelOutput may hold tuples such as hidden_states, which are left out
        for name, item in named.items():
            if not isinstance(name, str) or not name:
                raise ExportError(
                    f"the model names an output {name!r}; give each output a non-empty string as its name"
                )
            if item is not None and not isinstance(item, torch.Tensor):
                raise ExportError(f"output {name} is {type(item).__name__}; return tensors, not nested")
    tensors = {name: item for name, item in named.items() if isinstance(item, torch.Tensor)}
    if not tensors:
        raise ExportError("the model returns no tensor; return a tensor, a tuple or a dict of tensors")
    for name, item in tensors.items():
        if item.is_complex():
            raise ExportError(
                f"output {name} is {item.dtype}, which no runtime supports; return torch.view_as_real of it"
            )
    return tensors
