"""`Report`: the errors of each output over all cases, and the verdict; `lfx.parity` explains the tolerance."""

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
# Number of operations in sequence that round. In a layer: projection, scores, softmax, context, output projection,
# residual norm, two feed-forward projections, activation, residual norm. Outside: embedding sum and its norm, and a
# head of two layers.
OPS_PER_LAYER = 10
OPS_AROUND = 4
# Largest error of a witness, in bands: a chosen margin for rounding. It has to tell rounding from a different function,
# such as one with a wrong mask, whose error is of the order of the outputs: in fp32, many thousand bands.
WITNESS_BANDS = 32.0
# Largest ratio of the candidate's to the witness's root mean square error, in int8, and the fewest numbers that are
# enough to tell it: the logits of a classifier are fewer.
INT8_RMS, FEWEST = 1.25, 500
SMALL_POOL, TAIL = 2000, 3.5  # a normally distributed error exceeds 3.5 standard deviations once in 2,000

# A reference value of FILL or more in magnitude is a mask fill value (an infinity or finfo.min), not a result. The same
# value in float16 is LEAST_FILL or more.
FILL, LEAST_FILL = 1e30, 65504.0
# Numbers above LARGE in magnitude, and their errors, are scaled to LARGE. Otherwise a fill value below FILL, such as
# -1e9, would raise the tolerance of all numbers of its output.
LARGE = 100.0
# Edges of the error histograms, four bins per decade: from below the rounding error of float32 to any large error.
HISTOGRAM_EDGES = np.logspace(-12, 4, 65)


def rounding_band(precision: str, layers: int, magnitude: float) -> float:
    """Return the rounding error that a model accumulates; `lfx.parity` has the formula.

    Args:
        precision: a key of UNIT_ROUNDOFF.
        layers: number of attention layers before the output.
        magnitude: largest absolute value of the output.
    """
    return math.sqrt(OPS_PER_LAYER * layers + OPS_AROUND) * UNIT_ROUNDOFF[precision] * magnitude


def pair_tolerance(precision: str, layers: int, magnitude: float) -> float:
    """Return the largest difference by rounding between two runs of one model, with the arguments of `rounding_band`.

    Each run may be WITNESS_BANDS bands from the exact result, on opposite sides.
    """
    return 2.0 * WITNESS_BANDS * rounding_band(precision, layers, magnitude)


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors of one output in one case, of the candidate and of the witness."""

    error: float
    witness_error: float


@dataclass
class OutputResult:
    """The errors of one output over all cases, against the float64 reference.

    Attributes:
        error, witness_error: largest absolute error of the candidate and of the witness.
        worst: the case with the candidate's largest error.
        magnitude: largest absolute value of the reference, without mask fill values.
        smallest: smallest positive value of the reference, at most 1.
        squares, witness_squares: sums of squared errors, of the candidate and of the witness, over `count` numbers.
        products: sums of candidate · reference, candidate² and reference².
        labels, agreeing: number of decisions of a head, and of those that equal the reference's.
        histogram, witness_histogram: number of non-zero absolute errors in each bin of HISTOGRAM_EDGES.
    """

    error: float = 0.0
    witness_error: float = 0.0
    magnitude: float = 0.0
    smallest: float = 1.0
    worst: Case | None = None
    count: int = 0
    squares: float = 0.0
    witness_squares: float = 0.0
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    labels: int = 0
    agreeing: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))
    witness_histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))

    def add(self, case: Case, expected: NDArray[Any], witness: NDArray[Any], actual: NDArray[Any]) -> Errors:
        """Add the outputs of one case.

        A position where the reference is a mask fill value, an infinity or NaN has an error of 0 if the other output
        has such a value too, and an infinite error otherwise. It does not count for the magnitude. Where the reference
        is above LARGE in magnitude, all three are scaled so that it is LARGE.

        Args:
            expected, witness, actual: outputs of reference, witness and candidate, of one shape.
        Returns:
            The largest errors in this case.
        """
        expected, actual = expected.astype(np.float64), actual.astype(np.float64)
        filled = ~(np.abs(expected) < FILL)
        scale = np.where(filled, 1.0, np.maximum(np.abs(expected) / LARGE, 1.0))
        expected, witness, actual = expected / scale, witness.astype(np.float64) / scale, actual / scale
        errors, witness_errors = (_errors(array, expected, filled) for array in (actual, witness))
        largest = Errors(_largest(errors), _largest(witness_errors))
        if self.worst is None or not largest.error <= self.error:
            self.error, self.worst = largest.error, case
        self.witness_error = max(self.witness_error, largest.witness_error)
        self.squares += float(np.square(errors).sum())
        self.witness_squares += float(np.square(witness_errors).sum())
        self.count += witness_errors.size
        expected, actual = np.where(filled, 0.0, expected), np.where(filled, 0.0, np.nan_to_num(actual))
        self.magnitude = max(self.magnitude, _largest(expected))
        self.smallest = float(np.min(expected, initial=self.smallest, where=expected > 0))
        self.products += [float((actual * expected).sum()), float((actual**2).sum()), float((expected**2).sum())]
        self.histogram += np.histogram(np.abs(errors), HISTOGRAM_EDGES)[0]
        self.witness_histogram += np.histogram(np.abs(witness_errors), HISTOGRAM_EDGES)[0]
        return largest

    def add_labels(self, expected: NDArray[Any], actual: NDArray[Any], *, multi_label: bool) -> None:
        """Count the rows whose argmax is the reference's, or with `multi_label` the entries whose sign is.

        Rows of a single entry are not counted.
        """
        if expected.shape[-1] < 2:
            return
        same = (expected > 0) == (actual > 0) if multi_label else expected.argmax(axis=-1) == actual.argmax(axis=-1)
        self.labels += same.size
        self.agreeing += int(same.sum())

    def cosine(self) -> float:
        """Return the cosine of candidate and reference, all numbers as one vector; 1 if both are zero."""
        product, actual, expected = self.products
        norms = actual * expected
        return float(product / math.sqrt(norms)) if norms > 0 else float(actual == expected)

    def label_agreement(self) -> float | None:
        """Return the fraction of decisions that equal the reference's, 0 to 1; None if the output has no decisions."""
        return self.agreeing / self.labels if self.labels else None

    def likely_witness_error(self) -> float:
        """Return the witness's largest error; in a small pool, at least TAIL times its root mean square error."""
        if self.count >= SMALL_POOL:
            return self.witness_error
        return max(self.witness_error, TAIL * math.sqrt(self.witness_squares / max(self.count, 1)))


@dataclass
class Report:
    """The errors of a comparison, and the verdict.

    Attributes:
        precision: fp32, fp16, bf16 or int8, of the witness and the candidate.
        layers: number of attention layers.
        outputs: output name -> its errors over all cases.
        rows: for each case, the errors of each output.
        depth: output name -> number of attention layers before it, if fewer than `layers`.
        probabilities: names of the outputs that are results of a softmax.
        names: names of the reference and of the witness, for messages.
        float_precision: fp32, fp16 or bf16, of the candidate's layers that are not int8.
    """

    precision: str
    layers: int
    outputs: dict[str, OutputResult] = field(default_factory=dict)
    rows: list[tuple[Case, dict[str, Errors]]] = field(default_factory=list)
    depth: dict[str, int] = field(default_factory=dict)
    probabilities: frozenset[str] = frozenset()
    names: tuple[str, str] = ("the dense float64 reference", "PyTorch")
    float_precision: str = "fp32"

    def band(self, output: str) -> float:
        """Return the rounding band of an output, an absolute error; see `rounding_band` and `lfx.parity`."""
        result = self.outputs[output]
        magnitude = result.magnitude
        if output in self.probabilities:
            magnitude *= 1.0 - math.log(result.smallest)
        return rounding_band(self.precision, self.depth.get(output, self.layers), magnitude)

    def tolerance(self, output: str) -> float:
        """Return the largest absolute error of the candidate that is in tolerance."""
        return 2.0 * self.outputs[output].likely_witness_error() + self.band(output)

    def passed(self, output: str) -> bool:
        """Return whether the errors of an output, the candidate's and the witness's, are in tolerance."""
        return not self._failures_of(output)

    def first_failure(self) -> str | None:
        """Return the first output that is out of tolerance; in a comparison by layer, the first wrong layer."""
        return next((name for name in self.outputs if not self.passed(name)), None)

    def failures(self) -> list[str]:
        """Return one message per failed check, in the order of the outputs; empty if all passed."""
        return [line for name in self.outputs for line in self._failures_of(name)]

    def too_small(self) -> list[str]:
        """Return the outputs with too few numbers for the bound of int8's root mean square error."""
        return [name for name, result in self.outputs.items() if self.precision == QUANTIZED and result.count < FEWEST]

    def _failures_of(self, name: str) -> list[str]:
        result, lines, (reference, witness) = self.outputs[name], [], self.names
        # The error of int8 depends on the model, so the witness's error has no limit.
        limit = WITNESS_BANDS * self.band(name) if self.precision != QUANTIZED else sys.float_info.max
        if not result.witness_error <= limit:
            lines.append(
                f"{name}: {witness} itself has error {result.witness_error:.3g} against {reference} in "
                f"{self.precision}, above {limit:.3g}: the two do not compute the same"
            )
        if not result.error <= self.tolerance(name):
            lines.append(
                f"{name}: error {result.error:.3g} is above the tolerance {self.tolerance(name):.3g} "
                f"({self.precision}; {witness} has error {result.witness_error:.3g}) at {result.worst}"
            )
        # In int8 all numbers have an error, so the largest error alone would not show a wrong layer.
        rms, witness_rms = (math.sqrt(x / max(result.count, 1)) for x in (result.squares, result.witness_squares))
        is_bounded = self.precision == QUANTIZED and result.count >= FEWEST
        if is_bounded and not rms <= (limit := self._rms_limit(name, witness_rms)):
            lines.append(
                f"{name}: root mean square error {rms:.3g} is above {limit:.3g}; "
                f"{witness} has {witness_rms:.3g} in int8"
            )
        return lines

    def _rms_limit(self, name: str, witness_rms: float) -> float:
        """Return the largest root mean square error in int8.

        An output whose layers all stay float has its rounding error alone, which is not PyTorch's. The logarithm of the
        ratio for n independent errors has the standard deviation √(1/n); twice the variance is taken, since the errors
        of one token are not independent.
        """
        result, ratio, depth = self.outputs[name], INT8_RMS, self.depth.get(name, self.layers)
        if result.count < SMALL_POOL:
            ratio *= math.exp(TAIL * math.sqrt(2.0 / result.count))
        return ratio * witness_rms + rounding_band(self.float_precision, depth, result.magnitude)

    def require(self) -> None:
        """Check that all outputs are in tolerance.

        Raises:
            ParityError: one is not; the message names each such output, its worst case and its error.
        """
        failures = self.failures()
        if failures:
            raise ParityError("; ".join(failures))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, as `lfx.json` and `lfx parity --json` have it; null = not finite."""
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
                    "max_abs_error": {name: _json(largest.error) for name, largest in errors.items()},
                }
                for case, errors in self.rows
            ],
        }


def _errors(
    actual: NDArray[np.float64], expected: NDArray[np.float64], filled: NDArray[np.bool_]
) -> NDArray[np.float64]:
    both_nan = np.isnan(actual) & np.isnan(expected)
    same_fill = both_nan | ((np.abs(actual) >= LEAST_FILL) & (np.sign(actual) == np.sign(expected)))
    with np.errstate(invalid="ignore"):
        return np.where(filled, np.where(same_fill, 0.0, np.inf), actual - expected)


def _largest(values: NDArray[Any]) -> float:
    """Return the largest absolute value; infinity if one is NaN, 0 if there is none."""
    if values.size == 0:
        return 0.0
    largest = float(np.abs(values).max())
    return math.inf if math.isnan(largest) else largest


def _json(value: float) -> float | None:
    """Return a number, or None for an infinity or NaN, which JSON does not have."""
    return value if math.isfinite(value) else None
