"""lfx: Longformer from PyTorch to ONNX, TensorRT and production."""

import os
from importlib.metadata import version

# ONNX Runtime starts a telemetry thread when it is imported, and a forked child waits for that thread at its end, for
# ever. Set the variable to 0 to have its events sent.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = version("longformer-lfx")  # pyproject.toml has it
