"""The example of a causal, dilated character model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lfx.runtime import Engine

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "char_lm.py"


def test_the_character_model_continues_a_prompt_as_pytorch_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("char_lm", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = ["--steps", "3", "--context", "1500", "--length", "3", "--output", str(tmp_path)]
    assert module.main(options) == 0
    out = capsys.readouterr().out
    assert "prompt: 1,500 characters" in out
    assert "PyTorch chose the same characters" in out
    with Engine(tmp_path / "bundle") as engine:
        assert (engine.signature.attention_windows, engine.signature.causal) == ((16, 32, 128), True)
