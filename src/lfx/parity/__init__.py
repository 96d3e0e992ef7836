"""Comparing the outputs of two implementations of a model: cases, derived tolerance and verdict.

Each case runs three times: the reference is the model in float64 with dense attention; the witness is PyTorch in the
precision that is compared; the candidate is the artifact. For each output,

    tolerance = 2 · (largest error of the witness against the reference) + band
    band      = √n · u · max|reference|

The candidate's error may be at most twice PyTorch's, plus the rounding error of n operations in sequence, where u is
the unit roundoff of the precision (Higham & Mary 2019: the error of n roundings grows as √n · u). Errors are pooled
over all cases, since the largest of few errors is a matter of chance. A pool of fewer than 2,000 numbers, such as the
logits of a classifier, is too small: the witness's largest error then counts as at least 3.5 times its root mean
square, which a normally distributed error exceeds once in 2,000. A witness error above `WITNESS_BANDS` bands means
that the reference and the witness compute different functions, and fails too.

An attention probability is exp(score - largest score) / sum, so an absolute error of a score is a relative error of
the probability. The error of a score grows with the range of the scores, which is -ln(p) for the smallest positive
probability p, so the band of probabilities is 1 - ln(p) times as wide.

In int8 the witness is PyTorch with the same linear layers quantized with the same scales, and u is half the scale of
weights in [-1, 1]. The loss from int8 is a property of the model, not an error of the artifact: the verdict says
whether the artifact computes the quantized model, and cosine and label agreement measure the loss. Quantization
changes all numbers, so the root mean square error must also be at most 1.25 times the witness's, plus the band of its
float layers: for two models with the same scales the two are nearly equal, while the largest errors are not. Fewer than
2,000 numbers have a wider bound, and fewer than 500 none: a comparison by layer tells more of a classifier than its
logits do.
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
    pair_tolerance,
    rounding_band,
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
    "pair_tolerance",
    "quick_cases",
    "rounding_band",
]
