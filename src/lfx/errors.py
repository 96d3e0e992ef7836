"""Every error that lfx raises on purpose. Each message says what came, what is allowed and what to do.

LfxError
├── ExportError      a model, a checkpoint or an option that cannot be exported
├── BuildError       an engine that cannot be built
├── PluginError      the plugin library is missing or does not fit
├── InputError       ids, masks or text that the model cannot take
├── ParityError      an artifact whose numbers are not the model's
├── ArtifactError    a bundle or plan that is missing, cut, changed or of another format
├── OverloadError    more requests than a Batcher was told to keep waiting
└── DependencyError  an extra that is not installed, or a backend that is not on this machine
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

# OpenVINO begins its errors with the places in its source that they went through.
_OPENVINO_PLACE = re.compile(r"(Exception from|Check '.*' failed at) src/.*:\d+:$")
# What libraries and systems say, in lower case, and what helps.
_CURES = {
    ("bad_alloc", "out of memory", "out_of_memory", "failed to allocate", "unable to allocate", "cannot allocate"): (
        "use shorter or fewer sequences, or a smaller model"
    ),
    ("no space left", "quota exceeded"): "make room, or choose another place",
    ("no such file", "could not open", "path does not exist", "externally stored data"): (
        "a file is missing: check the path, or make the bundle again"
    ),
}


class LfxError(Exception):
    """Base of all errors that lfx raises on purpose; the command line prints it as one line and exits 1."""


class ExportError(LfxError):
    """A model, a checkpoint or an option that cannot be exported."""


class BuildError(LfxError):
    """An engine that cannot be built."""


class PluginError(LfxError):
    """The plugin library is missing or does not fit."""


class InputError(LfxError):
    """Ids, masks or text that the model cannot take."""


class ParityError(LfxError):
    """An artifact whose numbers are not the model's."""


class ArtifactError(LfxError):
    """A bundle or plan that is missing, cut, changed or of another format."""


class OverloadError(LfxError):
    """More requests than a Batcher was told to keep waiting, or a closed Batcher: a server answers 503."""


class DependencyError(LfxError):
    """An extra that is not installed, or a backend that is not on this machine."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        DependencyError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == module.split(".", maxsplit=1)[0]:
            raise DependencyError(
                f"{module} is not installed; install it with: pip install 'longformer-lfx[{extra}]'"
            ) from error
        raise


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first meaningful line of another library's error, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not _OPENVINO_PLACE.match(line)]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def with_cure(error: BaseException, limit: int = 300) -> str:
    """`one_line`, or the words of the system, and what to do where memory or disk ran out, or a file is missing."""
    text = one_line(error, limit)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        text = f"out of memory: {text}" if str(error) else "out of memory"
    said = f"{text} {error}".lower()
    cures = [cure for signs, cure in _CURES.items() if any(sign in said for sign in signs)]
    return "; ".join([text, *cures[:1]])
