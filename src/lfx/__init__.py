"""lfx: Longformer from PyTorch to ONNX, TensorRT and production."""

import os
from importlib.metadata import PackageNotFoundError, version

# ONNX Runtime starts a telemetry thread on import. A forked child does not have that thread, but waits for it at exit,
# and never ends. Set the variable to 0 to send ONNX Runtime's telemetry events.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    __version__ = version("longformer-lfx")  # pyproject.toml has it
except PackageNotFoundError:  # a clone on the path, as on a machine that only runs the GPU scripts
    __version__ = "0+unknown"
