"""The float64 reference for some output rows of a LongformerModel, on sequences too long for the dense reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lfx.export.rewrite import clone
from lfx.export.torch_runners import _DenseSelfAttention as DenseSelfAttention
from lfx.export.unpadded import replace_attention
from lfx.parity import Arrays, Case, compare

OUTPUT = "last_hidden_state"


def reference_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model in float64, with dense attention."""
    return replace_attention(clone(model, torch.float64), DenseSelfAttention)


@torch.inference_mode()
def slice_rows(model: Any, ids: Any, rows: range) -> Arrays:
    """Run a LongformerModel without global tokens on the tokens that `rows` of its output depend on.

    After each layer, the tokens that the remaining layers do not need are dropped.

    Args:
        model: a model with one window for all layers: the result of `reference_of`, or Hugging Face's model.
        ids: (1, seqlen), none of them padding.
    Returns:
        These rows of the output.
    """
    window, layers = model.encoder.layer[0].attention.self.one_sided_attn_window_size, model.encoder.layer

    def tokens(reach: int) -> range:
        return range(max(rows.start - reach, 0), min(rows.stop + reach, ids.shape[1]))

    seen = tokens(len(layers) * window)
    positions = torch.arange(seen.start, seen.stop)[None] + model.embeddings.padding_idx + 1
    hidden = model.embeddings(torch.from_numpy(ids[:, seen.start : seen.stop]), position_ids=positions)
    for remaining, layer in zip(reversed(range(len(layers))), layers, strict=True):
        needed = tokens(remaining * window)
        hidden = _run_layer(layer, hidden)[:, needed.start - seen.start : needed.stop - seen.start]
        seen = needed
    return {OUTPUT: hidden.numpy()}


def _run_layer(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Run one layer on (1, seqlen, hidden), padded to a multiple of the two-sided window for Hugging Face's code."""
    seqlen = hidden.shape[1]
    padding = -seqlen % (2 * layer.attention.self.one_sided_attn_window_size)
    mask = torch.zeros(1, seqlen + padding, dtype=hidden.dtype)
    mask[:, seqlen:] = -10000.0
    flags = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": False}
    outputs = layer(nn.functional.pad(hidden, (0, 0, 0, padding)), attention_mask=mask, **flags)
    return outputs[0][:, :seqlen]


@torch.inference_mode()
def layer_rows(model: Any, ids: Any, global_positions: Any, rows: Any, dtype: torch.dtype) -> Arrays:
    """Compute `rows` of the output of a LongformerModel of one layer, each from the whole sequence.

    Args:
        model: a model of one layer; it is converted to `dtype` in place.
        ids: (1, seqlen), none of them padding.
        global_positions, rows: indices of tokens, ascending.
    """
    model = model.to(dtype)
    layer, hidden = model.encoder.layer[0], model.embeddings(input_ids=torch.from_numpy(ids))
    attention = layer.attention.self
    is_global = np.zeros(ids.shape[1], dtype=bool)
    is_global[global_positions] = True
    distance = np.abs(rows[:, None] - np.arange(ids.shape[1]))
    visible = (distance <= attention.one_sided_attn_window_size) | is_global
    visible[is_global[rows]] = True
    context = hidden.new_empty(len(rows), attention.embed_dim)
    for selected, suffix in ((~is_global[rows], ""), (is_global[rows], "_global")):
        query, key, value = (getattr(attention, name + suffix) for name in ("query", "key", "value"))
        projected = (query(hidden[:, rows[selected]]), key(hidden), value(hidden))
        mask = torch.from_numpy(visible[selected])
        for head in range(attention.num_heads):
            columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            q, k, v = (x[0, :, columns] for x in projected)
            scores = (q @ k.T * attention.head_dim**-0.5).masked_fill(~mask, -torch.inf)
            context[torch.from_numpy(selected), columns] = scores.softmax(dim=-1) @ v
    states = layer.attention.output(context[None], hidden[:, rows])
    return {OUTPUT: layer.output(layer.intermediate(states), states).numpy()}


def compare_rows(reference: Arrays, witness: Arrays, actual: Any, layers: int) -> dict[str, Any]:
    """Compare rows of the output; returns the fields of a check in docs/records/long.jsonl."""
    report = compare(
        [Case(1, actual.shape[1])],
        lambda case: {},
        reference=lambda _: reference,
        witness=lambda _: witness,
        candidate=lambda _: {OUTPUT: actual},
        precision="fp32",
        layers=layers,
    )
    result = report.outputs[OUTPUT]
    return {
        "rows": actual.shape[1],
        "error": result.error,
        "witness_error": result.witness_error,
        "tolerance": report.tolerance(OUTPUT),
        "passed": report.passed(OUTPUT),
    }
