"""Grouping of sequences into batches: each once, within the token budget, with little padding."""

from __future__ import annotations

import itertools
from collections import Counter, UserString
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfx.errors import InputError
from lfx.runtime import Engine
from lfx.runtime.batching import BATCH_COST, batches
from tests.conftest import MakeBundle

BUDGET = 1000


def cost(lengths: list[int], groups: list[list[int]]) -> int:
    """The cost that `batches` minimizes."""
    return sum(BATCH_COST + len(group) * max(lengths[i] for i in group) for group in groups)


@given(st.lists(st.integers(1, 1500), max_size=60))
def test_each_document_is_in_one_batch_and_no_batch_is_above_the_budget(lengths: list[int]) -> None:
    groups = batches(lengths, BUDGET)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= BUDGET


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_no_other_grouping_costs_less(lengths: list[int]) -> None:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ways = []
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        way = [[order[0]]]
        for i, cut in zip(order[1:], cuts, strict=True):
            if cut:
                way.append([])
            way[-1].append(i)
        if all(len(m) == 1 or len(m) * max(lengths[i] for i in m) <= BUDGET for m in way):
            ways.append(cost(lengths, way))
    assert cost(lengths, batches(lengths, BUDGET)) == min(ways)


def test_documents_of_all_lengths_get_little_padding() -> None:
    random = np.random.default_rng(0)
    lengths = [int(n) for n in np.clip(random.lognormal(6.5, 1.0, 200), 50, 4096)]
    groups = batches(lengths, 8192)
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert padded <= 1.1 * sum(lengths)


@given(st.lists(st.integers(1, 5), max_size=40))
def test_without_padding_only_equal_lengths_run_together(lengths: list[int]) -> None:
    groups = batches(lengths, BUDGET, pad=False)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(lengths)))
    assert len(groups) == len(set(lengths))
    assert all(len({lengths[i] for i in group}) == 1 for group in groups)
    few = batches(lengths, 12, lambda batch, seqlen: batch <= 3, pad=False)
    assert sorted(itertools.chain.from_iterable(few)) == list(range(len(lengths)))
    for group in few:
        assert len({lengths[i] for i in group}) == 1
        assert len(group) <= max(1, min(3, 12 // lengths[group[0]]))
    for length, count in Counter(lengths).items():  # no more batches than necessary
        most = min(3, 12 // length)
        assert sum(lengths[group[0]] == length for group in few) == -(-count // most)


def test_batches_stay_within_the_backend_s_limit() -> None:
    groups = batches([5] * 10, BUDGET, lambda batch, seqlen: batch <= 3)
    assert max(map(len, groups)) == 3


SEQUENCES = [[5 + i % 40 for i in range(n)] for n in (3, 90, 1, 17, 90, 40, 2, 128)]


def test_a_list_gives_the_outputs_of_its_sequences_one_by_one(bundle: MakeBundle) -> None:
    with Engine(bundle(), token_budget=200) as engine:
        together = engine.run(SEQUENCES)
        for i, sequence in enumerate(SEQUENCES):
            alone = engine.run(sequence)
            np.testing.assert_allclose(
                together["last_hidden_state"][i], alone["last_hidden_state"][0], rtol=0, atol=1e-5
            )
            np.testing.assert_allclose(together["pooler_output"][i], alone["pooler_output"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_a_stream_gives_results_in_the_order_of_the_documents(ahead: int, bundle: MakeBundle) -> None:
    with Engine(bundle(), token_budget=200) as engine:
        read: list[int] = []

        def documents():
            for i, sequence in enumerate(SEQUENCES):
                read.append(i)
                yield sequence

        for i, outputs in enumerate(engine.stream(documents(), ahead=ahead)):
            assert len(read) <= (i // ahead + 1) * ahead  # reads at most `ahead` documents ahead
            alone = engine.run(SEQUENCES[i])
            for name, array in alone.items():
                np.testing.assert_allclose(outputs[name], array[0], rtol=0, atol=1e-5)
        assert len(read) == len(SEQUENCES)


def test_the_same_stream_is_bit_for_bit_the_same(bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine:
        first, second = (list(engine.stream(SEQUENCES)) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_a_stream_of_choices(bundle: MakeBundle) -> None:
    documents = [np.full((2, n), 7) for n in (3, 30, 9)]
    with Engine(bundle("multiple-choice")) as engine:
        marks = [np.zeros_like(d) for d in documents]
        with pytest.raises(InputError, match="three separators"):
            list(engine.stream(documents))
        assert engine.run(documents, None, marks)["logits"].shape == (3, 2)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_token_budget_below_one_is_refused(budget: int, bundle: MakeBundle) -> None:
    with pytest.raises(InputError, match=rf"token_budget {budget} is out of range"):
        Engine(bundle(), token_budget=budget)


@pytest.mark.parametrize("ahead", [0, -1, 1.5, True, None, "3", float("nan"), 10**30])
def test_ahead_is_checked_when_stream_is_called(ahead: Any, bundle: MakeBundle) -> None:
    with (
        Engine(bundle()) as engine,
        pytest.raises(InputError, match=r"ahead .*give a whole number(, 1 or more| from 1 to 9223372036854775807)$"),
    ):
        engine.stream(SEQUENCES, ahead=ahead)


@pytest.mark.parametrize(
    "documents", [5, None, "the fox", b"fox", {"ids": [5]}, UserString("fox"), np.array(5)], ids=repr
)
def test_documents_of_another_type_are_refused_when_stream_is_called(documents: Any, bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine, pytest.raises(InputError, match=r"documents is \w+; give an iterable"):
        engine.stream(documents)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([5, 6, 7], "document 0: input_ids is int; give one sequence"),
        ([[5], [6], 7], "document 2: input_ids is int"),
        (np.array([5, 6]), r"document 0: input_ids has shape \(\)"),
        ([[5], "fox"], "document 1: input_ids is str"),
        ([[5], [6], [7], [200]], "document 3: input_ids has id 200"),
        ([[[5], [6]]], "document 0 has 2 sequences"),
        ([[5], []], "document 1: input_ids is empty"),
        ([np.ma.masked_array([5, 6])], "document 0: input_ids is a masked array"),
    ],
)
@pytest.mark.parametrize("ahead", [1, 256])
def test_the_error_names_the_bad_document(documents: Any, message: str, ahead: int, bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine, pytest.raises(InputError, match=message):
        list(engine.stream(documents, ahead=ahead))


def test_exceptions_of_the_documents_pass_through(bundle: MakeBundle) -> None:
    def documents() -> Iterator[list[int]]:
        yield [5, 6]
        raise KeyError("mine")

    with Engine(bundle()) as engine:
        stream = engine.stream(documents(), ahead=1)
        assert next(stream)
        with pytest.raises(KeyError, match="mine"):
            next(stream)


def test_different_numbers_of_choices_are_not_batched(bundle: MakeBundle) -> None:
    ids = [[0, 5, 2, 2, 6, 2]]
    with Engine(bundle("multiple-choice")) as engine:
        rows = list(engine.stream([ids * 2, ids * 3, ids * 2]))
        assert [len(row["logits"]) for row in rows] == [2, 3, 2]
        assert engine.metrics.snapshot().batches == 2
