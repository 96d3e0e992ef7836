"""Errors of other libraries become one line with a cure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lfx.errors import DependencyError, one_line, require, with_cure

OPENVINO = (
    "Exception from src/inference/src/cpp/core.cpp:84:\n"
    "Check 'false' failed at src/frontends/common/src/frontend.cpp:47:\n"
    "Loading input model\n"
    "Invalid usage of method for externally stored data in file (model.onnx.data, offset: 0, data_length: 12672)\n"
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("std::bad_alloc"), "std::bad_alloc; use shorter or fewer sequences, or a smaller model"),
        (MemoryError(), "out of memory; use shorter or fewer sequences, or a smaller model"),
        (MemoryError("Unable to allocate 7 GiB"), "out of memory: Unable to allocate 7 GiB; use shorter or fewer"),
        (RuntimeError("Failed to allocate memory for requested buffer of size 9"), "use shorter or fewer sequences"),
        (RuntimeError("CUDA failure 2: out of memory"), "use shorter or fewer sequences"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory; use shorter or fewer sequences"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "a/b: No space left on device; make room, or choose"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "make room, or choose another place"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a"), "a: No such file or directory; a file is"),
        (
            RuntimeError('External data path does not exist: "model.onnx.data"'),
            "check the path, or make the bundle again",
        ),
        (RuntimeError(OPENVINO), "Loading input model; a file is missing: check the path, or make the bundle again"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a"), "a: Permission denied"),
        (ValueError("something else\nmore"), "something else"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_error_of_memory_or_disk_has_a_cure(error: Exception, text: str) -> None:
    assert text in with_cure(error)
    assert "\n" not in with_cure(error)


def test_source_locations_of_openvino_are_removed() -> None:
    assert one_line(RuntimeError(OPENVINO)) == "Loading input model"
    assert one_line(RuntimeError("\n")) == "RuntimeError"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("raise RuntimeError('Could not determine home directory.')", r"Could not determine home directory\."),
        ("import lfx_no_such_module", "No module named 'lfx_no_such_module'"),
    ],
    ids=["error", "module"],
)
def test_a_module_whose_import_fails_is_named(
    line: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lfx_broken_module.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=rf"^lfx_broken_module cannot be imported \({cause}\); correct that"):
        require("lfx_broken_module", "openvino")


def test_a_module_that_is_not_installed_is_named_with_its_extra() -> None:
    with pytest.raises(DependencyError, match=r"^lfx_none\.module is not installed; .*'longformer-lfx\[x\]'$"):
        require("lfx_none.module", "x")
