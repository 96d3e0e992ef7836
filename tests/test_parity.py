"""The verdict of a comparison: errors that pass, and errors that fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from lfx.errors import ParityError
from lfx.parity import (
    GLOBALS,
    PADDINGS,
    Arrays,
    Case,
    OutputResult,
    Report,
    compare,
    full_cases,
    inputs_of,
    quick_cases,
    rounding_band,
)

NOISE = 1e-6


def _report(shift: float = 0.0, witness_shift: float = 0.0, rows: int = 500, **options: object):
    def exact(inputs: Arrays) -> Arrays:
        return {"logits": np.sin(inputs["input_ids"].astype(float))}

    def off_by(amount: float):
        return lambda inputs: {"logits": exact(inputs)["logits"] + amount}

    return compare(
        [Case(rows, 5), Case(1, 3)],
        lambda case: inputs_of(case, vocab_size=50, pad_token_id=1),
        reference=exact,
        witness=off_by(NOISE + witness_shift),
        candidate=options.get("candidate", off_by(shift)),
        precision="fp32",
        layers=2,
    )


def test_twice_the_error_of_pytorch_passes() -> None:
    _report(2 * NOISE).require()


def test_an_error_above_the_tolerance_fails_and_says_where_and_how_far() -> None:
    report = _report(1e-4)
    with pytest.raises(ParityError, match=r"logits: error 0\.0001 .* batch 500, length 5"):
        report.require()
    assert report.to_dict()["passed"] is False


def test_tolerance_is_the_documented_sum() -> None:
    report = _report()
    band = math.sqrt(24) * 2.0**-24 * report.outputs["logits"].magnitude
    assert report.tolerance("logits") == pytest.approx(2 * NOISE + band, rel=1e-6)


def test_the_band_of_probabilities_grows_with_the_range_of_the_scores() -> None:
    """Scores in float32, as far apart as in trained models, round by more than the band of the largest probability."""
    scores = np.random.default_rng(0).normal(0.0, 20.0, (1000, 64))

    def softmax(values: np.ndarray) -> np.ndarray:
        shifted = np.exp(values - values.max(-1, keepdims=True))
        return shifted / shifted.sum(-1, keepdims=True)

    exact = softmax(scores)
    rounded = softmax(scores * (1 + 32 * 2.0**-24 * np.sign(np.sin(np.arange(64)))))
    for probabilities in (frozenset(), frozenset({"attentions.0"})):
        report = Report("fp32", 1, probabilities=probabilities)
        report.outputs["attentions.0"] = OutputResult()
        report.outputs["attentions.0"].add(Case(1, 64), exact, rounded, rounded)
        assert report.passed("attentions.0") == bool(probabilities)
    plain, wide = (rounding_band("fp32", 1, exact.max()), report.band("attentions.0"))
    assert wide == pytest.approx(plain * (1 - math.log(exact.min())))


def test_where_few_numbers_are_compared_the_rms_error_of_pytorch_counts() -> None:
    few, many = _report(rows=2), _report()
    band = few.band("logits")
    assert few.tolerance("logits") == pytest.approx(2 * 3.5 * NOISE + band, rel=1e-6)
    assert many.tolerance("logits") < few.tolerance("logits")


def _int8_report(error: float, witness_error: float, count: int = 3000, floats: str = "fp32") -> Report:
    """Compare outputs whose errors are normally distributed, in int8."""
    report = Report("int8", 2, float_precision=floats)
    report.outputs["logits"] = result = OutputResult()
    draw = np.random.default_rng(count).standard_normal
    exact = np.sin(np.arange(float(count)))
    result.add(Case(1, count), exact, exact + witness_error * draw(count), exact + error * draw(count))
    return report


def test_in_int8_the_rms_error_is_bounded_by_that_of_pytorch() -> None:
    _int8_report(1.1e-2, 1e-2).require()
    with pytest.raises(ParityError, match="root mean square error"):
        _int8_report(1.5e-2, 1e-2).require()


def test_in_int8_the_bound_of_fewer_numbers_is_wider_and_of_a_few_there_is_none() -> None:
    _int8_report(1.3e-2, 1e-2, 1100).require()
    with pytest.raises(ParityError, match="root mean square error"):
        _int8_report(1.6e-2, 1e-2, 1100).require()
    _int8_report(1.6e-2, 1e-2, 14).require()


def test_an_output_of_layers_that_stay_float32_may_have_float32s_rounding() -> None:
    """That of one implementation may be twice that of another, and int8's bound is 1.25 times PyTorch's."""
    _int8_report(4e-7, 2e-7).require()
    with pytest.raises(ParityError, match="root mean square error"):
        _int8_report(4e-6, 2e-7).require()
    _int8_report(2e-3, 2e-7, floats="bf16").require()


def test_a_large_fill_value_does_not_raise_the_tolerance_of_the_others() -> None:
    def filled(shift: float) -> Callable[[Arrays], Arrays]:
        return lambda inputs: {
            "logits": np.where(inputs["input_ids"] % 5 == 0, -1e9, np.sin(inputs["input_ids"]) + shift)
        }

    def report(shift: float) -> Report:
        return compare(
            [Case(500, 5)],
            lambda case: inputs_of(case, vocab_size=50, pad_token_id=1),
            reference=filled(0.0),
            witness=filled(NOISE),
            candidate=filled(shift),
            precision="fp32",
            layers=2,
        )

    report(NOISE).require()
    assert report(NOISE).outputs["logits"].magnitude == 100.0
    with pytest.raises(ParityError, match=r"error 0\.001 is above the tolerance"):
        report(1e-3).require()


def test_nan_fails() -> None:
    report = _report(candidate=lambda inputs: {"logits": np.full(inputs["input_ids"].shape, np.nan)})
    with pytest.raises(ParityError, match="error inf"):
        report.require()
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))  # JSON has no infinity
    assert (data["passed"], data["outputs"]["logits"]["max_abs_error"]) == (False, None)


@pytest.mark.parametrize("whose", ["reference", "witness"])
def test_a_model_that_gives_nan_is_refused_with_output_and_case(whose: str) -> None:
    def run(inputs: Arrays, **changes: float) -> Arrays:
        logits = np.sin(inputs["input_ids"].astype(float))
        logits[0, 0] = changes.get("first", 0.0)
        return {"logits": logits}

    runs = {"reference": run, "witness": run, "candidate": partial(run, first=np.nan)}
    runs[whose] = partial(run, first=np.nan)

    def report(case: Case) -> Report:
        make = partial(inputs_of, vocab_size=50, pad_token_id=1)
        return compare([case], make, precision="fp32", layers=2, **runs)

    with pytest.raises(ParityError, match=r"logits of .* is NaN in 1 of 10 values, at batch 2, length 5"):
        report(Case(2, 5))
    report(Case(2, 5, padding="empty_row"))  # a mean over no token is NaN


@pytest.mark.parametrize("fill", [-np.inf, np.finfo(np.float64).min, float(np.finfo(np.float32).min)])
def test_fill_values_do_not_raise_the_tolerance(fill: float) -> None:
    def filled(by: float, amount: float):
        def run(inputs: Arrays) -> Arrays:
            logits = np.sin(inputs["input_ids"].astype(float)) + amount
            logits[:, 0] = by
            return {"logits": logits}

        return run

    def report(candidate) -> Report:
        return compare(
            [Case(500, 5)],
            lambda case: inputs_of(case, vocab_size=50, pad_token_id=1),
            reference=filled(fill, 0.0),
            witness=filled(-np.inf, NOISE),
            candidate=candidate,
            precision="fp32",
            layers=2,
        )

    report(filled(float(np.finfo(np.float32).min), NOISE)).require()
    assert report(filled(-np.inf, 0.0)).tolerance("logits") < 1e-4
    for wrong in (filled(-np.inf, 1e-3), filled(0.0, 0.0), filled(np.inf, 0.0), filled(np.nan, 0.0)):
        with pytest.raises(ParityError, match="above the tolerance"):
            report(wrong).require()


def test_a_label_is_the_largest_entry_and_of_many_labels_each_a_decision() -> None:
    expected = np.array([[3.0, 1.0, -2.0], [-1.0, -3.0, -2.0]])
    actual = np.array([[3.0, -1.0, -2.0], [-3.0, -1.0, 2.0]])
    one, many = OutputResult(), OutputResult()
    one.add_labels(expected, actual, multi_label=False)
    many.add_labels(expected, actual, multi_label=True)
    assert (one.agreeing, one.labels) == (1, 2)
    assert (many.agreeing, many.labels) == (4, 6)
    many.add_labels(expected[:, :1], actual[:, :1], multi_label=True)
    assert many.labels == 6  # rows of a single entry are not counted


def test_a_witness_that_computes_something_else_fails() -> None:
    with pytest.raises(ParityError, match="do not compute the same"):
        _report(witness_shift=0.1).require()


def test_missing_outputs_and_other_shapes_fail() -> None:
    with pytest.raises(ParityError, match="has outputs"):
        _report(candidate=lambda inputs: {"other": inputs["input_ids"]})
    with pytest.raises(ParityError, match="shape"):
        _report(candidate=lambda inputs: {"logits": inputs["input_ids"][:, :1]})


def test_full_cases_cover_every_boundary_pattern_and_padding() -> None:
    cases = full_cases(8, 128)
    lengths = {case.seqlen for case in cases}
    assert {1, 7, 8, 9, 15, 16, 17, 31, 33, 48} <= lengths
    assert {case.batch for case in cases} == {1, 2, 3, 4}
    assert {case.globals for case in cases} == set(GLOBALS)
    assert {case.padding for case in cases} == set(PADDINGS)
    for length in (7, 8, 9, 16, 17):
        assert {c.globals for c in cases if c.seqlen == length} == set(GLOBALS)


@pytest.mark.parametrize("cases", [quick_cases, full_cases])
def test_cases_keep_within_the_model(cases) -> None:
    assert max(case.seqlen for case in cases(256, 20)) == 20
    assert all(case.seqlen % 16 == 0 for case in cases(8, None, 16))
    assert len(set(cases(8, 128))) == len(cases(8, 128))


def test_inputs_follow_their_case() -> None:
    def make(globals_: str, padding: str) -> Arrays:
        return inputs_of(Case(4, 20, globals_, padding), vocab_size=99, pad_token_id=1)

    assert make("all", "none")["global_attention_mask"].all()
    assert make("first", "none")["global_attention_mask"].sum(axis=1).tolist() == [1] * 4
    assert len(set(make("ragged", "none")["global_attention_mask"].sum(axis=1))) == 4
    marks = make("adjacent", "none")["global_attention_mask"]
    assert all(np.diff(np.flatnonzero(row)).max() == 1 for row in marks)
    left, right = make("none", "left")["attention_mask"], make("none", "right")["attention_mask"]
    assert left[0, 0] == 0 and left[0, -1] == 1
    assert right[0, 0] == 1 and right[0, -1] == 0
    empty = make("none", "empty_row")["attention_mask"]
    assert empty[:-1].all() and not empty[-1].any()
    holes = make("none", "holes")
    assert (holes["attention_mask"] == 0).any() and (holes["input_ids"] != 1).all()
    padded = make("none", "right")
    assert (padded["input_ids"][padded["attention_mask"] == 0] == 1).all()
    ids = make("none", "none")["input_ids"]
    assert ids.min() >= 0 and ids.max() < 99 and (ids != 1).all()
    few = inputs_of(Case(2, 20, "all"), vocab_size=99, pad_token_id=1, max_global=3)
    assert few["global_attention_mask"].sum(axis=1).tolist() == [3, 3]
