"""The errors of each output over all cases, and the verdict; see `lfx.parity` for the tolerance."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import ParityError
from lfx.parity.cases import Case
from lfx.signature import QUANTIZED

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


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors of one output in one case: the candidate's and PyTorch's."""

    error: float
    witness_error: float


@dataclass
class OutputResult:
    """One output over all cases, against the float64 reference.

    Attributes:
        error, witness_error: largest absolute error, of the candidate and of PyTorch. worst: where the former is.
        magnitude: largest absolute value of the reference.
        squares, witness_squares: sums of squared errors, of the candidate and of PyTorch, over `count` numbers.
        products: sums of candidate · reference, candidate² and reference².
        labels, agreeing: decisions of a head, and those that are the reference's.
        histogram, witness_histogram: absolute errors that are not 0, counted between HISTOGRAM_EDGES.
    """

    error: float = 0.0
    witness_error: float = 0.0
    magnitude: float = 0.0
    worst: Case | None = None
    count: int = 0
    squares: float = 0.0
    witness_squares: float = 0.0
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    labels: int = 0
    agreeing: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))
    witness_histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))

    def add(self, case: Case, right: NDArray[Any], witness: NDArray[Any], ours: NDArray[Any]) -> Errors:
        """Take in one case; returns its largest errors.

        Where the reference is infinite, a fill value such as finfo.min or not a number, the others must be so too: it
        counts as an error of 0, or an infinite one, and adds to no magnitude.
        """
        right, ours = right.astype(np.float64), ours.astype(np.float64)
        filled = ~(np.abs(right) < FILL)
        errors, witness_errors = (_errors(found, right, filled) for found in (ours, witness.astype(np.float64)))
        found = Errors(_largest(errors), _largest(witness_errors))
        if self.worst is None or not found.error <= self.error:
            self.error, self.worst = found.error, case
        self.witness_error = max(self.witness_error, found.witness_error)
        self.squares += float(np.square(errors).sum())
        self.witness_squares += float(np.square(witness_errors).sum())
        self.count += witness_errors.size
        right, ours = np.where(filled, 0.0, right), np.where(filled, 0.0, np.nan_to_num(ours))
        self.magnitude = max(self.magnitude, _largest(right))
        self.products += [float((ours * right).sum()), float((ours**2).sum()), float((right**2).sum())]
        self.histogram += np.histogram(np.abs(errors), HISTOGRAM_EDGES)[0]
        self.witness_histogram += np.histogram(np.abs(witness_errors), HISTOGRAM_EDGES)[0]
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

    def likely_witness_error(self) -> float:
        """PyTorch's largest error, or what it might as well have been where few numbers were compared."""
        if self.count >= SMALL_POOL:
            return self.witness_error
        return max(self.witness_error, TAIL * math.sqrt(self.witness_squares / max(self.count, 1)))


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
        return 2.0 * self.outputs[output].likely_witness_error() + self.band(output)

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
        if not result.witness_error <= limit:
            lines.append(
                f"{name}: {witness} itself is, in {self.precision}, {result.witness_error:.3g} from {right}, "
                f"above {limit:.3g}: the two do not compute the same"
            )
        if not result.error <= self.tolerance(name):
            lines.append(
                f"{name}: error {result.error:.3g} is above the tolerance {self.tolerance(name):.3g} "
                f"({self.precision}; {witness} errs by {result.witness_error:.3g}) at {result.worst}"
            )
        # Rounding to int8 errs everywhere, so that the largest error alone would hide a layer that is wrong.
        rms, witness_rms = (math.sqrt(x / max(result.count, 1)) for x in (result.squares, result.witness_squares))
        if self.precision == QUANTIZED and result.count >= SMALL_POOL and not rms <= INT8_RMS * witness_rms:
            lines.append(
                f"{name}: root mean square error {rms:.3g} is above {INT8_RMS} times {witness_rms:.3g}, which "
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
                    "torch_max_abs_error": _json(result.witness_error),
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
