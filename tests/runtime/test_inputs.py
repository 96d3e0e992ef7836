"""Ids and masks that `prepare` accepts or refuses; no model is run."""

from __future__ import annotations

import array
import tracemalloc
from collections import UserList, UserString, deque
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.longformer.modeling_longformer import _compute_global_attention_mask

from lfx.errors import InputError
from lfx.runtime import inputs
from lfx.runtime.inputs import Feeds, default_global, pad_choices, prepare, prepare_each, seqlen_of, stack
from lfx.signature import GRAPH_INPUTS, Signature, TensorSpec

PAD, SEP, VOCAB, LONGEST = 1, 2, 20, 12


def signature(**changes: Any) -> Signature:
    """The signature of a model with a vocabulary of 20 that takes at most 12 tokens."""
    axes = ("batch", "sequence")
    plain = Signature(
        architecture="LongformerModel",
        task="feature-extraction",
        precision="fp32",
        inputs=tuple(TensorSpec(name, "int64", axes) for name in GRAPH_INPUTS),
        outputs=(TensorSpec("last_hidden_state", "float32", (*axes, 32)),),
        attention_windows=(2, 4),
        max_seqlen=LONGEST,
        vocab_size=VOCAB,
        pad_token_id=PAD,
        sep_token_id=SEP,
    )
    return replace(plain, **changes)


CHOICES = signature(task="multiple-choice", default_global="after_question")
QUESTION = signature(task="question-answering", default_global="question")
FIXED_FIRST = signature(
    inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in GRAPH_INPUTS[:2]),
    global_attention="first",
    default_global="first",
)


class ArrayLike:
    """A tensor of another library: numpy can convert it, and it is no Sequence."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values, dtype=dtype)


class Items(Sequence[Any]):
    """A Sequence whose length and items may be anything, including exceptions."""

    def __init__(self, length: Any, item: Any) -> None:
        self.length, self.item = length, item

    def __len__(self) -> int:
        if isinstance(self.length, BaseException):
            raise self.length
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.item, BaseException):
            raise self.item
        return self.item[index] if isinstance(self.item, list) else self.item


class Itself(Sequence[Any]):
    """A Sequence that contains itself, on which numpy would never end."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return self


class OnlyIndexed:
    """A sequence for numpy that is no Sequence for Python."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self


class NoArray:
    """An object whose __array__ returns no array."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


def batch_of(ids: Any, mask: Any, global_mask: Any, signature: Signature) -> Feeds:
    """The inputs of one batch, as the graph gets them."""
    return stack(prepare(ids, mask, global_mask, signature), signature.pad_token_id)


def circle() -> list[Any]:
    """A list that contains itself."""
    nested: list[Any] = []
    nested.append(nested)
    return nested


MASKED = np.ma.masked_array([3, 4], mask=[0, 1])


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6, 7],
        (5, 6, 7),
        deque([5, 6, 7]),
        UserList([5, 6, 7]),
        Items(3, [5, 6, 7]),
        np.array([5, 6, 7], dtype=">i4"),
        np.array([5, 6, 7], dtype=np.uint64),
        np.array([5, 0, 6, 0, 7])[::2],
        np.broadcast_to(np.array([5, 6, 7]), (1, 3)),
        range(5, 8),
        array.array("i", [5, 6, 7]),
        [np.int32(5), np.int64(6), np.uint8(7)],
        np.array([5, 6, 7], dtype=np.int32),
        np.array([5, 6, 7], dtype=np.uint8),
        np.array([7, 6, 5], dtype=np.int16)[::-1],
        ArrayLike([5, 6, 7]),
        torch.tensor([5, 6, 7]),
        [torch.tensor(5), torch.tensor(6), torch.tensor(7)],
        [[5, 6, 7]],
        ([5, 6, 7],),
        [np.array([5, 6, 7])],
        np.array([[5, 6, 7]]),
    ],
    ids=lambda value: f"{type(value).__name__}-{np.ndim(value)}",
)
def test_one_sequence_in_any_form_is_a_batch_of_one(ids: Any) -> None:
    batch = batch_of(ids, None, None, signature())
    assert list(batch) == list(GRAPH_INPUTS)
    for name, expected in zip(GRAPH_INPUTS, ([5, 6, 7], [1, 1, 1], [0, 0, 0]), strict=True):
        assert batch[name].dtype == np.int64
        assert batch[name].tolist() == [expected]


@pytest.mark.parametrize(
    "ids",
    [
        [[3, 4], [5, 6], [7, 8]],
        ((3, 4), (5, 6), (7, 8)),
        np.array([[3, 4], [5, 6], [7, 8]], dtype=np.int32),
        np.array([[3, 5, 7], [4, 6, 8]], order="F").T,
        [np.array([3, 4]), [5, 6], (7, 8)],
        [ArrayLike([3, 4]), ArrayLike([5, 6]), ArrayLike([7, 8])],
        torch.tensor([[3, 4], [5, 6], [7, 8]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batch_in_any_form_keeps_its_rows(ids: Any) -> None:
    batch = batch_of(ids, None, None, signature())
    assert batch["input_ids"].tolist() == [[3, 4], [5, 6], [7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1]] * 3


def test_ragged_sequences_are_padded_with_the_pad_id_and_masked() -> None:
    batch = batch_of([[3], [4, 5, 6], [7, 8]], None, None, signature(pad_token_id=9))
    assert batch["input_ids"].tolist() == [[3, 9, 9], [4, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert batch["global_attention_mask"].tolist() == [[0, 0, 0]] * 3


def test_ragged_masks_keep_their_values_and_are_padded_with_zeros() -> None:
    batch = batch_of([[3, 4], [5, 6, 7]], [[0, 1], [1, 1, 0]], [[1, 1], [0, 1, 0]], signature())
    assert batch["attention_mask"].tolist() == [[0, 1, 0], [1, 1, 0]]
    assert batch["global_attention_mask"].tolist() == [[1, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_a_mask_of_any_numeric_dtype_becomes_int64(dtype: Any) -> None:
    mask = np.array([[1, 0, 1]], dtype=dtype)
    batch = batch_of([3, 4, 5], mask, mask, signature())
    for name in GRAPH_INPUTS[1:]:
        assert batch[name].dtype == np.int64
        assert batch[name].tolist() == [[1, 0, 1]]


def test_feeds_are_copies() -> None:
    ids, mask, marks = (np.array([[3, 4, 5]]), np.array([[1, 1, 0]]), np.array([[1, 0, 0]]))
    batch = batch_of(ids, mask, marks, signature())
    for feed in batch.values():
        feed[:] = 9
    assert [ids.tolist(), mask.tolist(), marks.tolist()] == [[[3, 4, 5]], [[1, 1, 0]], [[1, 0, 0]]]


def test_multiple_choice_takes_one_example_or_a_batch() -> None:
    one = [[3, 2, 4, 2, 2], [3, 2, 2, 5, 2]]
    assert batch_of(one, None, None, CHOICES)["input_ids"].shape == (1, 2, 5)
    assert batch_of([one, one, one], None, None, CHOICES)["input_ids"].shape == (3, 2, 5)


@pytest.mark.parametrize(
    "ids",
    [
        [[3, 4], [5, 6]],
        ((3, 4), (5, 6)),
        deque([deque([3, 4]), deque([5, 6])]),
        np.array([[3, 4], [5, 6]], dtype=">i2"),
        np.array([[3, 5], [4, 6]]).T,
        torch.tensor([[3, 4], [5, 6]]),
        [np.array([3, 4], dtype=np.uint64), [5, 6]],
        [[[3, 4], [5, 6]]],
        [torch.tensor([[3, 4], [5, 6]])],
        np.array([[[3, 4], [5, 6]]]),
    ],
    ids=lambda value: f"{type(value).__name__}-{np.ndim(value)}",
)
def test_choices_in_any_form_are_a_batch_of_one(ids: Any) -> None:
    batch = batch_of(ids, [[1, 0], [1, 1]], None, replace(CHOICES, default_global="none"))
    assert batch["input_ids"].tolist() == [[[3, 4], [5, 6]]]
    assert batch["attention_mask"].tolist() == [[[1, 0], [1, 1]]]


BAD_CHOICE_MASKS = {
    "one choice": ([[1, 1]], r"shape \(1, 1, 2\) where input_ids has \(1, 2, 2\)"),
    "one axis": ([1, 1], "{name}"),
    "other length": (np.ones((2, 3)), r"shape \(1, 2, 3\)"),
    "value 2": ([[1, 1], [1, 2]], "the value 2"),
    "not a number": ([[1, 1], [1, float("nan")]], "the value nan"),
    "None inside": ([[1, 1], [1, None]], "{name}"),
    "strings": ([["1", "1"], ["1", "1"]], "{name}"),
    "masked array": (np.ma.masked_array(np.ones((2, 2))), "masked array"),
    "objects": (np.ones((2, 2), dtype=object), "dtype object"),
}


@pytest.mark.parametrize("mask_name", GRAPH_INPUTS[1:])
@pytest.mark.parametrize("name", BAD_CHOICE_MASKS)
def test_bad_masks_of_choices_are_refused(mask_name: str, name: str) -> None:
    mask, message = BAD_CHOICE_MASKS[name]
    masks = {"attention_mask": None, "global_attention_mask": None, mask_name: mask}
    with pytest.raises(InputError, match=message.format(name=mask_name)) as caught:
        prepare([[3, 4], [5, 6]], *masks.values(), replace(CHOICES, default_global="none"))
    assert mask_name in str(caught.value)


def test_multiple_choice_pads_examples_of_different_lengths() -> None:
    batch = batch_of([[[3, 4], [5, 6]], [[7], [8]]], None, None, replace(CHOICES, default_global="none"))
    assert batch["input_ids"].tolist() == [[[3, 4], [5, 6]], [[7, PAD], [8, PAD]]]
    assert batch["attention_mask"].tolist() == [[[1, 1], [1, 1]], [[1, 0], [1, 0]]]


def test_choices_of_different_lengths_are_padded_on_the_right() -> None:
    ids, mask = pad_choices([[3, 4, 5], [6], [7, 8]], PAD)
    assert ids.tolist() == [[3, 4, 5], [6, PAD, PAD], [7, 8, PAD]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_default_globals_none_and_first() -> None:
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    assert default_global(ids, signature(default_global="none")).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert default_global(ids, signature(default_global="first")).tolist() == [[1, 0, 0], [1, 0, 0]]


@st.composite
def pairs_of_texts(draw: st.DrawFn) -> list[list[int]]:
    """Rows of one length: words, two separators, words, separator, padding."""
    word = st.integers(3, VOCAB - 1)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        question, text = draw(st.lists(word, max_size=6)), draw(st.lists(word, max_size=6))
        rows.append([0, *question, SEP, SEP, *text, SEP])
    width = max(len(row) for row in rows)
    return [row + [PAD] * (width - len(row)) for row in rows]


@pytest.mark.parametrize(("rule", "before"), [("question", True), ("after_question", False)])
@given(rows=pairs_of_texts())
def test_default_globals_of_questions_are_those_of_transformers(rule: str, before: bool, rows: list[list[int]]) -> None:
    ids = np.array(rows)
    ours = default_global(ids, signature(default_global=rule))
    theirs = _compute_global_attention_mask(torch.from_numpy(ids), SEP, before_sep_token=before)
    assert ours.dtype == np.int64
    assert ours.tolist() == theirs.long().tolist()


def test_default_globals_of_choices_follow_each_choice() -> None:
    ids = np.array([[[3, SEP, SEP, 4, 5, SEP], [3, 4, 5, SEP, SEP, SEP]]])
    marks = default_global(ids, CHOICES)
    for row in range(2):
        choice = torch.from_numpy(ids[0, row : row + 1])
        theirs = _compute_global_attention_mask(choice, SEP, before_sep_token=False)
        assert marks[0, row].tolist() == theirs[0].long().tolist()


def test_a_given_mask_replaces_the_default_globals() -> None:
    first = signature(default_global="first")
    assert batch_of([3, 4], None, None, first)["global_attention_mask"].tolist() == [[1, 0]]
    assert batch_of([3, 4], None, [0, 1], first)["global_attention_mask"].tolist() == [[0, 1]]
    without_separators = batch_of([3, 4], None, [1, 0], QUESTION)
    assert without_separators["global_attention_mask"].tolist() == [[1, 0]]


@pytest.mark.parametrize("separators", [0, 2, 4])
def test_default_globals_of_questions_need_three_separators(separators: int) -> None:
    rows = [[3, SEP, SEP, 4, 5, SEP], [3] * (6 - separators) + [SEP] * separators]
    cures = "leave separators such as </s> out of both, give global_attention_mask, .*--global-attention none"
    with pytest.raises(InputError, match=rf"three separators \(id 2\).*one has {separators}.*{cures}"):
        prepare(rows, None, None, QUESTION)


BAD_IDS = {
    "float ids": ([3.0, 4.0], "float64; give integers"),
    "float array": (np.zeros((2, 3), dtype=np.float32), "float32; give integers"),
    "bool ids": (np.array([True, False]), "bool; give integers"),
    "timedeltas": (np.array([3, 4], dtype="m8[s]"), "input_ids"),
    "records": (np.zeros(3, dtype=[("id", int)]), "input_ids"),
    "bfloat16 tensor": (torch.ones(3, dtype=torch.bfloat16), "input_ids"),
    "tensor without data": (torch.ones(3, dtype=torch.long, device="meta"), "input_ids"),
    "negative id": ([3, -4, 5], "negative id -4; ids start at 0"),
    "id of the vocabulary's size": ([3, VOCAB], "id 20, outside the vocabulary of 20"),
    "bad id in the second row": ([[3, 4], [5, 77]], r"input_ids\[1\] has id 77"),
    "id above 64 bits": ([2**70], "input_ids"),
    "empty list": ([], "empty; give at least one"),
    "empty tuple": ((), "empty; give at least one"),
    "empty batch": (np.zeros((0, 5), dtype=int), "empty batch"),
    "empty sequence": ([[]], "empty sequence"),
    "empty array": (np.zeros(0, dtype=int), "empty sequence"),
    "rows of nothing": (np.zeros((2, 0), dtype=int), "empty sequence"),
    "one empty row": ([[3, 4], []], r"input_ids\[1\] is an empty sequence"),
    "too long": ([3] * 13, "13 tokens, above the model's maximum 12"),
    "one row too long": ([[3], [3] * 13], r"input_ids\[1\] has 13 tokens"),
    "string": ("the fox", "str; give token ids"),
    "bytes": (b"fox", "bytes; give token ids"),
    "bytearray": (bytearray(b"\3\4"), "give"),
    "strings": (["the", "fox"], "integers"),
    "digits as strings": (["3", "4"], "integers"),
    "rows of strings": ([["3", "4"]], "integers"),
    "None": (None, "NoneType; give token ids"),
    "None inside": ([3, None], "give one sequence"),
    "number": (3, "int; give one sequence"),
    "array without axes": (np.int64(3), r"shape \(\); give one sequence"),
    "dictionary": ({"input_ids": [3]}, "dict; give one sequence"),
    "set": ({3, 4}, "set; give one sequence"),
    "generator": ((i for i in (3, 4)), "generator; give one sequence"),
    "nested too deep": ([[[3, 4]]], "give one sequence"),
    "array nested too deep": (np.full((1, 1, 2), 3), r"shape \(1, 1, 2\); give one sequence"),
    "array of two axes in a list": ([[3, 4], np.full((1, 2), 3)], r"input_ids\[1\] has shape \(1, 2\); give one"),
    "nested very deep": (reduce(lambda inner, _: [inner], range(90), 3), "input_ids"),
    "number beside a sequence": ([[3, 4], 5], r"input_ids\[1\]"),
    "sequence beside a number": ([3, [4, 5]], "ragged inside"),
    "ragged third axis": ([[[3], [4, 5]]], "give one sequence"),
    "list that holds itself": (circle(), "input_ids is nested too deeply; give one sequence"),
    "list beside itself": ([[3, 4], circle()], r"input_ids\[1\] is ragged inside"),
    "sequence of itself": (Itself(), "nested too deeply"),
    "row of what only numpy reads": ([OnlyIndexed(), OnlyIndexed()], "holds OnlyIndexed, not single integers"),
    "what only numpy reads": (OnlyIndexed(), "OnlyIndexed; give one sequence"),
    "UserString": (UserString("fox"), "UserString; give token ids"),
    "UserStrings": ([UserString("fox")], "holds UserString, not single integers"),
    "sequence of letters": (Items(3, list("fox")), "holds str, not single integers"),
    "bytes in a batch": ([bytearray(b"\3"), bytearray(b"\4")], "give one sequence"),
    "range without end": (range(2 * 10**12), "2000000000000 tokens, above the model's maximum 12"),
    "range without end in a batch": ([[3], range(2 * 10**12)], r"input_ids\[1\] has 2000000000000 tokens"),
    "view without end": (np.broadcast_to(np.array(3), (2 * 10**12,)), "2000000000000 tokens"),
    "views without end": (np.broadcast_to(np.array(3), (2 * 10**6, 2 * 10**6)), "2000000 tokens"),
    "length that is too short": (Items(2, [3, 4, 5]), "has a length of 2, but not that number of items"),
    "length that is too long": (Items(4, [3, 4, 5]), "has a length of 4, but not that number of items"),
    "length that is negative": (Items(-4, [3, 4, 5]), "cannot be read"),
    "length that raises": (Items(KeyError("mine"), [3]), "cannot be read as an array .*mine"),
    "item that raises": (Items(2, OSError("mine")), "cannot be read as an array .*mine"),
    "recursion": (Items(RecursionError("mine"), 3), "cannot be read as an array .*mine"),
    "array that raises": (NoArray(ZeroDivisionError("mine")), "cannot be read as an array .*mine"),
    "array that is none": (NoArray("fox"), "cannot be read as an array"),
    "array that is a number": (NoArray(np.array(3)), r"shape \(\); give"),
    "array of strings": (NoArray(np.array(["fox"])), "dtype <U3; give integers"),
    "array of objects": (np.array([3, 4], dtype=object), "dtype object; give integers"),
    "array of lists": (np.array([[3, 4], [5]], dtype=object), "dtype object; give integers"),
    "masked array": (MASKED, "input_ids is a masked array, whose mask would be lost; give its data"),
    "masked array in a list": ([[3, 4], MASKED], r"input_ids\[1\] is a masked array"),
    "masked array in disguise": (NoArray(MASKED), "masked array"),
    "masked id": ([3, np.ma.masked], r"input_ids\[1\] is a masked array"),
    "bool tensor beside ids": ([3, torch.tensor(True)], "dtype bool at 1; give integers"),
    "bool beside ids": ([3, True], "dtype bool at 1; give integers"),
    "id of 64 bits without sign": (np.array([2**63 + 5], dtype=np.uint64), "does not fit 64 bits"),
    "float beside ids": ([3, 4.0], "float64; give integers"),
    "array as an id": ([3, np.array([4])], "holds ndarray, not single integers"),
    "dictionary as an id": ([3, {}], "holds dict, not single integers"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_ids_are_refused(name: str) -> None:
    ids, message = BAD_IDS[name]
    with pytest.raises(InputError, match=message):
        prepare(ids, None, None, signature())


def test_ids_of_a_read_only_array_are_accepted(tmp_path: Path) -> None:
    np.array([[3, 4], [5, 6]]).tofile(tmp_path / "ids")
    ids = np.memmap(tmp_path / "ids", dtype=np.int64, mode="r", shape=(2, 2))
    batch = batch_of(ids, None, None, signature())
    batch["input_ids"][:] = 9  # the feeds are copies
    assert ids.tolist() == [[3, 4], [5, 6]]


def test_a_mask_may_mix_booleans_and_numbers() -> None:
    mask = [True, 0, 1.0]
    assert batch_of([3, 4, 5], mask, None, signature())["attention_mask"].tolist() == [[1, 0, 1]]


def test_ids_at_the_limits_are_accepted() -> None:
    batch = batch_of([[0] * LONGEST, [VOCAB - 1] * LONGEST], None, None, signature())
    assert batch["input_ids"].tolist() == [[0] * LONGEST, [VOCAB - 1] * LONGEST]


def test_without_limits_any_length_and_any_id_are_accepted() -> None:
    free = signature(max_seqlen=None, vocab_size=None)
    assert batch_of([10**12] * 5000, None, None, free)["input_ids"].tolist() == [[10**12] * 5000]
    with pytest.raises(InputError):
        prepare([2**63 + 5], None, None, free)  # fits uint64, not the graph's int64


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 4], "choices, seqlen"),
        ([[3, 4], [5]], "choices, seqlen"),
        ([[[3, 4], [5, 6]], [[3, 4]]], "different numbers of choices"),
        ([[[[3, 4]]]], "choices, seqlen"),
        (np.full((1, 1, 1, 2), 3), "choices, seqlen"),
        ([[3, True], [4, 5]], r"input_ids\[0\] has dtype bool"),
        ([[3.0, 4.0], [4, 5]], r"input_ids\[0\] has dtype float64; give integers"),
        ([[3, 4], [5, VOCAB]], r"input_ids\[1\] has id 20"),
        ([[3, -4], [5, 6]], "negative id -4"),
        ([[3] * 13, [3] * 13], r"input_ids\[0\] has 13 tokens"),
        (np.full((2, 13), 3), "13 tokens"),
        ([range(2 * 10**12)] * 2, "2000000000000 tokens"),
        ([[], []], "empty sequence"),
        ([[[3, 4]], []], r"input_ids\[1\] is an empty sequence"),
        (np.zeros((2, 0, 3), dtype=int), "empty sequence"),
        (circle(), "nested too deeply"),
        ([circle(), circle()], "nested too deeply"),
        (Itself(), "nested too deeply"),
        ("the fox", "str; give token ids"),
        (["the", "fox"], "str; give an integer array"),
        ([UserString("fox")], "UserString; give"),
        ([[3, None], [4, 5]], "holds NoneType"),
        ([None, [4, 5]], "input_ids"),
        ({0: [3]}, "dict; give an integer array"),
        ([[3, 4], Items(2, OSError("mine"))], "cannot be read as an array .*mine"),
        ([np.ma.masked_array([3, 4]), [4, 5]], "masked array"),
        (np.array([[3, 4], [5, 6]], dtype=object), "dtype object"),
        ([[2**70, 3], [4, 5]], "does not fit 64 bits"),
    ],
)
def test_bad_choices_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(ids, None, None, replace(CHOICES, default_global="none"))


BAD_MASKS = {
    "one sequence": ([1, 1, 1], "{name} has 1 sequences, and input_ids has 2"),
    "one row of two": ([[1, 1, 1]], "{name} has 1 sequences, and input_ids has 2"),
    "other length": ([[1, 1]] * 2, r"shape \(2, 2\) where input_ids has \(2, 3\)"),
    "row too many": ([[1, 1, 1]] * 3, "{name} has 3 sequences, and input_ids has 2"),
    "rows that nobody reads": ([[1, 1, 1]] + [Items(3, OSError("read"))] * 9, "{name} has 10 sequences, and"),
    "ragged": ([[1, 1, 1], [1, 1]], r"lengths \[3, 2\]"),
    "value 2": ([[1, 1, 1], [1, 2, 0]], "the value 2; masks hold 0 and 1 only"),
    "negative": ([[1, 1, 1], [1, -1, 0]], "the value -1"),
    "additive": (np.array([[0.0, 0.0, -np.inf]] * 2), "the value -inf"),
    "half": (np.full((2, 3), 0.5), "the value 0.5"),
    "not a number": (np.full((2, 3), np.nan), "the value nan"),
    "digits as strings": ([["1", "1", "0"]] * 2, "{name}"),
    "complex": (np.full((2, 3), 1 + 0j), "{name}"),
    "timedeltas": (np.ones((2, 3), dtype="m8[s]"), "{name}"),
    "dates": (np.ones((2, 3), dtype="M8[s]"), "{name}"),
    "records": (np.zeros((2, 3), dtype=[("mask", int)]), "{name}"),
    "bfloat16 tensor of twos": (torch.full((2, 3), 2, dtype=torch.bfloat16), "{name}"),
    "None inside": ([[1, 1, None]] * 2, "{name}"),
    "string": ("110110", "{name} is str"),
    "number": (1, "{name} is int"),
    "empty": ([], "{name} is empty"),
    "nested too deep": ([[[1, 1, 1]], [[1, 1, 1]]], "{name}"),
    "list that holds itself": (circle(), "{name} is nested too deeply"),
    "range without end": ([range(2 * 10**12)] * 2, r"{name}\[0\] has 2000000000000 tokens"),
    "masked array": (np.ma.masked_array(np.ones((2, 3)), mask=np.eye(2, 3)), "{name} is a masked array"),
    "not a number in a list": ([[1, 1, float("nan")]] * 2, "the value nan"),
    "strings among numbers": ([[1, 1, "0"]] * 2, "holds str, not single integers"),
    "objects": (np.ones((2, 3), dtype=object), "dtype object; masks hold 0 and 1 only"),
    "above 64 bits": ([[1, 1, 2**70]] * 2, "does not fit 64 bits; masks hold 0 and 1 only"),
    "item that raises": ([Items(3, OSError("mine"))] * 2, "{name} cannot be read as an array .*mine"),
    "mixed nesting": ([[1, 1, 1], 1], "{name}"),
}


@pytest.mark.parametrize("mask_name", GRAPH_INPUTS[1:])
@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_are_refused(mask_name: str, name: str) -> None:
    mask, message = BAD_MASKS[name]
    masks = {"attention_mask": None, "global_attention_mask": None, mask_name: mask}
    with pytest.raises(InputError, match=message.format(name=mask_name)) as caught:
        prepare([[3, 4, 5], [6, 7, 8]], *masks.values(), signature())
    assert mask_name in str(caught.value)


def test_a_padded_rectangle_is_no_mask_for_ragged_ids() -> None:
    with pytest.raises(InputError, match=r"has shape \(2, 3\) where input_ids has lengths \[3, 2\]"):
        prepare([[3, 4, 5], [6, 7]], [[1, 1, 1], [1, 1, 0]], None, signature())


def test_too_many_globals_are_refused_and_masked_ones_do_not_count() -> None:
    two = signature(max_global=2)
    marks = batch_of([[3, 4, 5], [6, 7, 8]], None, [[1, 0, 1], [0, 1, 1]], two)["global_attention_mask"]
    assert marks.tolist() == [[1, 0, 1], [0, 1, 1]]
    with pytest.raises(InputError, match=r"3 global tokens in a row, above this model's maximum 2.*global 3"):
        prepare([[3, 4, 5], [6, 7, 8]], None, [[0, 0, 1], [1, 1, 1]], two)
    prepare([3, 4, 5], [1, 1, 0], [1, 1, 1], two)


def test_too_many_default_globals_are_refused() -> None:
    question = [3, 4, 5, SEP, SEP, 6, SEP]
    with pytest.raises(InputError, match="3 global tokens"):
        prepare(question, None, None, replace(QUESTION, max_global=2))


def test_too_many_globals_in_one_choice_are_refused() -> None:
    with pytest.raises(InputError, match="2 global tokens"):
        prepare([[3, 4], [5, 6]], None, [[0, 1], [1, 1]], replace(CHOICES, max_global=1))


def test_a_model_with_fixed_globals_takes_no_global_mask() -> None:
    assert list(batch_of([3, 4], None, None, FIXED_FIRST)) == ["input_ids", "attention_mask"]
    with pytest.raises(InputError, match=r"fixed \(first\).*leave it out"):
        prepare([3, 4], None, [1, 0], FIXED_FIRST)


def test_a_model_without_attention_mask_takes_no_padding() -> None:
    bare = signature(inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),))
    assert list(batch_of([[3, 4], [5, 6]], [[1, 1], [1, 1]], None, bare)) == ["input_ids"]
    with pytest.raises(InputError, match="takes no attention_mask, so no token can be masked; leave padding out"):
        prepare([3, 4], [1, 0], None, bare)


SEQUENCES = [[3, 4], [5, VOCAB], [6], [], 7, "text", [1.5], [3] * (LONGEST + 1), [[8]], None, [9, 10, 11]]


@pytest.mark.parametrize("as_sequence", [list, tuple], ids=["list", "tuple"])
def test_each_sequence_gets_its_inputs_or_its_own_error(as_sequence: Any) -> None:
    prepared = prepare_each(as_sequence(SEQUENCES), None, None, signature())
    assert [i for i, item in enumerate(prepared) if not isinstance(item, InputError)] == [0, 2, 10]
    for i in (0, 2, 10):
        alone = prepare(SEQUENCES[i], None, None, signature())[0]
        assert {name: array.tolist() for name, array in prepared[i].items()} == {
            name: array.tolist() for name, array in alone.items()
        }
        assert seqlen_of(prepared[i]) == len(SEQUENCES[i])
    messages = {i: str(item) for i, item in enumerate(prepared) if isinstance(item, InputError)}
    for i, message in {1: "vocabulary", 3: "empty", 4: "int", 5: "str", 6: "float", 7: "maximum 12", 9: "None"}.items():
        assert message in messages[i]


def test_a_sequence_that_is_too_long_is_not_copied_before_it_gets_its_error() -> None:
    for ids in (range(2 * 10**12), array.array("q", [3]) * 10**6):
        tracemalloc.start()
        (error,) = prepare_each(ids, None, None, signature())
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert f"{len(ids)} tokens, above the model's maximum 12" in str(error)
        assert largest < 2**20


def test_masks_of_each_sequence_are_checked_alone() -> None:
    ids, two = [[3, 4], [5, 6, 7], [8]], signature(max_global=1)
    prepared = prepare_each(ids, [[1, 0], [1, 1], [1]], [[1, 0], [0, 1, 0], [1]], two)
    assert prepared[0]["attention_mask"].tolist() == [[1, 0]]
    assert "shape (1, 2) where input_ids has (1, 3)" in str(prepared[1])
    assert prepared[2]["global_attention_mask"].tolist() == [[1]]
    assert "2 global tokens" in str(prepare_each([[3, 4], [5]], None, [[1, 1], [1]], two)[0])
    with pytest.raises(InputError, match="attention_mask has 2 sequences, and input_ids has 3"):
        prepare_each(ids, [[1, 1], [1]], None, two)


def test_choices_of_each_sequence_are_checked_alone() -> None:
    prepared = prepare_each(
        [[[3, 4], [5, 6]], [[3], [4, 5]], [3, 4]], None, None, replace(CHOICES, default_global="none")
    )
    assert prepared[0]["input_ids"].shape == (1, 2, 2)
    assert "ragged inside" in str(prepared[1])
    assert isinstance(prepared[2], InputError)


def test_a_range_among_choices_is_not_read_before_it_gets_its_error() -> None:
    choices = replace(CHOICES, default_global="none")
    prepared = prepare_each([range(2 * 10**12), [[3, 4], [5, 6]]], None, None, choices)
    assert isinstance(prepared[0], InputError)
    assert not isinstance(prepared[1], InputError)


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LONGEST), min_size=1, max_size=6))
def test_all_lists_of_sequences_within_the_limits_round_trip(rows: list[list[int]]) -> None:
    batch = batch_of(rows, None, None, signature())
    lengths = [len(row) for row in rows]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == batch["global_attention_mask"].shape == (len(rows), max(lengths))
    for row, length, padded, real in zip(rows, lengths, ids.tolist(), mask.tolist(), strict=True):
        assert padded == row + [PAD] * (max(lengths) - length)
        assert real == [1] * length + [0] * (max(lengths) - length)


DTYPES = ("?", "i1", "u8", "f2", "f8", "c16", "m8[s]", "M8[D]", "S2", "U2", "O", [("id", "i4")])
SHAPES = ((), (0,), (2,), (1, 2), (2, 1), (1, 1, 2), (2, 0, 1))
ARRAYS = st.builds(np.full, st.sampled_from(SHAPES), st.sampled_from((0, 1)), st.sampled_from(DTYPES))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 25)
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=3)
    | st.binary(max_size=3)
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=1), inner, max_size=2)
    )


JUNK = ARRAYS | st.recursive(LEAVES | ARRAYS, _nested, max_leaves=8)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@settings(max_examples=400, deadline=None)
@given(ids=st.just([3, 4]) | JUNK, mask=st.none() | JUNK, marks=st.none() | JUNK)
def test_junk_is_refused_with_an_input_error_or_fits_the_graph(ids: Any, mask: Any, marks: Any) -> None:
    try:
        batch = batch_of(ids, mask, marks, signature())
    except InputError as error:
        assert str(error)
        return
    for name in GRAPH_INPUTS:
        feed = batch[name]
        assert feed.dtype == np.int64
        assert feed.ndim == 2
        assert feed.size > 0
        assert feed.min() >= 0
        assert feed.max() < (VOCAB if name == "input_ids" else 2)


def test_ids_that_another_thread_changes_after_the_check_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([[3, 4, 5]])
    check = inputs._IDS.check

    def check_and_change(array: Any, name: str, model: Signature) -> None:
        check(array, name, model)
        ids[:] = -5  # as another thread could

    monkeypatch.setattr(inputs, "_IDS", replace(inputs._IDS, check=check_and_change))
    assert batch_of(ids, None, None, signature())["input_ids"].tolist() == [[3, 4, 5]]
