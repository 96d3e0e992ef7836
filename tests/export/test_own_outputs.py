"""The outputs of user modules: exported under their names and cut to each sequence, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from lfx.errors import ExportError, InputError
from lfx.export import export
from lfx.runtime import Engine
from tests.export.test_own_modules import Wrapped, same
from tests.marks import fast_if


@fast_if(lambda case: case == "shorter")
@pytest.mark.parametrize(
    "change",
    [lambda x, ids: x[:, 1:], lambda x, ids: torch.cat([x[:, :1], x], 1), lambda x, ids: x.transpose(0, 1)],
    ids=["shorter", "longer", "time in front"],
)
def test_outputs_that_cannot_be_cut_take_sequences_of_one_length(change: Any, tmp_path: Path) -> None:
    module = Wrapped(change).eval()
    folder = export(module, tmp_path / "out")
    same(module, folder)
    with Engine(folder) as engine, pytest.raises(InputError, match="cannot be cut to each sequence's length"):
        engine.run([[5, 6, 7], [8]])


@pytest.mark.slow
def test_sequences_of_a_batch_whose_rows_are_not_in_front_are_not_mixed(tmp_path: Path) -> None:
    with Engine(export(Wrapped(lambda x, ids: x.transpose(0, 1)).eval(), tmp_path / "out")) as engine:
        for documents in ([[5, 6]], [[5, 6], [7, 8]], [[5, 6], [7, 8], [9, 10]]):
            with pytest.raises(InputError, match=r"cannot be cut .*; run the sequences one by one"):
                list(engine.stream(documents))


@pytest.mark.slow
def test_both_axes_of_a_token_by_token_output_are_cut(tmp_path: Path) -> None:
    module = Wrapped(lambda x, ids: x @ x.transpose(1, 2)).eval()
    with Engine(export(module, tmp_path / "out")) as engine:
        assert [row.shape for row in engine.run([[5, 6, 7], [8]])["output"]] == [(3, 3), (1, 1)]


@fast_if(lambda message: "one tensor" in message or "nested" in message)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, ids: {"a": x, "b": x}, "outputs 'a' and 'b' are one tensor; return it once"),
        (lambda x, ids: {"a": x, "ids": ids}, "output 'ids' is an input, or has the name"),
        (lambda x, ids: {"input_ids": x * 2}, "output 'input_ids' .* has the name of an input"),
        (lambda x, ids: {"": x}, "names an output ''"),
        (lambda x, ids: {0: x}, "names an output 0"),
        (lambda x, ids: {"a": x, "b": {"c": x}}, "output b is dict; return tensors, not nested"),
        (lambda x, ids: {}, "returns no tensor"),
        (lambda x, ids: "text", "the model returns str"),
        (lambda x, ids: None, "the model returns NoneType"),
        (lambda x, ids: 5, "the model returns int"),
        (lambda x, ids: ["a", "b"], "output output_0 is str"),
        (lambda x, ids: (x * 2, 5), "output output_1 is int"),
        (lambda x, ids: x.to(torch.complex64), "output output is torch.complex64"),
        (lambda x, ids: {"a": x * 2, "b": torch.ones(3)}, "output 'b' does not depend on the inputs"),
        (lambda x, ids: {"a" * 300: x * 2}, "rename it: at most 100 letters"),
        (lambda x, ids: {"a/b": x * 2}, "rename it: at most 100 letters"),
        (lambda x, ids: {"ü": x * 2}, "rename it: at most 100 letters"),
        (lambda x, ids: {"inner.pooler.dense.bias": x * 2}, "has the name of an input or a parameter"),
    ],
)
def test_outputs_that_no_graph_can_have_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(Wrapped(change).eval(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_outputs_may_have_the_names_of_inner_values(tmp_path: Path) -> None:
    names = ("linear", "add", "val_0", "embedding")
    module = Wrapped(lambda x, ids: {name: x * (i + 2.0) for i, name in enumerate(names)}).eval()
    folder = export(module, tmp_path / "out")
    same(module, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    values = [value for node in model.graph.node for value in node.output]
    assert len(set(values)) == len(values)


@pytest.mark.slow
def test_outputs_may_have_the_names_that_lfx_gives_inner_values(tmp_path: Path) -> None:
    def change(x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"Mul_output": (x * 2) @ x.transpose(1, 2) * 0.03, "Add_output": x * 5 + 1}

    module = Wrapped(change).eval()
    same(module, export(module, tmp_path / "out"))
