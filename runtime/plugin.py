"""The plugin library that TensorRT loads: its name, version and path."""

from __future__ import annotations

from pathlib import Path

import lfx
from lfx.errors import PluginError

NAMESPACE = "lfx"
VERSION = "1"
LIBRARY = "liblfx_plugins.so"
# The kernels load a head's row 16 bytes at a time; see plugins/attention.h for the limits.
HEAD_SIZE_MULTIPLE = 8


def library() -> Path:
    """The path of the installed plugin library.

    Raises:
        PluginError: lfx was installed without it.
    """
    for folder in lfx.__path__:
        path = Path(folder) / "_lib" / LIBRARY
        if path.is_file():
            return path
    raise PluginError(
        f"{LIBRARY} is not installed: pip found no CUDA compiler or no TensorRT header when it built lfx; install "
        "again where nvcc is on the PATH, with CMAKE_ARGS=-DTensorRT_INCLUDE_DIR=FOLDER, or use --no-plugin"
    )
