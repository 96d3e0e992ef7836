"""`compare`: run each case with reference, witness and candidate, and collect the errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lfx.errors import ParityError
from lfx.parity.cases import Arrays, Case
from lfx.parity.result import OutputResult, Report

Runner = Callable[[Arrays], Arrays]
# Outputs whose argmax along the last axis is the model's decision.
LABEL_OUTPUTS = ("logits", "first_logits", "start_logits", "end_logits")


def compare(
    cases: Sequence[Case],
    make_inputs: Callable[[Case], Arrays],
    *,
    reference: Runner,
    witness: Runner | None,
    candidate: Runner,
    precision: str,
    layers: int,
    depth: Mapping[str, int] | None = None,
    probabilities: frozenset[str] = frozenset(),
    names: tuple[str, str] | None = None,
    multi_label: bool = False,
    float_precision: str = "fp32",
    on_case: Callable[[Case], None] = lambda case: None,
) -> Report:
    """Run each case with reference, witness and candidate, and collect the errors.

    Args:
        cases: the cases to run, in order.
        make_inputs: returns the inputs of a case by name, such as `inputs_of`.
        reference, witness, candidate: functions from inputs by name to outputs by name. Without a witness (None) the
            witness error is 0.
        precision: fp32, fp16, bf16 or int8, of the witness and the candidate.
        layers: number of attention layers, for the rounding band.
        depth: output name -> number of attention layers before it, if fewer than `layers`.
        probabilities: names of the outputs that are results of a softmax.
        names: names of reference and witness, for messages; default: those of `Report`.
        float_precision: of the candidate's layers that are not int8.
        multi_label: each entry of the logits is a decision by its sign; otherwise the argmax is.
        on_case: called before each case, to show progress.
    Returns:
        The errors; `Report.require` raises ParityError if an output is out of tolerance.
    Raises:
        ParityError: an output is missing, has another shape than the reference's, or is NaN in reference or witness.
    """
    report = Report(
        precision,
        layers,
        depth=dict(depth or {}),
        probabilities=probabilities,
        names=names or Report.names,
        float_precision=float_precision,
    )
    for case in cases:
        on_case(case)
        inputs = make_inputs(case)
        expected = reference(inputs)
        witnessed, actual = witness(inputs) if witness is not None else expected, candidate(inputs)
        for outputs, source in ((expected, report.names[0]), (witnessed, f"{report.names[1]} in {precision}")):
            _refuse_nan(outputs, source, case)
        if set(expected) != set(actual):
            raise ParityError(
                f"the model has outputs {sorted(expected)}, the artifact {sorted(actual)}; give the model that it was "
                "exported from"
            )
        row = {}
        for name, array in expected.items():
            if actual[name].shape != array.shape:
                raise ParityError(
                    f"{name} has shape {actual[name].shape}, but the model's has shape {array.shape}, at {case}; give "
                    "the model that the artifact was exported from"
                )
            result = report.outputs.setdefault(name, OutputResult())
            row[name] = result.add(case, array, witnessed[name], actual[name])
            if name in LABEL_OUTPUTS:
                result.add_labels(array, actual[name], multi_label=multi_label)
        report.rows.append((case, row))
    return report


def _refuse_nan(outputs: Arrays, source: str, case: Case) -> None:
    if case.padding == "empty_row":
        return  # a mean over no token is 0 / 0
    for name, array in outputs.items():
        if nans := int(np.isnan(array).sum()):
            raise ParityError(
                f"{name} of {source} is NaN in {nans:,} of {array.size:,} values, at {case}: the model overflows; "
                "export it in a precision of larger range, or give another checkpoint"
            )
