"""A copy of a torch model, sharing its weights, in which Longformer self-attention is the lfx ops.

The copy exists to be traced by torch.onnx. Its modules keep their names and parameters; only classes change:

    LongformerSelfAttention -> _SelfAttention   three projections, the global rows, one lfx::BandedAttention
    LongformerEncoder       -> _Encoder         no `.item()`, no padding to undo
    LongformerModel         -> _Model           no padding to a multiple of the window, no 4-D mask

A user's subclass of one of these stays in front of the replacement, so that its own `forward` and the `super()`
calls in it go on working.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.onnx import ops
from transformers.modeling_outputs import ModelOutput
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError
from lfx.export.functions import DOMAIN, VERSION


@dataclass
class GlobalTokens:
    """How the graph finds its global tokens, and what it found for the mask at hand.

    Attributes:
        mode: "mask" takes them from the graph input, "first" is the first token of each row, "none" is none.
        max_slots: the constant number of slots G; None = as many as the row with the most has, at least 1.
    """

    mode: str = "mask"
    max_slots: int | None = None
    _mask: torch.Tensor | None = field(default=None, repr=False)
    _found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)

    def find(self, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key mask and global tokens of a Hugging Face mask; computed once for all layers that get the same mask.

        Args:
            attention_mask: (B, S), < 0 masked, 0 local, > 0 global.
        Returns:
            key_mask (B, S) int32, 1 = real token; global_index (B, G) int32, unused slots -1; and the same index
            for GatherND, (B, G, 1) int64, unused slots 0.
        """
        if self._mask is not attention_mask or self._found is None:
            key_mask = (attention_mask >= 0).to(torch.int32)
            index = self._index(attention_mask > 0)
            gather_at = torch.clamp(index, min=0).to(torch.int64).unsqueeze(-1)
            self._mask, self._found = attention_mask, (key_mask, index, gather_at)
        return self._found

    def _index(self, is_global: torch.Tensor) -> torch.Tensor:
        batch, seqlen = is_global.shape
        if self.mode == "none":
            return torch.full((batch, 1), -1, dtype=torch.int32)
        if self.mode == "first":
            return is_global[:, :1].to(torch.int32) - 1
        # TopK of 0 and 1 lists the global tokens by position: of equal values the earlier comes first.
        flags = is_global.to(torch.int32)
        if self.max_slots is None:
            slots = torch.clamp(flags.sum(dim=1).max(), min=1).item()
            torch._check(slots >= 1)  # type: ignore[no-untyped-call]
            torch._check(slots <= seqlen)  # type: ignore[no-untyped-call]
        else:
            slots = self.max_slots
            flags = nn.functional.pad(flags, (0, slots))  # TopK takes no K above the length of its input
        top = torch.topk(flags, slots, dim=1)  # type: ignore[arg-type]
        return torch.where(top.values > 0, top.indices.to(torch.int32), -1)


def _op(name: str, inputs: list[torch.Tensor], shape: Any, **attributes: int | float) -> torch.Tensor:
    return ops.symbolic(
        f"{DOMAIN}::{name}", inputs, {**attributes}, dtype=inputs[0].dtype, shape=shape, version=VERSION
    )


class _SelfAttention(hf.LongformerSelfAttention):  # type: ignore[misc]
    lfx_globals: GlobalTokens

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
            raise ExportError("attention weights are never computed in full; export without output_attentions")
        if attention_mask is None:
            raise ExportError("LongformerSelfAttention was called without attention_mask; pass (batch, seqlen)")
        key_mask, index, gather_at = self.lfx_globals.find(attention_mask)
        batch, slots = index.shape
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        scale = self.head_dim**-0.5
        if self.lfx_globals.mode == "none":
            rows = hidden_states.new_zeros((batch, 1, self.embed_dim))
        else:
            chosen = ops.symbolic(
                "GatherND",
                (hidden_states, gather_at),
                {"batch_dims": 1},
                dtype=hidden_states.dtype,
                shape=(batch, slots, hidden_states.shape[2]),
                version=13,
            )
            query_rows = self.query_global(chosen)
            projections = (self.key_global, self.value_global)
            if all(map(_is_plain, projections)):
                form = self._rows_form()
                inputs = [query_rows, hidden_states, key_mask]
                inputs += [tensor for p in projections for tensor in (p.weight, p.bias)]
            else:  # a projection that is more than its weight and bias, as an adapter's, is called as it is
                form = "GlobalAttention"
                inputs = [query_rows, *(p(hidden_states) for p in projections), key_mask]
            rows = _op(form, inputs, (batch, slots, self.embed_dim), num_heads=self.num_heads, scale=scale)
        context = _op(
            "BandedAttention",
            [query, key, value, key_mask, index, rows],
            query.shape,
            num_heads=self.num_heads,
            window=self.one_sided_attn_window_size,
            dilation=1,
            causal=0,
            scale=scale,
        )
        return (context,)

    def _rows_form(self) -> str:
        slots = 1 if self.lfx_globals.mode == "first" else self.lfx_globals.max_slots
        if slots is None:
            return "GlobalContext"
        return "FoldedGlobalContext" if slots < self.head_dim else "ProjectedGlobalContext"


class _Encoder(hf.LongformerEncoder):  # type: ignore[misc]
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_len: int = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        states = [hidden_states]
        for layer in self.layer:
            states.append(layer(states[-1], attention_mask=attention_mask, output_attentions=output_attentions)[0])
        every = tuple(states) if output_hidden_states else None
        if not return_dict:
            return tuple(item for item in (states[-1], every) if item is not None)
        return hf.LongformerBaseModelOutput(last_hidden_state=states[-1], hidden_states=every)


class _Model(hf.LongformerModel):  # type: ignore[misc]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        embedded = self.embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        )
        if attention_mask is None:
            attention_mask = torch.ones(embedded.shape[:2], dtype=torch.int64)
        if global_attention_mask is None:
            global_attention_mask = torch.zeros_like(attention_mask)
        merged = self._merge_to_attention_mask(attention_mask, global_attention_mask) - 1
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        encoded = self.encoder(
            embedded,
            attention_mask=merged,
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(
                output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
            ),
            return_dict=return_dict,
        )
        pooled = self.pooler(encoded[0]) if self.pooler is not None else None
        if not return_dict:
            return (encoded[0], pooled, *encoded[1:])
        return hf.LongformerBaseModelOutputWithPooling(
            last_hidden_state=encoded[0], pooler_output=pooled, hidden_states=encoded.hidden_states
        )


def _is_plain(projection: nn.Module) -> bool:
    """Whether a projection is its weight and bias, and nothing else."""
    hooks = projection._forward_hooks or projection._forward_pre_hooks
    return type(projection) is nn.Linear and projection.bias is not None and not hooks


def attention_windows(model: nn.Module) -> list[int]:
    """One-sided windows of all Longformer self-attention modules, in module order."""
    return [m.one_sided_attn_window_size for m in model.modules() if isinstance(m, hf.LongformerSelfAttention)]


def clone(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in eval mode: modules and buffers of its own, the same parameters.

    Parameters of another float type than `dtype` are converted. Other attributes are copied one level deep, and not
    with copy.deepcopy: users' modules hold what cannot be pickled (rotary_embedding_torch, for one).
    """
    parameters: dict[int, nn.Parameter] = {}
    modules: dict[int, nn.Module] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    def parameter(original: nn.Parameter) -> nn.Parameter:
        if id(original) not in parameters:
            same = not original.is_floating_point() or original.dtype == dtype
            parameters[id(original)] = original if same else nn.Parameter(convert(original), requires_grad=False)
        return parameters[id(original)]

    def module(original: nn.Module) -> nn.Module:
        if id(original) in modules:
            return modules[id(original)]
        cls = type(original)
        made: nn.Module = cls.__new__(cls)
        modules[id(original)] = made
        for name, value in vars(original).items():
            made.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
        made.__dict__["training"] = False
        if "chunk_size_feed_forward" in made.__dict__:
            made.__dict__["chunk_size_feed_forward"] = 0  # the same numbers, and no length that must be a multiple
        for name, weight in original._parameters.items():
            made._parameters[name] = None if weight is None else parameter(weight)
        for name, buffer in original._buffers.items():
            made._buffers[name] = None if buffer is None else convert(buffer).clone()
        for name, child in original._modules.items():
            made._modules[name] = None if child is None else module(child)
        return made

    copied = module(model)
    for made in modules.values():
        for name, value in vars(made).items():
            # A method that was set on an instance goes with the copy of its instance.
            if isinstance(value, MethodType) and id(value.__self__) in modules:
                made.__dict__[name] = MethodType(value.__func__, modules[id(value.__self__)])
    return copied


def replace_attention(model: nn.Module, attention: type[hf.LongformerSelfAttention]) -> nn.Module:
    """Change the classes of the Longformer modules in `model`, in place; `attention` replaces the self-attention."""
    replacements: dict[type[nn.Module], type[nn.Module]] = {
        hf.LongformerSelfAttention: attention,
        hf.LongformerEncoder: _Encoder,
        hf.LongformerModel: _Model,
    }
    for module in model.modules():
        for original, replacement in replacements.items():
            if isinstance(module, original):
                cls = type(module)
                module.__class__ = replacement if cls is original else type(cls.__name__, (cls, replacement), {})
    return model


def rewrite(model: nn.Module, tokens: GlobalTokens, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` that attends through the lfx ops, for torch.onnx to trace; `model` is not touched."""
    rewritten = replace_attention(clone(model, dtype), _SelfAttention)
    for module in rewritten.modules():
        if isinstance(module, _SelfAttention):
            module.lfx_globals = tokens
    return rewritten


class ExportWrapper(nn.Module):
    """Calls a rewritten model with the graph's inputs and returns its outputs as a flat dict.

    Args:
        model: from `rewrite`.
        inputs: names of the graph inputs, a subset of what `model.forward` takes.
        tokens: shared with the model.
        passes_global: whether `model.forward` takes global_attention_mask.
    """

    def __init__(self, model: nn.Module, inputs: list[str], tokens: GlobalTokens, passes_global: bool) -> None:
        super().__init__()
        self.model, self.inputs, self.tokens, self.passes_global = model, inputs, tokens, passes_global

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        arguments = dict(zip(self.inputs, tensors, strict=True))
        if self.passes_global and "global_attention_mask" not in arguments:
            # "first" and "none" are decided here, and not by the model's own default for its task.
            mask = torch.zeros_like(arguments["input_ids"])
            if self.tokens.mode == "first":
                mask = torch.cat([torch.ones_like(mask[..., :1]), mask[..., 1:]], dim=-1)
            arguments["global_attention_mask"] = mask
        outputs = named_outputs(self.model(**arguments))
        # numpy has no bfloat16, and a caller has no use for rounding once more: outputs are float32 in any precision.
        return {name: out.float() if out.is_floating_point() else out for name, out in outputs.items()}


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """A model's outputs by name: those of a ModelOutput or dict, `output` for one tensor, `output_i` for a tuple."""
    if isinstance(outputs, torch.Tensor):
        named = {"output": outputs}
    elif isinstance(outputs, (ModelOutput, Mapping)):
        named = dict(outputs.items())
    elif isinstance(outputs, (tuple, list)):
        named = {f"output_{i}": item for i, item in enumerate(outputs)}
    else:
        raise ExportError(f"the model returns {type(outputs).__name__}; return a tensor, a tuple or a dict of tensors")
    if not isinstance(outputs, ModelOutput):  # of these, tuples such as hidden_states are left out
        for name, item in named.items():
            if not isinstance(name, str) or not name:
                raise ExportError(f"the model names an output {name!r}; give every output a name of letters")
            if item is not None and not isinstance(item, torch.Tensor):
                raise ExportError(f"output {name} is {type(item).__name__}; return tensors, not nested")
    found = {name: item for name, item in named.items() if isinstance(item, torch.Tensor)}
    if not found:
        raise ExportError("the model returns no tensor")
    for name, item in found.items():
        if item.is_complex():
            raise ExportError(f"output {name} is {item.dtype}, which no runtime has; return torch.view_as_real of it")
    return found
