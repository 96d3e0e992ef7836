"""Run a freshly written ONNX file against the PyTorch model that it came from."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.models.longformer import modeling_longformer as hf

from lfx.config import Signature
from lfx.errors import ParityError, one_line, require
from lfx.export.runners import reference_runner, torch_runner
from lfx.parity import Arrays, Case, Runner, compare, inputs_of, quick_cases

# Ids of a model without a word embedding of Hugging Face's are drawn below this.
_UNKNOWN_VOCABULARY = 100


def validate(
    path: Path, module: nn.Module, signature: Signature, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compare the file with PyTorch over `parity.quick_cases`.

    Returns:
        What `lfx.json` records under `validation`.
    Raises:
        ParityError: an output is out of tolerance; names output, case and distance.
    """
    run, backend = _candidate(path, signature)
    report = compare(
        quick_cases(max(signature.attention_windows), signature.max_seqlen, granularity(module)),
        lambda case: model_inputs(case, signature),
        reference=reference_runner(module, forward_inputs(module)),
        witness=torch_runner(module, signature.precision, forward_inputs(module)),
        candidate=run,
        precision=signature.precision,
        layers=len(signature.attention_windows),
        on_case=lambda case: progress(f"validating: {case}"),
    )
    report.require()
    return {"backend": backend, "witness": f"torch {version('torch')}", **report.to_dict()}


def granularity(module: nn.Module) -> int:
    """What a sequence length must be a multiple of in PyTorch: 1 where a LongformerModel does the padding."""
    if any(isinstance(m, hf.LongformerModel) for m in module.modules()):
        return 1
    return 2 * max(m.one_sided_attn_window_size for m in module.modules() if isinstance(m, hf.LongformerSelfAttention))


def forward_inputs(module: nn.Module) -> tuple[str, ...]:
    """The graph inputs that `module.forward` takes."""
    import inspect

    from lfx.config import GRAPH_INPUTS

    takes = inspect.signature(module.forward).parameters
    return tuple(name for name in GRAPH_INPUTS if name in takes)


def model_inputs(case: Case, signature: Signature) -> Arrays:
    """The inputs of a case, with the global tokens that the exported model can have."""
    if signature.global_attention != "mask":
        pattern = "first" if signature.global_attention == "first" else "none"
        case = Case(case.batch, case.seqlen, pattern, case.padding)
    return inputs_of(
        case,
        vocab_size=signature.vocab_size or _UNKNOWN_VOCABULARY,
        pad_token_id=signature.pad_token_id,
        max_global=signature.max_global,
        choices=2 if signature.task == "multiple-choice" else None,
    )


def _candidate(path: Path, signature: Signature) -> tuple[Runner, str]:
    """The file in ONNX Runtime, or, for bf16, which it has few CPU kernels for, in the ONNX reference evaluator."""
    names = [spec.name for spec in signature.outputs]
    fed = {spec.name for spec in signature.inputs}
    if signature.precision == "bf16":
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(str(path))

        def evaluate(inputs: Arrays) -> Arrays:
            found = evaluator.run(names, {k: v for k, v in inputs.items() if k in fed})
            return dict(zip(names, (np.asarray(value) for value in found), strict=True))

        return evaluate, f"onnx reference evaluator {version('onnx')}"
    ort = require("onnxruntime", "export")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ParityError(f"ONNX Runtime cannot load the exported file: {one_line(error)}") from error

    def run(inputs: Arrays) -> Arrays:
        found = session.run(names, {k: v for k, v in inputs.items() if k in fed})
        return dict(zip(names, found, strict=True))

    return run, f"onnxruntime {ort.__version__} CPUExecutionProvider"
