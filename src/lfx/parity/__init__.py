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

from lfx.parity.cases import GLOBALS, PADDINGS, Arrays, Case, full_cases, inputs_of, quick_cases
from lfx.parity.comparison import LABEL_OUTPUTS, Runner, compare
from lfx.parity.result import (
    HISTOGRAM_EDGES,
    UNIT_ROUNDOFF,
    Errors,
    OutputResult,
    Report,
)

__all__ = [
    "GLOBALS",
    "HISTOGRAM_EDGES",
    "LABEL_OUTPUTS",
    "PADDINGS",
    "UNIT_ROUNDOFF",
    "Arrays",
    "Case",
    "Errors",
    "OutputResult",
    "Report",
    "Runner",
    "compare",
    "full_cases",
    "inputs_of",
    "quick_cases",
]
