"""The libraries that the plugin's tests run; each is compiled once a session."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import PluginError
from lfx.runtime import plugin as plugins
from scripts.bench.launch import Kernels
from tests.plugins.build import emulated_library, reference_library


@pytest.fixture(scope="session")
def host_reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """plugins/reference.cpp."""
    library = reference_library(tmp_path_factory.mktemp("reference"))
    for name in ("lfxBandedAttentionReference", "lfxGlobalAttentionReference"):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p]
    return library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels' own source, compiled for the emulated machine."""
    return Kernels(emulated_library(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(scope="session")
def library() -> Path:
    """The plugin library that pip built."""
    try:
        return plugins.library()
    except PluginError as error:
        pytest.skip(f"no plugin library: {error}")
