"""`lfx.export.pooling` against its definition, written out token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lfx.errors import ExportError
from lfx.export.pooling import Dense, LongformerForSentenceEmbedding, Normalize, Pooling
from lfx.signature import POOLINGS
from tests.models import tiny_model

MASKS = {
    "none": [[1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "holes": [[0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]],
}


def pooled(mode: str, hidden: np.ndarray, mask: list[int]) -> np.ndarray:
    """The vector of one sequence, (S, H), as sentence-transformers defines it."""
    real = [i for i, value in enumerate(mask) if value]
    tokens = [hidden[i] for i in real]
    if mode in ("cls", "lasttoken"):
        return np.asarray(tokens[0 if mode == "cls" else -1])
    if mode == "max":
        return np.max(tokens, axis=0)
    weights = [i - real[0] + 1 if mode == "weightedmean" else 1 for i in real]
    total = np.sum([weight * token for weight, token in zip(weights, tokens, strict=True)], axis=0)
    return np.asarray(total / (np.sqrt(len(real)) if mode == "mean_sqrt_len_tokens" else sum(weights)))


def random_hidden(batch: int, seqlen: int, size: int = 5) -> Any:
    return torch.randn(batch, seqlen, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("mode", POOLINGS)
def test_a_mode_is_its_definition(mode: str, padding: str) -> None:
    mask = MASKS[padding]
    hidden = random_hidden(len(mask), 7)
    actual = Pooling([mode])(hidden, torch.tensor(mask))
    expected = [pooled(mode, row, marks) for row, marks in zip(hidden.numpy(), mask, strict=True)]
    np.testing.assert_allclose(actual.numpy(), np.stack(expected), rtol=1e-12, atol=1e-12)


def test_modes_are_concatenated_in_their_order() -> None:
    hidden, mask = random_hidden(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    apart = [Pooling([mode])(hidden, mask) for mode in ("max", "cls")]
    assert torch.equal(Pooling(["max", "cls"])(hidden, mask), torch.cat(apart, dim=-1))


@pytest.mark.parametrize("mode", POOLINGS)
def test_a_row_of_padding_only_gives_zeros_and_changes_no_other(mode: str) -> None:
    hidden, mask = random_hidden(2, 6), torch.tensor([[0] * 6, [1] * 6])
    embedding = Normalize()(Pooling([mode])(hidden, mask))
    assert torch.equal(embedding[0], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(embedding[1], Normalize()(Pooling([mode])(hidden[1:], mask[1:]))[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", POOLINGS)
def test_half_precision_is_pooled_and_normalized_in_float32(mode: str, dtype: Any) -> None:
    hidden = random_hidden(1, 5000).to(dtype) * 10 + 100  # the weighted sum is far above the largest float16
    mask = torch.ones(1, 5000, dtype=torch.int64)
    actual = Pooling([mode])(hidden, mask)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual, Pooling([mode])(hidden.double(), mask), rtol=1e-5)
    assert Normalize()(actual.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "weightedmean"])
def test_tokens_are_counted_in_integers_which_no_backend_rounds(mode: str) -> None:
    """OpenVINO in bfloat16 counts in bfloat16 what is float32 in the graph, where 256 + 1 is 256."""
    inputs = (random_hidden(2, 6).float(), torch.ones(2, 6, dtype=torch.int64))
    nodes = torch.export.export(Pooling([mode]), inputs).graph.nodes
    counted = [node.args[0].meta["val"].dtype for node in nodes if "cumsum" in str(node.target)]
    assert set(counted) == {torch.int64}


def test_an_unknown_mode_or_none_is_refused() -> None:
    with pytest.raises(ExportError, match="pooling 'median' is not known; choose one of: mean, cls"):
        Pooling(["median"])
    with pytest.raises(ExportError, match="no pooling mode"):
        Pooling([])


def test_normalize_divides_by_the_norm() -> None:
    embedding = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(Normalize()(embedding), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("out_features", [5, 3])
def test_a_dense_adds_its_input(out_features: int) -> None:
    dense = Dense(5, out_features, nn.Tanh(), residual=True)
    assert hasattr(dense, "residual") == (out_features == 3)
    x = torch.randn(2, 5)
    added = x @ dense.residual.weight.T if out_features == 3 else x
    torch.testing.assert_close(dense(x), torch.tanh(x @ dense.linear.weight.T + dense.linear.bias) + added)


def test_the_modules_follow_the_pooling_and_a_start_is_kept() -> None:
    longformer, dense = tiny_model(), Dense(32, 6, nn.Identity())
    model = LongformerForSentenceEmbedding(longformer, ["cls"], [dense, Normalize()], dimensions=4)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = longformer(ids).last_hidden_state[:, 0]
        vector = dense(hidden)
        expected = (vector / vector.norm(dim=-1, keepdim=True))[:, :4]
        torch.testing.assert_close(model(ids)["sentence_embedding"], expected)
    assert {name.split(".")[0] for name in model.state_dict()} == {"longformer", "dense_2"}
