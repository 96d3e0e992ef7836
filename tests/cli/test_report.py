"""The page of `lfx parity --report` escapes all text that comes from files and configs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lfx.cli import report
from lfx.parity import Arrays, Case, Report, compare, inputs_of

EVIL = "<script>alert(1)</script>"
NAMES = (EVIL, "!output", "$\\frac", "a&b\"'")


def _measured() -> Report:
    def run(inputs: Arrays, error: float = 0.0) -> Arrays:
        return {name: np.sin(inputs["input_ids"].astype(float)) + error for name in NAMES}

    make = partial(inputs_of, vocab_size=50, pad_token_id=1)
    off = partial(run, error=1e-3)
    cases = [Case(1, 5), Case(2, 9)]
    return compare(cases, make, reference=run, witness=run, candidate=off, precision="fp32", layers=2)


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts = {"artifact": f"bundle{EVIL}", "model": EVIL, EVIL: "x", "compared with": f"{EVIL}\udcff"}
    report.write(tmp_path / "page.html", facts, _measured(), _measured())
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5
    assert "<td>!output</td>" in page
    assert "First out of tolerance: &lt;script&gt;" in page
    assert "&amp;lt;" not in page


def test_the_figures_do_not_depend_on_a_matplotlibrc(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"text.usetex": True}):
        report.write(tmp_path / "page.html", {"artifact": "bundle"}, _measured(), None)
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<svg") == 2
