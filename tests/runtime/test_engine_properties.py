"""Random arguments of an Engine: valid ones give Hugging Face's outputs, others are an InputError."""

from __future__ import annotations

from collections import UserList, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lfx.errors import InputError
from lfx.runtime import Engine
from tests.conftest import MakeBundle
from tests.models import VOCAB_SIZE, tiny_model

LONGEST = 128
# A fraction of the profile's number of examples, which `make fuzz` increases.
HALF = settings(max_examples=max(settings().max_examples // 2, 1))
INTEGERS = tuple(f"{order}{kind}" for order in "<>" for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
MASKS = (*INTEGERS, "?", "f2", "f4", "f8")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def chooser() -> Any:
    return tiny_model("multiple-choice")


@pytest.fixture(scope="module")
def engine(bundle: MakeBundle) -> Iterator[Engine]:
    with Engine(bundle(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def chooser_engine(bundle: MakeBundle) -> Iterator[Engine]:
    with Engine(bundle("multiple-choice"), threads=1) as opened:
        yield opened


def in_form(draw: st.DrawFn, rows: list[Any], dtypes: tuple[str, ...]) -> Any:
    """The same numbers as a list, a tuple, another sequence or an array of some dtype."""
    dtype = draw(st.sampled_from(dtypes))

    def row_in_form(row: Any) -> Any:
        array = row.astype(dtype)
        form = draw(st.integers(0, 4))
        if form == 0:
            return array
        if form == 1:
            return np.repeat(array, 2, axis=-1)[..., ::2]  # not contiguous
        if form == 2 and dtype in ("<i4", "<i8", "?", "f4"):
            return torch.from_numpy(array.copy())
        container = (list, tuple, deque, UserList)[draw(st.integers(0, 3))]
        return container(array.tolist() if array.ndim == 1 else [container(choice.tolist()) for choice in array])

    shapes = {row.shape for row in rows}
    if len(rows) == 1 and draw(st.booleans()):
        return row_in_form(rows[0])
    if len(shapes) == 1 and draw(st.booleans()):
        array = np.stack(rows).astype(dtype)
        array.setflags(write=draw(st.booleans()))
        return array
    return draw(st.sampled_from((list, tuple)))(row_in_form(row) for row in rows)


@st.composite
def requests(draw: st.DrawFn, choices: tuple[int, ...] = ()) -> dict[str, Any]:
    """Rows of ids, masks and global masks, and the same rows in a form that a caller may give."""
    length = st.one_of(st.integers(1, 20), st.integers(1, LONGEST), st.just(LONGEST))
    if draw(st.booleans()):
        lengths = [draw(length)] * draw(st.integers(1, 3))
    else:
        lengths = draw(st.lists(length, min_size=1, max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids, masks, marks = [], [], []
    for n in lengths:
        shape = (*choices, n)
        ids.append(random.integers(0, VOCAB_SIZE, shape))
        hidden, side = draw(st.integers(0, n - 1)), draw(st.sampled_from(("none", "left", "right", "anywhere")))
        mask = np.ones(shape, dtype=int)
        if side == "left":
            mask[..., :hidden] = 0
        elif side == "right":
            mask[..., n - hidden :] = 0
        elif side == "anywhere":
            mask[...] = random.random(shape) < draw(st.sampled_from((0.2, 0.9)))
        masks.append(mask)
        marks.append((random.random(shape) < draw(st.sampled_from((0.0, 0.05, 0.5, 1.0)))).astype(int))
    has_mask, has_marks = draw(st.booleans()), bool(choices) or draw(st.booleans())
    masks = masks if has_mask else [np.ones_like(row) for row in ids]
    marks = marks if has_marks else [np.zeros_like(row) for row in ids]
    return {
        "rows": list(zip(ids, masks, marks, strict=True)),
        "ids": in_form(draw, ids, INTEGERS),
        "mask": in_form(draw, masks, MASKS) if has_mask else None,
        "marks": in_form(draw, marks, MASKS) if has_marks else None,
    }


@HALF
@given(request=requests())
def test_valid_requests_of_any_form_give_what_hugging_face_gives(
    request: dict[str, Any], engine: Engine, model: Any
) -> None:
    outputs = engine.run(request["ids"], request["mask"], request["marks"])
    assert all(len(output) == len(request["rows"]) for output in outputs.values())
    for i, row in enumerate(request["rows"]):
        with torch.no_grad():
            theirs = model(*(torch.from_numpy(array[None]) for array in row))
        ours = outputs["last_hidden_state"][i]
        assert ours.shape == (len(row[0]), 32)
        real = row[1] == 1
        expected = theirs["last_hidden_state"][0].numpy()
        np.testing.assert_allclose(ours[real], expected[real], rtol=0, atol=1e-4)
        if real[0]:  # the pooler's output is that of the first token
            np.testing.assert_allclose(
                outputs["pooler_output"][i], theirs["pooler_output"][0].numpy(), rtol=0, atol=1e-5
            )


@pytest.mark.slow
@HALF
@given(request=requests((2,)))
def test_valid_choices_of_any_form_give_what_hugging_face_gives(
    request: dict[str, Any], chooser_engine: Engine, chooser: Any
) -> None:
    logits = chooser_engine.run(request["ids"], request["mask"], request["marks"])["logits"]
    assert len(logits) == len(request["rows"])
    for i, (ids, mask, marks) in enumerate(request["rows"]):
        with torch.no_grad():
            theirs = chooser(
                torch.from_numpy(ids[None]),
                attention_mask=torch.from_numpy(mask[None]),
                global_attention_mask=torch.from_numpy(marks[None]),
            )
        real = mask[:, 0] == 1
        np.testing.assert_allclose(logits[i][real], theirs["logits"][0].numpy()[real], rtol=0, atol=1e-4)


NUMBERS = st.one_of(st.integers(-2, 120), st.integers(), st.floats(), st.booleans(), st.complex_numbers())
LEAVES = st.one_of(
    st.none(), NUMBERS, st.text(max_size=4), st.binary(max_size=4), st.fractions(), st.decimals(), st.just(np.ma.masked)
)
SMALL_ARRAY = st.one_of(
    arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)),
    st.builds(np.array, st.lists(NUMBERS, max_size=3), dtype=st.just(object)),
    st.builds(np.ma.masked_array, st.lists(st.integers(0, 9), max_size=3)),
)
ANYTHING = st.recursive(
    LEAVES | SMALL_ARRAY,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(st.text(max_size=2), inner, max_size=2),
        st.lists(inner, max_size=3).map(iter),
    ),
    max_leaves=12,
)
VALID = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3)


@given(ids=VALID | ANYTHING, mask=st.none() | ANYTHING, marks=st.none() | ANYTHING)
def test_any_object_is_run_or_is_an_input_error(ids: Any, mask: Any, marks: Any, engine: Engine) -> None:
    try:
        outputs = engine.run(ids, mask, marks)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(np.isfinite(row).all() for output in outputs.values() for row in output)


@pytest.mark.slow
@given(ids=st.lists(VALID, min_size=2, max_size=2) | ANYTHING, mask=st.none() | ANYTHING, marks=st.none() | ANYTHING)
def test_any_object_as_choices_is_run_or_is_an_input_error(
    ids: Any, mask: Any, marks: Any, chooser_engine: Engine
) -> None:
    try:
        chooser_engine.run(ids, mask, marks)
    except InputError as error:
        assert "\n" not in str(error)


@given(documents=st.lists(VALID, max_size=3) | st.lists(ANYTHING, max_size=3) | ANYTHING, ahead=st.integers(1, 3))
def test_any_object_is_a_stream_or_an_input_error(documents: Any, ahead: int, engine: Engine) -> None:
    try:
        results = list(engine.stream(documents, ahead=ahead))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(np.isfinite(output).all() for outputs in results for output in outputs.values())
