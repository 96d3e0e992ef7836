"""The ONNX domain of the ops, and the mask fill value of their bodies."""

from __future__ import annotations

from onnxscript.values import Opset

DOMAIN = "lfx"
VERSION = 1
lfx = Opset(DOMAIN, VERSION)

# Mask fill value, added to the score of a masked key. It is the lowest finite float32, as in Hugging Face: with -inf,
# softmax over masked keys only would be NaN.
MASK_FILL = -3.4028234663852886e38
