"""The libraries that the plugin's tests run; each is compiled once a session."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import PluginError
from lfx.runtime import plugin as plugins
from scripts.bench.launch import Kernels
from tests.conftest import MakeOnce
from tests.plugins.build import cpu_library, emulated_library, reference_library


@pytest.fixture(scope="session")
def host_reference(made_once: MakeOnce) -> Any:
    """plugins/reference.cpp."""
    library = ctypes.CDLL(str(made_once("reference", reference_library) / "liblfx_reference.so"))
    for name in ("lfxBandedAttentionReference", "lfxGlobalAttentionReference"):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p]
    return library


@pytest.fixture(scope="session")
def emulated(made_once: MakeOnce) -> Kernels:
    """The kernels' own source, compiled for the emulated machine."""
    return Kernels(made_once("emulated", emulated_library) / "liblfx_emulated.so")


@pytest.fixture(scope="session")
def cpu(made_once: MakeOnce) -> Any:
    """The CPU kernels: cpu_calls.cpp."""
    library = ctypes.CDLL(str(made_once("cpu", cpu_library) / "liblfx_cpu.so"))
    for name in ("lfxBandedAttentionCpu", "lfxGlobalAttentionCpu"):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    library.lfxExp2Cpu.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return library


@pytest.fixture(scope="session")
def library() -> Path:
    """The plugin library that pip built."""
    try:
        return plugins.library()
    except PluginError as error:
        pytest.skip(f"no plugin library: {error}")
