"""Every case run three times, by reference, witness and candidate, and the errors collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lfx.errors import ParityError
from lfx.parity.cases import Arrays, Case
from lfx.parity.result import OutputResult, Report

Runner = Callable[[Arrays], Arrays]
# Outputs whose largest entry along the last axis is the answer.
LABEL_OUTPUTS = ("logits", "start_logits", "end_logits")


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
    names: tuple[str, str] | None = None,
    multi_label: bool = False,
    on_case: Callable[[Case], None] = lambda case: None,
) -> Report:
    """Run every case three times and collect the errors; the verdict is the report's.

    Args:
        reference, witness, candidate: take the graph inputs by name and return the outputs by name. witness None: the
            reference is its own witness, and errs by nothing.
        precision: fp32, fp16, bf16 or int8, of the witness and the candidate.
        layers: attention layers, for the rounding band; depth: those in front of an output that has fewer.
        names: of reference and witness, for people; default: `Report`'s.
        multi_label: each entry of the logits is a decision of its own.
        on_case: called before each case, to show progress.
    Raises:
        ParityError: an output is missing, has another shape than the reference's, or is NaN in reference or witness.
    """
    report = Report(precision, layers, depth=dict(depth or {}), names=names or Report.names)
    for case in cases:
        on_case(case)
        inputs = make_inputs(case)
        right = reference(inputs)
        witnessed, ours = witness(inputs) if witness is not None else right, candidate(inputs)
        for outputs, whose in ((right, report.names[0]), (witnessed, f"{report.names[1]} in {precision}")):
            _refuse_nan(outputs, whose, case)
        if set(right) != set(ours):
            raise ParityError(f"the model has outputs {sorted(right)}, the artifact {sorted(ours)}")
        row = {}
        for name, expected in right.items():
            if ours[name].shape != expected.shape:
                raise ParityError(
                    f"{name} has shape {ours[name].shape} where the model's is {expected.shape}, at {case}"
                )
            result = report.outputs.setdefault(name, OutputResult())
            row[name] = result.add(case, expected, witnessed[name], ours[name])
            if name in LABEL_OUTPUTS:
                result.add_labels(expected, ours[name], multi_label=multi_label)
        report.rows.append((case, row))
    return report


def _refuse_nan(outputs: Arrays, whose: str, case: Case) -> None:
    if case.padding == "empty_row":
        return  # a mean over no token is 0 / 0 by definition
    for name, array in outputs.items():
        if nans := int(np.isnan(array).sum()):
            raise ParityError(
                f"{name} of {whose} is NaN in {nans:,} of {array.size:,} values, at {case}: the model overflows, "
                "and no artifact of it can be right"
            )
