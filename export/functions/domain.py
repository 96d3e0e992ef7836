"""The domain of the ops, and what their bodies share."""

from __future__ import annotations

from onnxscript.values import Opset

DOMAIN = "lfx"
VERSION = 1
lfx = Opset(DOMAIN, VERSION)

# Added to the score of a key that must not be seen. The lowest finite float32, as Hugging Face has it: with -inf a
# query that sees nothing would be NaN.
HIDDEN = -3.4028234663852886e38
