"""The reference backend: the onnx package's ReferenceEvaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lfx.errors import ArtifactError, LfxError, require, with_cure
from lfx.runtime.backends.interface import AnyShape, Arrays, ArrayTensors


class Reference(AnyShape, ArrayTensors):
    """The onnx package's ReferenceEvaluator: numpy, all precisions, slow."""

    def __init__(self, model: Path) -> None:
        onnx = require("onnx", "export")
        evaluator = require("onnx.reference", "export")
        try:
            self._evaluator = evaluator.ReferenceEvaluator(str(model))
        except Exception as error:
            raise ArtifactError(f"{model} cannot be loaded by onnx: {with_cure(error)}") from error
        self.name = f"onnx {onnx.__version__} reference evaluator"
        self.input_names = list(self._evaluator.input_names)
        self.output_names = list(self._evaluator.output_names)

    def infer(self, feeds: Arrays, outputs: Sequence[str] | None = None, *, on_device: bool = False) -> Arrays:
        """Run one batch."""
        names = self.output_names if outputs is None else list(outputs)
        try:
            values = self._evaluator.run(names, feeds)
        except Exception as error:
            raise LfxError(f"the reference evaluator failed: {with_cure(error)}") from error
        return dict(zip(names, (np.asarray(value) for value in values), strict=True))

    def infer_tensors(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Run one batch of arrays."""
        return self.infer(dict(tensors))
