"""Draw the figures of docs/chunking.md from the code that they explain: `python scripts/figures.py`.

This script computes no windows and chunks itself. It reads those of lfx from inner values of the function bodies, run
by ONNX's reference evaluator, and those of Hugging Face from the operands of its matrix products. The shapes in the
comments use the letters of export/functions, and w = one-sided window. Each figure has one batch row and one head.

The figure of docs/cluster.md is drawn from its record, if there is one. Two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib as mpl
import numpy as np
import onnx
import onnx_ir as ir
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, PathPatch, Rectangle
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx.export.functions import BLOCK, DOMAIN, VERSION, BandedAttention, GlobalAttention, function

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
RAY_RECORD = FOLDER.parent / "records" / "ray.jsonl"
Array = NDArray[Any]
Positions = tuple[int, ...]
Products = list[tuple[Array, Array]]  # query positions and columns of each product

# Okabe and Ito's palette, which colour-blind readers can distinguish, and pale variants as backgrounds of text.
BLUE, NAVY, ORANGE, PURPLE = "#0072B2", "#003A5D", "#E69F00", "#CC79A7"
PALE_BLUE, PALE_ORANGE, PALE_PURPLE, GREY = "#CCE3F2", "#FBE0A6", "#F1D3E4", "#D8D8D8"
WHITE, LINE, INK = "#FFFFFF", "#888888", "#222222"
STYLE = {"svg.hashsalt": "lfx", "figure.constrained_layout.use": True, "font.size": 12, "axes.titlesize": 11}

# Arguments of the figures. `block` overrides functions.BLOCK, so that the figures are small enough to read.
MASKS: dict[str, dict[str, Any]] = {
    "sliding window": {"window": 3},
    "dilated": {"window": 3, "dilation": 2},
    "global tokens": {"window": 3, "global_at": (0, 9)},
    "causal": {"window": 6, "causal": 1},
}
CHUNKS: dict[str, Any] = {"seqlen": 12, "window": 2, "block": 4, "global_at": (5,)}
SKEW = {"seqlen": 8, "window": 2}
BLOCKS: dict[str, Any] = {"seqlen": 96, "window": 16, "block": 8, "global_at": (0, 1, 2, 40)}
BACK: dict[str, Any] = {"seqlen": 10, "window": 2, "block": 4, "global_at": (0, 5), "masked": (8, 9)}


def run(op: Any, inputs: dict[str, Array], *inner: str, block: int = BLOCK, **attributes: int) -> list[Any]:
    """Run an op with one head in ONNX's reference evaluator.

    Args:
        inner: names of values inside the function body to return too.
        block: number of queries in a block, overriding functions.BLOCK.
        attributes: attributes of the op; the reference evaluator does not fill in defaults, so they are added here.
    Returns:
        The output, then the values of `inner`.
    """
    body = ir.to_proto(function(op, opset=17))
    for tensor in (a.t for node in body.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR):
        if onnx.numpy_helper.to_array(tensor).tolist() == [BLOCK]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([block], np.int64)))
    defaults = {a.name: helper.get_attribute_value(a) for a in body.attribute_proto}
    names = [name for node in body.node for name in node.output]
    for variable in inner:  # onnxscript appends a number to a variable that is assigned again; take the last value
        body.output.append([name for name in names if name.rstrip("0123456789").rstrip("_") == variable][-1])
    values = {**defaults, "num_heads": 1, **attributes}
    node = helper.make_node(body.name, list(inputs), list(body.output), domain=DOMAIN, **values)
    interface = [[onnx.ValueInfoProto(name=name) for name in names] for names in (inputs, body.output)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(helper.make_graph([node], "figure", *interface), functions=[body], opset_imports=opsets)
    return list(ReferenceEvaluator(model).run(None, inputs))


def op_inputs(seqlen: int, global_at: Positions = (), masked: Positions = ()) -> dict[str, Array]:
    """Make inputs of BandedAttention whose output shows the attended keys: scores 0, value j = unit vector j, D = S."""
    zeros, slots = np.zeros((1, seqlen, seqlen), np.float32), global_at or (-1,)
    key_mask = np.ones((1, seqlen), np.int32)
    key_mask[0, list(masked)] = 0
    tokens = {"key": zeros, "value": np.eye(seqlen, dtype=np.float32)[None], "key_mask": key_mask}
    (rows,) = run(GlobalAttention, {"query": zeros[:, : len(slots)], **tokens})
    return {"query": zeros, **tokens, "global_index": np.array([slots], np.int32), "global_context": rows}


def mask_panel(global_at: Positions = (), seqlen: int = 24, block: int = 8, **attributes: int) -> Array:
    """Return the attention mask of BandedAttention, (S, S) bool, derived from its output."""
    (rows,) = run(BandedAttention, op_inputs(seqlen, global_at), block=block, **attributes)
    return np.asarray(rows[0] > 0)


def gathered(seqlen: int, window: int, block: int, global_at: Positions) -> tuple[Array, Array]:
    """Return the tokens that each block gathers: queries (N, b) and keys (N, X), global slots first."""
    inputs = op_inputs(seqlen, global_at)
    _, (queries,), (keys,) = run(BandedAttention, inputs, "query_token", "gather_index", block=block, window=window)
    return queries, np.concatenate([global_at, np.arange(seqlen)])[keys]


def pool_rows(seqlen: int, window: int, block: int, **masks: Positions) -> tuple[Array, Array]:
    """Return the pool index that each position gathers, (S), and the query of each computed row, (N·b)."""
    inputs = op_inputs(seqlen, **masks)
    _, (indices,), queries = run(BandedAttention, inputs, "row_index", "query_token", block=block, window=window)
    return indices, queries.ravel()


def score_products(seqlen: int, window: int, block: int, global_at: Positions) -> tuple[Array, dict[str, Products]]:
    """Return the attention mask, and the scores that the block form and Hugging Face compute.

    Columns are the G global slots, then the S keys.

    Returns:
        The mask, (S, G + S) bool; and for each implementation its matrix products.
    """
    inputs, slots = op_inputs(seqlen, global_at), len(global_at)
    inner = ("query_token", "gather_index", "visible")
    _, (block_queries,), (block_keys,), visible = run(BandedAttention, inputs, *inner, block=block, window=window)
    mask = np.zeros((seqlen, slots + seqlen), bool)
    for queries, columns, block_mask in zip(block_queries, block_keys, visible[:, 0], strict=True):
        np.logical_or.at(mask, np.ix_(queries, columns), block_mask)
    chunked = hugging_face(seqlen, window, global_at)
    chunks = [(q, k + slots) for q, k in zip(chunked["queries"], chunked["keys"], strict=True)]
    chunks.append((chunked["global_queries"], np.arange(slots)))
    return mask, {"block form": list(zip(block_queries, block_keys, strict=True)), "Hugging Face": chunks}


def pair_of(scores: torch.Tensor, seqlen: int) -> Array:
    """Return query and key of each score of `hugging_face`, (…, 2); -1 for padding."""
    codes = np.nan_to_num(scores.numpy(), neginf=0.0).astype(np.int64)
    return np.where(codes[..., None] > 0, np.stack(np.divmod(codes - 1, seqlen), axis=-1), -1)


def hugging_face(seqlen: int, window: int, global_at: Positions = (0,)) -> dict[str, Array]:
    """Run Hugging Face's chunk functions and record their operands and scores.

    Query i is (i·S, 1) and key j is (1, j + 1), so that the score i·S + j + 1 identifies both.

    Returns:
        queries, keys (chunks, 2w); values (chunks + 1, 3w); global_queries (S): tokens, -1 = padding.
        scores (chunks, 2w, 2w, 2), skewed (chunks, 2w, 2w + 1, 2), band (S, 2w + 1, 2): as `pair_of`.
    """
    config = LongformerConfig(attention_window=[2 * window], num_hidden_layers=1, num_attention_heads=1, hidden_size=2)
    attention = LongformerSelfAttention(config, layer_id=0)
    token = torch.arange(seqlen, dtype=torch.float32)[None, :, None, None]  # (B, S, H, 1)
    query = torch.cat([token * seqlen, torch.ones_like(token)], dim=-1)
    key = torch.cat([torch.ones_like(token), token + 1], dim=-1)
    is_global = torch.isin(token[..., 0, 0], torch.tensor(global_at))
    with mock.patch.object(torch, "einsum", wraps=torch.einsum) as einsum, torch.inference_mode():
        band = attention._sliding_chunks_query_key_matmul(query, key, window)
        attention._sliding_chunks_matmul_attn_probs_value(torch.zeros_like(band), token, window)
        attention._concat_with_global_key_attn_probs(key, query, *attention._get_global_attn_indices(is_global))
    (queries, keys), (_, values), (global_queries, _) = (call.args[1] for call in einsum.call_args_list)
    scores = queries @ keys.transpose(-1, -2)
    skewed = attention._pad_and_transpose_last_two_dims(scores, padding=(0, 0, 0, 1))
    tokens = {"queries": queries[0, ..., 0] / seqlen, "keys": keys[0, ..., 1] - 1, "values": values[0, ..., 0]}
    tokens |= {"global_queries": global_queries[0, :, 0, 0] / seqlen}
    pairs = {"scores": scores[0], "skewed": skewed[0], "band": band[0, :, 0]}
    operands = {name: tensor.numpy().astype(np.int64) for name, tensor in tokens.items()}
    return operands | {name: pair_of(tensor, seqlen) for name, tensor in pairs.items()}


def _cells(axes: Any, labels: Array, colours: dict[int, str]) -> None:
    """Fill the cells of each label with one path, which has no seams between cells; the y axis is the query."""
    for label, colour in colours.items():
        edges = np.diff(np.pad((labels == label).astype(int), ((0, 0), (1, 1))), axis=1)
        runs = zip(*np.nonzero(edges == 1), np.nonzero(edges == -1)[1], strict=True)
        boxes = [[(a, row), (b, row), (b, row + 1), (a, row + 1)] for row, a, b in runs]
        outline = mpl.path.Path.make_compound_path_from_polys(np.reshape(boxes, (-1, 4, 2)))
        axes.add_patch(PathPatch(outline, facecolor=colour, linewidth=0))
    axes.set(xlim=(0, labels.shape[1]), ylim=(labels.shape[0], 0), aspect="equal", xlabel="key position")


def _table(axes: Any, texts: Array, colours: Array, left: float = 0, top: float = 0, size: float = 12) -> None:
    """Draw a table of coloured cells with a short text in each, and extend the axes to show all tables."""
    for (row, column), text in np.ndenumerate(texts):
        x, y = column + left, row + top
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colours[row, column], edgecolor=LINE, linewidth=0.6))
        axes.text(x + 0.5, y + 0.52, str(text), ha="center", va="center", fontsize=size, color=INK)
    right, bottom = max(axes.get_xlim()[1], left + texts.shape[1]), max(axes.get_ylim()[0], top + texts.shape[0])
    axes.set(xlim=(-0.05, right + 0.05), ylim=(bottom + 0.05, -0.05), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _legend(figure: Any, colours: dict[str, str], columns: int, title: str = "") -> None:
    patches = [Patch(facecolor=colour, edgecolor=LINE, label=text) for text, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, title=title)


def masks() -> Any:
    """Draw the attention masks: sliding window, dilated, with global tokens, causal."""
    figure, grid = plt.subplots(2, 2, figsize=(6, 7.3))
    for axes, (name, arguments) in zip(grid.flat, MASKS.items(), strict=True):
        mask, global_at = mask_panel(**arguments), list(arguments.get("global_at", ()))
        labels = mask.astype(int)
        labels[:, global_at] *= 2
        labels[global_at] = 3 * mask[global_at]
        _cells(axes, labels, {1: BLUE, 2: ORANGE, 3: PURPLE})
        axes.hlines(range(len(mask)), 0, len(mask), WHITE, linewidth=0.6)
        axes.vlines(range(len(mask)), 0, len(mask), WHITE, linewidth=0.6)
        axes.set(title=name, ylabel="query position", facecolor="#EEEEEE")
        axes.set_xticks(np.arange(0, len(mask), 8) + 0.5, range(0, len(mask), 8))
        axes.set_yticks(np.arange(0, len(mask), 8) + 0.5, range(0, len(mask), 8))
    names = {"seen, in the window": BLUE, "not seen": "#EEEEEE"}
    _legend(figure, {**names, "global token, seen by all": ORANGE, "row of a global token": PURPLE}, 2)
    return figure


def _copies(tokens: Array) -> Array:
    """Return the colours of a table of tokens: first occurrence, repeated occurrence, padding."""
    first = np.isin(np.arange(tokens.size), np.unique(tokens, return_index=True)[1]).reshape(tokens.shape)
    return np.where(tokens < 0, GREY, np.where(first, PALE_BLUE, PALE_ORANGE))


def as_strided() -> Any:
    """Draw Hugging Face's overlapping chunks, and the gather that replaces them."""
    chunks, seqlen = hugging_face(CHUNKS["seqlen"], CHUNKS["window"]), CHUNKS["seqlen"]
    panels = [["keys", "values"], ["gather", "gather"]]
    figure, grid = plt.subplot_mosaic(panels, figsize=(6, 5.9), width_ratios=[4, 6], height_ratios=[6, 3])
    for name, operands in (("keys", "queries and keys"), ("values", "values")):
        tokens = chunks[name]
        _table(grid[name], np.where(tokens < 0, "", tokens.astype(str)), _copies(tokens))
        title = f"as_strided: {operands}\n{(tokens >= 0).sum() / seqlen:.2f} copies of a token"
        grid[name].set(title=title, ylabel="chunk", ylim=(len(chunks["values"]) + 0.05, -0.05))  # cells of one size
    (queries, keys), slots, axes = gathered(**CHUNKS), len(CHUNKS["global_at"]), grid["gather"]
    _table(axes, queries, np.full(queries.shape, WHITE))
    colours = np.hstack([np.full((len(keys), slots), PALE_PURPLE), _copies(keys[:, slots:])])
    _table(axes, keys, colours, left=queries.shape[1] + 0.7)
    title = f"gather: queries, and keys (values likewise)\n{keys[:, slots:].size / seqlen:.2f} copies of a key"
    axes.set(title=title, ylabel="block")
    names = {"first time": PALE_BLUE, "once more": PALE_ORANGE, "global slot": PALE_PURPLE}
    _legend(figure, {**names, "query": WHITE, "padding": GREY}, 3)
    return figure


def skew() -> Any:
    """Draw how Hugging Face skews diagonals to columns: the scores of a chunk, with longer rows, and the band."""
    chunks, window = hugging_face(**SKEW), SKEW["window"]
    tables = {
        "one chunk": chunks["scores"][1],
        "read with longer rows": chunks["skewed"][1],
        "the band": chunks["band"],
    }
    figure, grid = plt.subplots(1, 3, figsize=(6, 4.8), width_ratios=[t.shape[1] for t in tables.values()])
    ramp = [mpl.colors.to_hex(c) for c in mpl.colormaps["PuOr"](np.linspace(0.28, 0.72, 2 * window + 1))]
    for axes, (title, pairs) in zip(grid, tables.items(), strict=True):
        column = np.where(pairs[..., 0] < 0, -1, pairs[..., 1] - pairs[..., 0] + window)
        colours = np.array([*ramp, GREY])[np.where((column < 0) | (column > 2 * window), -1, column)]
        texts = ["" if query < 0 else f"{query},{key}" for query, key in pairs.reshape(-1, 2)]
        _table(axes, np.reshape(texts, column.shape), colours, size=10.5)
        axes.set(title=title)
    names = {str(offset): colour for offset, colour in zip(range(-window, window + 1), ramp, strict=True)}
    _legend(figure, {**names, "outside": GREY}, 3, title="key position - query position")
    return figure


def blocks() -> Any:
    """Draw the scores that the block form and Hugging Face's chunks compute, and the unmasked ones among them."""
    (mask, implementations), seqlen = score_products(**BLOCKS), BLOCKS["seqlen"]
    slots = len(BLOCKS["global_at"])
    figure, grid = plt.subplots(1, 2, figsize=(6, 4.2), sharey=True)
    ticks = range(0, seqlen + 1, 32)
    for axes, (name, products) in zip(grid, implementations.items(), strict=True):
        computed = np.zeros(mask.shape, np.int64)
        for queries, columns in products:
            np.add.at(computed, np.ix_(queries, columns), 1)
            keys, rows = columns[columns >= slots], np.unique(queries)  # none in the product with the global keys
            corner = (keys[0] if keys.size else 0, rows[0])
            axes.add_patch(Rectangle(corner, keys.size, rows.size, fill=False, edgecolor=INK, linewidth=0.7, zorder=2))
        labels = np.where(mask, 1 + computed, computed > 0)
        labels[:, :slots] = 4
        _cells(axes, labels, {1: PALE_ORANGE, 2: BLUE, 3: NAVY, 4: PURPLE})
        title = f"{name}\n{mask.sum() / computed.sum():.0%} of its scores are seen"
        axes.set(title=title, yticks=ticks, ylabel="query position" if axes is grid[0] else "")
        axes.set_xticks([tick + slots for tick in ticks], ticks)
    names = {"seen": BLUE, "seen, computed twice": NAVY, "computed, not seen": PALE_ORANGE, "global columns": PURPLE}
    _legend(figure, names, 2)
    return figure


def gather_back() -> Any:
    """Draw the last gather: each position takes its row from the pool."""
    (rows, queries), slots = pool_rows(**BACK), len(BACK["global_at"])
    colours = np.array([PALE_BLUE] * len(queries) + [PALE_PURPLE] * slots + [GREY])
    pool = np.array([*queries.astype(str), *(f"g{slot}" for slot in range(slots)), ""])
    left = (len(pool) - len(rows)) / 2
    figure, axes = plt.subplots(figsize=(6, 3.6))
    _table(axes, pool[None], np.where(np.isin(np.arange(len(pool)), rows), colours, PALE_ORANGE)[None])
    _table(axes, np.arange(len(rows))[None], colours[rows][None], left, top=4)
    for position, row in enumerate(rows):
        axes.plot([row + 0.5, position + left + 0.5], [1.05, 3.95], color=INK, linewidth=1)
    axes.set(title="the pool: rows of all blocks, global rows, a zero row", xlabel="the result, by position")
    names = {"computed": PALE_BLUE, "computed, not read": PALE_ORANGE}
    _legend(figure, {**names, "global row": PALE_PURPLE, "zero row": GREY}, 2)
    return figure


def ray() -> Any:
    """Draw docs/records/ray.jsonl: throughput by the number of actors, and progress while an actor is killed."""
    row = json.loads(RAY_RECORD.read_text(encoding="utf-8"))
    figure, (rates, progress) = plt.subplots(1, 2, figsize=(6.6, 3.2))
    counts = [pool["actors"] for pool in row["pools"]]
    medians = [statistics.median(pool["documents_per_second"]) for pool in row["pools"]]
    rates.bar([str(count) for count in counts], medians, color=BLUE, width=0.6)
    rates.axhline(row["documents"] / statistics.median(row["run_seconds"]), color=ORANGE, label="lfx run")
    rates.set(title="documents per second", xlabel="actors, one thread each", ylim=(0, 1.25 * max(medians)))
    pools = {pool["actors"]: pool for pool in row["pools"]}
    killed = row["killed"]
    for timeline, colour, label in (
        (pools[killed["actors"]]["timeline"], GREY, f"{killed['actors']} actors"),
        (killed["timeline"], NAVY, "one of them killed"),
    ):
        seconds, documents = zip(*timeline, strict=True)
        progress.step(seconds, documents, where="post", color=colour, label=label)
    progress.axvline(killed["killed_at_seconds"], color=PURPLE, linestyle="--", label="the kill")
    progress.set(title="documents written", xlabel="seconds since the model is open", ylim=(0, None))
    rates.legend(frameon=False, fontsize=9, loc="upper left")
    progress.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the figures  [default: docs/figures]")
    mpl.use("Agg")
    draw_figures(parser.parse_args().output)


def draw_figures(folder: Path) -> None:
    """Draw all figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (masks, as_strided, skew, blocks, gather_back, *([ray] if RAY_RECORD.exists() else [])):
        with mpl.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


def load_test(records: list[dict[str, Any]], label: str, path: Path) -> None:
    """Draw the records of a load test over the number of clients: throughput of server and Engine, and latency."""
    records = sorted(records, key=lambda row: row["clients"])
    clients = [row["clients"] for row in records]
    with mpl.rc_context(STYLE):
        figure, (rate, latency) = plt.subplots(1, 2, figsize=(11, 4.2))
        engine_alone = [sum(row["engine_tokens_per_second"].values()) / 2 for row in records]
        rate.plot(clients, engine_alone, "--", color=ORANGE, marker="s", label="Engine.run alone")
        rate.plot(clients, [row["tokens_per_second"] for row in records], color=BLUE, marker="o", label=label)
        rate.set(title="Throughput", ylabel="tokens per second", ylim=(0, 1.15 * max(engine_alone)))
        for name, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
            values = [row["latency_ms"][name] / 1000 for row in records]
            latency.plot(clients, values, style, color=BLUE, marker="o", label=name)
        latency.set(title="Latency", ylabel="seconds", yscale="log")
        for axes in (rate, latency):
            axes.set_xscale("log")
            axes.set_xticks(clients, [str(count) for count in clients])
            axes.minorticks_off()
            axes.set_xlabel("clients that ask at the same time")
            axes.grid(visible=True, alpha=0.25)
            axes.legend(frameon=False)
        figure.savefig(path, dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()
