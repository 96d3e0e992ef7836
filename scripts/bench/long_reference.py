"""The reference of chosen rows of the output of a LongformerModel on a sequence that is too long for the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lfx.parity import Arrays, Case, Runner, compare

OUTPUT = "last_hidden_state"


def slice_rows(make_runner: Callable[[nn.Module], Runner], model: Any, ids: Any, rows: range, reach: int) -> Arrays:
    """Run a model without global tokens on the tokens that `rows` of its output depend on; returns these rows.

    Args:
        make_runner: makes a function from inputs to outputs of a module, such as `reference_runner`.
        model: a LongformerModel. Its table of positions is replaced while it runs.
        ids: (1, seqlen), none of them padding.
        reach: distance in tokens from a row of the output to the farthest token that it depends on.
    """
    start, stop = max(rows.start - reach, 0), min(rows.stop + reach, ids.shape[1])
    table = model.embeddings.position_embeddings
    first = table.padding_idx + 1  # row of the first token's position
    weight = torch.cat([table.weight[:first], table.weight[first + start : first + stop]])
    model.embeddings.position_embeddings = nn.Embedding.from_pretrained(weight.detach(), padding_idx=table.padding_idx)
    try:
        ids = ids[:, start:stop]
        masks = {"attention_mask": np.ones_like(ids), "global_attention_mask": np.zeros_like(ids)}
        outputs = make_runner(model)({"input_ids": ids, **masks})
    finally:
        model.embeddings.position_embeddings = table
    return {OUTPUT: outputs[OUTPUT][:, rows.start - start : rows.stop - start]}


@torch.inference_mode()
def layer_rows(model: Any, ids: Any, global_positions: Any, rows: Any, dtype: torch.dtype) -> Arrays:
    """Compute `rows` of the output of a LongformerModel of one layer, each from all of its keys.

    Args:
        model: is converted to `dtype` in place.
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
    for chosen, suffix in ((~is_global[rows], ""), (is_global[rows], "_global")):
        query, key, value = (getattr(attention, name + suffix) for name in ("query", "key", "value"))
        projected = (query(hidden[:, rows[chosen]]), key(hidden), value(hidden))
        mask = torch.from_numpy(visible[chosen])
        for head in range(attention.num_heads):
            columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            q, k, v = (x[0, :, columns] for x in projected)
            scores = (q @ k.T * attention.head_dim**-0.5).masked_fill(~mask, -torch.inf)
            context[torch.from_numpy(chosen), columns] = scores.softmax(dim=-1) @ v
    states = layer.attention.output(context[None], hidden[:, rows])
    return {OUTPUT: layer.output(layer.intermediate(states), states).numpy()}


def compare_rows(reference: Arrays, witness: Arrays, actual: Any, layers: int) -> dict[str, Any]:
    """Compare rows of the output; returns error, PyTorch's error, tolerance, and whether the error is in tolerance."""
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
