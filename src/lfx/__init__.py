"""lfx: Longformer from PyTorch to ONNX, TensorRT and production."""

__version__ = "0.1.0"
