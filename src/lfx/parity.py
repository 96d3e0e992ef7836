"""Are the numbers the model's? Cases, derived tolerance and verdict, for any two ways to run a model.

Three runs of every case are compared: the dense float64 reference, which is right by definition; PyTorch in the
precision at hand, the witness; and the candidate. Per output,

    tolerance = 2 · (PyTorch's largest error against the reference) + band
    band      = √n · u · max|reference|

so a candidate may be at most twice as wrong as PyTorch, plus the rounding that n operations in a row leave behind
(Higham & Mary 2019: the error of n roundings grows as √n · u), u being the unit roundoff of the precision. Errors
are pooled over all cases, since the largest error of two numbers is luck and that of thousands is not. A pool of
fewer than 2,000 numbers (the logits of a classifier) is too small for that: PyTorch's largest error is then taken to
be at least 3.5 times its root mean square, which a normal error exceeds once in 2,000. A witness that is more than
`WITNESS_BANDS` bands off means that reference and PyTorch disagree, and fails too.

In int8 the witness is PyTorch with the same linear layers rounded to the same steps, and u is half a step of the
weights' range. What rounding to int8 costs is a fact of the model and not an error of the artifact: the verdict says
whether the artifact computes what int8 should, and cosine and label agreement say what that is worth. Since all
numbers are off there, the root mean square of the errors must be at most 1.25 times the witness's too: of two models
that round to the same steps it is nearly equal, whatever the number that happens to be the worst.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.config import QUANTIZED
from lfx.errors import ParityError

Arrays = dict[str, NDArray[Any]]
Runner = Callable[[Arrays], Arrays]

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 2.0**-8}
# Rounded operations in a row: projection, scores, softmax, context, output projection, residual norm, two
# feed-forward projections, activation, residual norm; and embedding sum, its norm and a head of two layers.
OPS_PER_LAYER = 10
OPS_AROUND = 4
WITNESS_BANDS = 32.0
INT8_RMS = 1.25
SMALL_POOL, TAIL = 2000, 3.5  # a normal error exceeds 3.5 standard deviations once in 2,000

# No number of a model is as large as the first; what a model fills hidden places with is, in float64: an infinity or
# finfo.min. In float16 that is at least the second.
FILL, LEAST_FILL = 1e30, 65504.0
# Decades of the error histograms, four bars each: below a float32's last bit to as large as anything.
HISTOGRAM_EDGES = np.logspace(-12, 4, 65)
# Outputs whose largest entry along the last axis is the answer.
LABEL_OUTPUTS = ("logits", "start_logits", "end_logits")

GLOBALS = ("none", "first", "scattered", "adjacent", "all", "ragged")
PADDINGS = ("none", "right", "left", "holes", "empty_row")


@dataclass(frozen=True)
class Case:
    """One input shape and mask pattern.

    Attributes:
        globals: none, first, scattered (few, apart), adjacent (a run), all, or ragged (another count in each row).
        padding: none, right, left, holes (masked tokens inside), or empty_row (the last row has no real token).
    """

    batch: int
    seqlen: int
    globals: str = "none"
    padding: str = "none"

    def __str__(self) -> str:
        return f"batch {self.batch}, length {self.seqlen}, globals {self.globals}, padding {self.padding}"


def quick_cases(window: int, max_seqlen: int | None, multiple_of: int = 1) -> list[Case]:
    """The spread that every export is validated with: about five windows' worth of tokens.

    Args:
        window: widest one-sided window, tokens.
        multiple_of: lengths are rounded up to this, for a torch model that takes no others.
    """
    wanted = [
        Case(1, 1),
        Case(2, 7, "first", "empty_row"),
        Case(1, max(2, min(window - 1, 64)), "all", "left"),
        Case(2, window + 1, "ragged", "right"),
        Case(1, 2 * window + 3, "scattered", "holes"),
    ]
    return _fit(wanted, max_seqlen, multiple_of)


def full_cases(window: int, max_seqlen: int | None, multiple_of: int = 1) -> list[Case]:
    """Lengths around every boundary up to three windows, each with every global pattern; batch and padding cycle."""
    total = 2 * window
    lengths = sorted(
        {
            1,
            2,
            window - 1,
            window,
            window + 1,
            total - 1,
            total,
            total + 1,
            2 * total - 1,
            2 * total + 1,
            3 * total,
        }
        - {0}
    )
    paddings = itertools.cycle(PADDINGS)
    batches = itertools.cycle((1, 2, 3, 4, 2, 3))
    wanted = [Case(next(batches), length, pattern, next(paddings)) for length in lengths for pattern in GLOBALS]
    return _fit(wanted, max_seqlen, multiple_of)


def _fit(cases: Iterable[Case], max_seqlen: int | None, multiple_of: int) -> list[Case]:
    fitted = []
    for case in cases:
        seqlen = -(-case.seqlen // multiple_of) * multiple_of
        if max_seqlen is not None and seqlen > max_seqlen:
            seqlen = max_seqlen // multiple_of * multiple_of
        padding = "none" if case.batch == 1 and case.padding == "empty_row" else case.padding
        fitted.append(Case(case.batch, max(seqlen, 1), case.globals, padding))
    return list(dict.fromkeys(fitted))


def inputs_of(
    case: Case,
    *,
    vocab_size: int,
    pad_token_id: int,
    max_global: int | None = None,
    choices: int | None = None,
    seed: int = 0,
) -> Arrays:
    """Random ids and the masks of a case.

    Args:
        max_global: at most so many global tokens a row.
        choices: for multiple choice, the second axis of all inputs.
    Returns:
        input_ids, attention_mask, global_attention_mask: (batch, seqlen) or (batch, choices, seqlen) int64.
    """
    rows = case.batch * (choices or 1)
    random = np.random.default_rng([seed, case.seqlen, rows, GLOBALS.index(case.globals)])
    ids = random.integers(0, max(vocab_size - 1, 1), (rows, case.seqlen))
    ids[ids >= pad_token_id] += vocab_size > 1  # any id but the padding one
    mask = np.ones_like(ids)
    for row in range(rows):
        _pad_row(mask[row], case.padding, row, last=row == rows - 1, random=random)
    ids = np.where(mask == 1, ids, pad_token_id) if case.padding != "holes" else ids
    marks = np.zeros_like(ids)
    for row in range(rows):
        for position in _global_positions(case.globals, row, case.seqlen, random)[:max_global]:
            marks[row, position] = 1
    shape = (case.batch, choices, case.seqlen) if choices else (case.batch, case.seqlen)
    return {
        "input_ids": ids.reshape(shape).astype(np.int64),
        "attention_mask": mask.reshape(shape).astype(np.int64),
        "global_attention_mask": marks.reshape(shape).astype(np.int64),
    }


def _pad_row(mask: NDArray[Any], padding: str, row: int, *, last: bool, random: np.random.Generator) -> None:
    seqlen = len(mask)
    amount = min(seqlen - 1, seqlen * (1 + row % 3) // 4)
    if padding == "right" and amount:
        mask[-amount:] = 0
    elif padding == "left" and amount:
        mask[:amount] = 0
    elif padding == "holes":
        mask[random.random(seqlen) < 0.2] = 0
    elif padding == "empty_row" and last:
        mask[:] = 0


def _global_positions(pattern: str, row: int, seqlen: int, random: np.random.Generator) -> list[int]:
    if pattern == "none":
        return []
    if pattern == "first":
        return [0]
    if pattern == "all":
        return list(range(seqlen))
    if pattern == "adjacent":
        start = int(random.integers(0, max(seqlen - 4, 1)))
        return list(range(start, min(start + 5, seqlen)))
    count = min(4, seqlen) if pattern == "scattered" else min(3 * row, seqlen)
    return sorted(int(p) for p in random.choice(seqlen, count, replace=False))


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors of one output in one case: the candidate's and PyTorch's."""

    error: float
    torch_error: float


@dataclass
class OutputResult:
    """One output over all cases, against the float64 reference.

    Attributes:
        error, torch_error: largest absolute error, of the candidate and of PyTorch. worst: where the former is.
        magnitude: largest absolute value of the reference.
        squares, torch_squares: sums of squared errors, of the candidate and of PyTorch, over `count` numbers.
        products: sums of candidate · reference, candidate² and reference².
        labels, agreeing: decisions of a head, and those that are the reference's.
        histogram, torch_histogram: absolute errors that are not 0, counted between HISTOGRAM_EDGES.
    """

    error: float = 0.0
    torch_error: float = 0.0
    magnitude: float = 0.0
    worst: Case | None = None
    count: int = 0
    squares: float = 0.0
    torch_squares: float = 0.0
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    labels: int = 0
    agreeing: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))
    torch_histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))

    def add(self, case: Case, right: NDArray[Any], witness: NDArray[Any], ours: NDArray[Any]) -> Errors:
        """Take in one case; returns its largest errors.

        Where the reference is infinite, a fill value such as finfo.min or not a number, the others must be so too: it
        counts as an error of 0, or an infinite one, and adds to no magnitude.
        """
        right, ours = right.astype(np.float64), ours.astype(np.float64)
        filled = ~(np.abs(right) < FILL)
        errors, torch_errors = (_errors(found, right, filled) for found in (ours, witness.astype(np.float64)))
        found = Errors(_largest(errors), _largest(torch_errors))
        if self.worst is None or not found.error <= self.error:
            self.error, self.worst = found.error, case
        self.torch_error = max(self.torch_error, found.torch_error)
        self.squares += float(np.square(errors).sum())
        self.torch_squares += float(np.square(torch_errors).sum())
        self.count += torch_errors.size
        right, ours = np.where(filled, 0.0, right), np.where(filled, 0.0, np.nan_to_num(ours))
        self.magnitude = max(self.magnitude, _largest(right))
        self.products += [float((ours * right).sum()), float((ours**2).sum()), float((right**2).sum())]
        self.histogram += np.histogram(np.abs(errors), HISTOGRAM_EDGES)[0]
        self.torch_histogram += np.histogram(np.abs(torch_errors), HISTOGRAM_EDGES)[0]
        return found

    def add_labels(self, right: NDArray[Any], ours: NDArray[Any], *, multi_label: bool) -> None:
        """Count the rows whose largest entry is at the same place, or with `multi_label` the entries of one sign.

        A single entry is no choice.
        """
        if right.shape[-1] < 2:
            return
        same = (right > 0) == (ours > 0) if multi_label else right.argmax(axis=-1) == ours.argmax(axis=-1)
        self.labels += same.size
        self.agreeing += int(same.sum())

    def cosine(self) -> float:
        """Of candidate and reference, all numbers as one vector; 1 where both are zero."""
        both, ours, right = self.products
        return float(both / math.sqrt(ours * right)) if ours * right > 0 else float(ours == right)

    def label_agreement(self) -> float | None:
        """Share of decisions that are the reference's, 0 to 1; None for an output that is no head's."""
        return self.agreeing / self.labels if self.labels else None

    def likely_torch_error(self) -> float:
        """PyTorch's largest error, or what it might as well have been where few numbers were compared."""
        if self.count >= SMALL_POOL:
            return self.torch_error
        return max(self.torch_error, TAIL * math.sqrt(self.torch_squares / max(self.count, 1)))


@dataclass
class Report:
    """What a comparison measured.

    Attributes:
        rows: for each case, the errors of each output.
        depth: attention layers in front of an output, where they are not all `layers`.
        names: of the reference and of the witness, for people.
    """

    precision: str
    layers: int
    outputs: dict[str, OutputResult] = field(default_factory=dict)
    rows: list[tuple[Case, dict[str, Errors]]] = field(default_factory=list)
    depth: dict[str, int] = field(default_factory=dict)
    names: tuple[str, str] = ("the dense float64 reference", "PyTorch")

    def band(self, output: str) -> float:
        """Rounding that a chain of operations leaves; see the module's docstring."""
        operations = OPS_PER_LAYER * self.depth.get(output, self.layers) + OPS_AROUND
        return math.sqrt(operations) * UNIT_ROUNDOFF[self.precision] * self.outputs[output].magnitude

    def tolerance(self, output: str) -> float:
        """Largest error that passes."""
        return 2.0 * self.outputs[output].likely_torch_error() + self.band(output)

    def passes(self, output: str) -> bool:
        """Whether an output is in tolerance, and its witness near the reference."""
        return not self._reasons(output)

    def first_failure(self) -> str | None:
        """The first output that does not pass; by layer, where the two models part."""
        return next((name for name in self.outputs if not self.passes(name)), None)

    def failures(self) -> list[str]:
        """One line for each output that is out of tolerance, in their order; empty when all is well."""
        return [line for name in self.outputs for line in self._reasons(name)]

    def _reasons(self, name: str) -> list[str]:
        result, lines, (right, witness) = self.outputs[name], [], self.names
        # What int8 costs is the model's; how far PyTorch's int8 is off says nothing of the artifact.
        limit = WITNESS_BANDS * self.band(name) if self.precision != QUANTIZED else sys.float_info.max
        if not result.torch_error <= limit:
            lines.append(
                f"{name}: {witness} itself is, in {self.precision}, {result.torch_error:.3g} from {right}, "
                f"above {limit:.3g}: the two do not compute the same"
            )
        if not result.error <= self.tolerance(name):
            lines.append(
                f"{name}: error {result.error:.3g} is above the tolerance {self.tolerance(name):.3g} "
                f"({self.precision}; {witness} errs by {result.torch_error:.3g}) at {result.worst}"
            )
        # Rounding to int8 errs everywhere, so that the largest error alone would hide a layer that is wrong.
        rms, torch_rms = (math.sqrt(x / max(result.count, 1)) for x in (result.squares, result.torch_squares))
        if self.precision == QUANTIZED and result.count >= SMALL_POOL and not rms <= INT8_RMS * torch_rms:
            lines.append(
                f"{name}: root mean square error {rms:.3g} is above {INT8_RMS} times {torch_rms:.3g}, which "
                f"{witness} has in int8"
            )
        return lines

    def require(self) -> None:
        """Raises: ParityError: an output is out of tolerance; says which, in which case and how far."""
        failures = self.failures()
        if failures:
            raise ParityError("; ".join(failures))

    def to_dict(self) -> dict[str, Any]:
        """What `lfx.json` and `lfx parity --json` hold."""
        return {
            "reference": self.names[0],
            "precision": self.precision,
            "passed": not self.failures(),
            "outputs": {
                name: {
                    "max_abs_error": _json(result.error),
                    "torch_max_abs_error": _json(result.torch_error),
                    "tolerance": _json(self.tolerance(name)),
                    "max_abs_value": _json(result.magnitude),
                    "cosine": _json(result.cosine()),
                    **({"label_agreement": result.label_agreement()} if result.labels else {}),
                    "worst_case": str(result.worst),
                }
                for name, result in self.outputs.items()
            },
            "cases": [
                {
                    "batch": case.batch,
                    "seqlen": case.seqlen,
                    "globals": case.globals,
                    "padding": case.padding,
                    "max_abs_error": {name: _json(found.error) for name, found in errors.items()},
                }
                for case, errors in self.rows
            ],
        }


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
        torch_side, ours = witness(inputs) if witness is not None else right, candidate(inputs)
        for outputs, whose in ((right, report.names[0]), (torch_side, f"{report.names[1]} in {precision}")):
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
            row[name] = result.add(case, expected, torch_side[name], ours[name])
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


def _errors(found: NDArray[np.float64], right: NDArray[np.float64], filled: NDArray[np.bool_]) -> NDArray[np.float64]:
    both_nan = np.isnan(found) & np.isnan(right)
    same = both_nan | ((np.abs(found) >= LEAST_FILL) & (np.sign(found) == np.sign(right)))
    with np.errstate(invalid="ignore"):
        return np.where(filled, np.where(same, 0.0, np.inf), found - right)


def _largest(values: NDArray[Any]) -> float:
    """Largest absolute value; infinite where any is not a number."""
    if values.size == 0:
        return 0.0
    largest = float(np.abs(values).max())
    return math.inf if math.isnan(largest) else largest


def _json(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
