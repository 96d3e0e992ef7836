"""Export of PyTorch models to ONNX; `export` is the only public name. Needs the extra [export]."""

from __future__ import annotations

from lfx.errors import require

for _module in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime"):
    require(_module, "export")

from lfx.export.exporter import export  # noqa: E402

__all__ = ["export"]
