"""`trace`: run torch.onnx over a rewritten module."""

from __future__ import annotations

import re
import threading

import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lfx.errors import ExportError, one_line
from lfx.export.attentions import free_axes
from lfx.export.decompose import decomposing_in_place
from lfx.export.load import quiet
from lfx.export.passes.opset import TRACED
from lfx.export.probe import forward_inputs, granularity
from lfx.export.promote import promoting_by_metadata
from lfx.export.rewrite import Attentions, ExportWrapper, GlobalTokens, attention_windows, rewrite
from lfx.export.torch_runners import TORCH_DTYPES
from lfx.signature import GRAPH_INPUTS, TASKS

_TRACING = threading.Lock()  # torch.export patches torch while it traces


def trace(
    module: nn.Module, task: str, precision: str, tokens: GlobalTokens, *, output_attentions: bool
) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """Rewrite a module and trace it with torch.onnx.

    Returns:
        The program, and the names of its inputs.
    Raises:
        ExportError: the module takes no input_ids, cannot be traced, or has an output that cannot be named.
    """
    accepted = forward_inputs(module)
    if "input_ids" not in accepted:
        wrapped = [name for name in ("_orig_mod", "module") if isinstance(getattr(module, name, None), nn.Module)]
        cure = f"; give the model that it wraps, its {wrapped[0]}" if wrapped else ""
        raise ExportError(
            f"{type(module).__name__}.forward takes no input_ids; lfx feeds it {', '.join(GRAPH_INPUTS)}{cure}"
        )
    inputs = [name for name in accepted if tokens.mode == "mask" or name != "global_attention_mask"]
    attentions: Attentions | None = [] if output_attentions else None
    wrapper = ExportWrapper(
        rewrite(module, tokens, TORCH_DTYPES[precision], attentions),
        inputs,
        tokens,
        "global_attention_mask" in accepted,
        attentions,
    ).eval()
    batch, choices, sequence = (torch.export.Dim(name) for name in ("batch", "choices", "sequence"))
    axes = {0: batch, 1: choices, 2: sequence} if TASKS[task].has_choices else {0: batch, 1: sequence}
    program = run_onnx(wrapper, _example(module, task, inputs), inputs, [axes for _ in inputs], module)
    if output_attentions:
        free_axes(_outputs(program), has_choices=TASKS[task].has_choices)
    return program, inputs


def run_onnx(
    wrapper: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    axes: list[dict[int, torch.export.Dim]],
    module: nn.Module | None = None,
) -> torch.onnx.ONNXProgram:
    """Run torch.onnx over a module whose forward takes `*tensors` and returns a dict of tensors.

    Args:
        axes: of each input, the axes that are dynamic.
        module: the caller's module inside `wrapper`, for messages; default: `wrapper`.
    Raises:
        ExportError: the module cannot be traced, or has an output that cannot be named.
    """
    module = module if module is not None else wrapper
    try:
        with (
            _TRACING,
            quiet(),
            torch.autocast("cpu", enabled=False),
            decomposing_in_place(),
            promoting_by_metadata(),
        ):
            program = torch.onnx.export(
                wrapper,
                example,
                dynamo=True,
                opset_version=TRACED,
                input_names=inputs,
                dynamic_shapes={"tensors": tuple(axes)},
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, ExportError):
            raise cause from None
        reason = f"{type(cause).__name__}: {one_line(cause)}"
        raise ExportError(f"{type(module).__name__} cannot be traced: {reason}") from error
    assert program is not None
    _name_outputs(_outputs(program), {*inputs, *(name for name, _ in module.named_parameters())})
    return program


def _outputs(program: torch.onnx.ONNXProgram) -> dict[str, ir.Value]:
    assert program.exported_program is not None
    values = list(program.model.graph.outputs)
    outputs: dict[str, ir.Value] = pytree.tree_unflatten(values, program.exported_program.call_spec.out_spec)
    return outputs


def _example(module: nn.Module, task: str, inputs: list[str]) -> tuple[torch.Tensor, ...]:
    """Make inputs to trace with; the axes differ in size, so that torch.export merges no two of them."""
    length = 4 * max(attention_windows(module)) if granularity(module) > 1 else 29
    shape = (2, 3, length) if TASKS[task].has_choices else (3, length)
    ids = torch.arange(length).expand(shape) % 5 + 3
    return tuple(ids if name == "input_ids" else torch.ones(shape, dtype=torch.int64) for name in inputs)


def _name_outputs(outputs: dict[str, ir.Value], taken: set[str]) -> None:
    """Give every graph output its name.

    Args:
        taken: names of the inputs and of the parameters.
    Raises:
        ExportError: a name is invalid or taken, or one tensor is returned twice.
    """
    seen: dict[int, str] = {}
    for name, value in outputs.items():
        if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
            raise ExportError(
                f"output {name[:100]!r} has a name that cannot be a file name; rename it: at most 100 letters, digits, "
                "'_', '.' and '-'"
            )
        if value.is_graph_input() or name in taken:
            raise ExportError(
                f"output {name!r} is an input, or has the name of an input or a parameter; leave it out or rename it"
            )
        if id(value) in seen:
            raise ExportError(f"outputs {seen[id(value)]!r} and {name!r} are one tensor; return it once")
        seen[id(value)] = name
        value.name = name


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_names(module: nn.Module) -> dict[int, str]:
    """Map the data pointer of each weight to its first name in the module; tied weights have one pointer."""
    names: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        names.setdefault(tensor.data_ptr(), name)
    return names
