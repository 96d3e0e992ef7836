"""docs/chunking.md agrees with the code and with the definition, in its figures and in its text."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx import reference
from lfx.export import functions
from scripts import figures

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "chunking.md"


def _visible_by_definition(inputs: dict[str, np.ndarray], **given: Any) -> np.ndarray:
    """The keys that each query sees by the dense definition, (S, S) bool."""
    query, key, value, key_mask, index = (inputs[n] for n in ("query", "key", "value", "key_mask", "global_index"))
    rows = reference.global_attention(query[:, : index.shape[1]], key, value, key_mask, num_heads=1)
    return reference.banded_attention(query, key, value, key_mask, index, rows, num_heads=1, **given)[0] > 0


@pytest.mark.parametrize("name", figures.MASKS)
def test_a_drawn_mask_is_the_definition(name: str) -> None:
    given = dict(figures.MASKS[name])
    drawn = figures.mask_panel(**given)
    inputs = figures.op_inputs(len(drawn), given.pop("global_at", ()))
    np.testing.assert_array_equal(drawn, _visible_by_definition(inputs, **given))


def test_the_block_size_is_the_one_constant_that_the_figures_replace() -> None:
    for op, count in ((functions.BandedAttention, 1), (functions.GlobalAttention, 0)):
        attributes = [a for node in op.to_function_proto().node for a in node.attribute]
        assert sum(list(a.ints) == [functions.BLOCK] for a in attributes) == count


def test_drawn_blocks_hold_each_query_once_and_the_keys_that_it_sees() -> None:
    queries, keys = figures.gathered(**figures.CHUNKS)
    seqlen, global_at = figures.CHUNKS["seqlen"], figures.CHUNKS["global_at"]
    np.testing.assert_array_equal(queries.ravel(), range(seqlen))
    np.testing.assert_array_equal(keys[:, : len(global_at)], [global_at] * len(keys))
    defined = _visible_by_definition(figures.op_inputs(seqlen), window=figures.CHUNKS["window"])
    for block, span in zip(queries, keys[:, len(global_at) :], strict=True):
        assert set(np.flatnonzero(defined[block].any(axis=0))) <= set(span)


@pytest.mark.parametrize(("seqlen", "window"), [(8, 2), (12, 2), (96, 16)])
def test_hugging_faces_chunks_are_those_of_chunk_and_their_scores_are_the_band(seqlen: int, window: int) -> None:
    drawn = figures.hugging_face(seqlen, window)
    chunks = LongformerSelfAttention._chunk(torch.arange(seqlen).reshape(1, seqlen, 1), window)[0, :, :, 0]
    for name in ("queries", "keys"):
        np.testing.assert_array_equal(drawn[name], chunks)
    defined = set(zip(*np.nonzero(_visible_by_definition(figures.op_inputs(seqlen), window=window)), strict=True))
    pairs = drawn["band"]
    assert {tuple(pair) for pair in pairs.reshape(-1, 2) if pair[0] >= 0} == defined
    assert defined <= {(q, k) for qs, ks in zip(chunks.tolist(), chunks.tolist(), strict=True) for q in qs for k in ks}
    rows, columns = np.nonzero(pairs[..., 0] >= 0)
    np.testing.assert_array_equal(pairs[rows, columns, 0], rows)
    np.testing.assert_array_equal(pairs[rows, columns, 1] - rows, columns - window)


def test_drawn_rectangles_cover_what_is_seen_and_cost_what_the_page_says() -> None:
    seqlen, window, block = (figures.BLOCKS[name] for name in ("seqlen", "window", "block"))
    global_at = list(figures.BLOCKS["global_at"])
    slots, others = len(global_at), np.setdiff1d(range(seqlen), global_at)
    seen, ways = figures.score_products(**figures.BLOCKS)
    keys = seen[:, slots:].copy()
    assert not keys[:, global_at].any()  # a global key is counted once: in front
    keys[:, global_at] = seen[:, :slots]
    defined = _visible_by_definition(figures.op_inputs(seqlen, figures.BLOCKS["global_at"]), window=window)
    np.testing.assert_array_equal(keys[others], defined[others])
    for products in ways.values():
        covered = np.zeros_like(seen)
        for queries, columns in products:
            covered[np.ix_(queries, columns)] = True
        assert covered[seen].all()
    computed = {name: sum(q.size * c.size for q, c in products) for name, products in ways.items()}
    assert computed["block form"] == seqlen * (slots + block + 2 * window)
    assert computed["Hugging Face"] == (seqlen // window - 1) * (2 * window) ** 2 + seqlen * slots


def test_each_position_takes_its_own_row_of_the_pool() -> None:
    rows, queries = figures.pool_rows(**figures.BACK)
    for position, row in enumerate(rows):
        if position in figures.BACK["global_at"]:
            assert row == len(queries) + figures.BACK["global_at"].index(position)
        elif position in figures.BACK["masked"]:
            assert row == len(queries) + len(figures.BACK["global_at"])
        else:
            assert queries[row] == position


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all figures, drawn now."""
    folder = tmp_path_factory.mktemp("figures")
    mpl.use("Agg")
    figures.draw_figures(folder)
    return folder


def test_every_figure_of_the_pages_is_drawn_and_every_drawn_one_is_on_one(drawn: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (PAGE, PAGE.with_name("cluster.md")))
    named = re.findall(r"\]\(figures/([^)]+)\)", text)
    assert sorted(named) == sorted(path.name for path in drawn.iterdir())
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs" / "figures").glob("*.svg"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_figure_of_a_page_exists(page: Path) -> None:
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


def _parts(svg: Path) -> tuple[str, list[float]]:
    """A figure without its generated ids: its text, and the numbers in it."""
    text = re.sub(r"\b[mp][0-9a-f]{10}\b", "", svg.read_text(encoding="utf-8"))
    number = re.compile(r"-?\d+\.\d+")
    return number.sub("", text), [float(value) for value in number.findall(text)]


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "docs" / "figures").glob("*.svg"))])
def test_the_figures_in_docs_are_drawn_from_the_code_as_it_is(drawn: Path, name: str) -> None:
    kept = ROOT / "docs" / "figures" / name
    version = re.search(r"Matplotlib v([\d.]+),", kept.read_text(encoding="utf-8"))
    if version is None or version[1] != mpl.__version__:
        pytest.skip(f"drawn by another matplotlib than {mpl.__version__}, which draws other paths")
    text, numbers = _parts(drawn / name)
    assert text == _parts(kept)[0], "run: python scripts/figures.py"
    np.testing.assert_allclose(numbers, _parts(kept)[1], atol=0.01, err_msg="run: python scripts/figures.py")


# The page's statements about exports, tested on Hugging Face's own methods: window 2, two heads of size 2.


def _scores(x: torch.Tensor) -> torch.Tensor:
    return _attention()._sliding_chunks_query_key_matmul(x, x, 2)


def _context(x: torch.Tensor) -> torch.Tensor:
    return _attention()._sliding_chunks_matmul_attn_probs_value(torch.ones_like(x[..., :1]).expand(-1, -1, -1, 5), x, 2)


def _attention() -> LongformerSelfAttention:
    config = LongformerConfig(attention_window=[4], num_hidden_layers=1, num_attention_heads=2, hidden_size=4)
    return LongformerSelfAttention(config, layer_id=0)


def _traced(method: Callable[[torch.Tensor], torch.Tensor], batch: int) -> Callable[[torch.Tensor], np.ndarray]:
    """Export the method with the TorchScript exporter: dynamic batch and length, from an example of length 8."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return method(x)

    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch", 1: "seqlen"}}
        example = torch.randn(batch, 8, 2, 2)
        torch.onnx.export(
            Module(), (example,), written, input_names=["x"], dynamic_axes=axes, opset_version=17, dynamo=False
        )
    session = ort.InferenceSession(written.getvalue())
    return lambda x: np.asarray(session.run(None, {"x": x.numpy()})[0])


def test_exported_strides_are_those_of_the_example() -> None:
    exported = _traced(_context, batch=2)
    same_length, longer = torch.randn(2, 8, 2, 2), torch.randn(2, 12, 2, 2)
    np.testing.assert_allclose(exported(same_length), _context(same_length), atol=1e-5)
    same = np.isclose(exported(longer), _context(longer), atol=1e-5).all(axis=(1, 3))  # (batch, heads)
    assert same.tolist() == [[True, False], [False, False]]


def test_exported_chunks_of_one_sequence_are_wrong_at_the_length_of_the_example() -> None:
    x = torch.randn(1, 8, 2, 2)
    assert not np.allclose(_traced(_scores, batch=1)(x), _scores(x), atol=1e-5)
    x = torch.randn(2, 8, 2, 2)
    np.testing.assert_allclose(_traced(_scores, batch=2)(x), _scores(x), atol=1e-5)


def test_the_newer_exporter_refuses_the_number_of_chunks() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return LongformerSelfAttention._chunk(x, 2) + 0

    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Module(), (torch.zeros(1, 8, 1),), dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}})
