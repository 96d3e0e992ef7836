"""Export of PyTorch models to ONNX: `export`, and `convert` for encoders. Needs the extra [export]."""

from __future__ import annotations

from lfx.errors import require

for _module in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime"):
    require(_module, "export")

from lfx.export.converter import convert  # noqa: E402
from lfx.export.exporter import export  # noqa: E402
from lfx.export.layout import relayout  # noqa: E402
from lfx.export.loop_attention import LoopSelfAttention, use_loop_attention  # noqa: E402

__all__ = ["LoopSelfAttention", "convert", "export", "relayout", "use_loop_attention"]
