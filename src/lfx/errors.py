"""The errors that lfx raises on purpose. Each message says what was given, what is allowed and what to do.

LfxError
├── ExportError      a model, a checkpoint or an option that cannot be exported
├── BuildError       an engine that cannot be built
├── PluginError      the plugin library is missing, cannot be loaded or does not support the model
├── InputError       ids, masks or text that the model cannot take
│   └── LengthError  a sequence of more tokens than the model takes
├── ParityError      an artifact whose outputs differ from the model's by more than the tolerance
├── ArtifactError    a bundle or plan that is missing, truncated, changed or of another format
├── OverloadError    more pending requests than a Batcher's max_pending, or a closed Batcher
└── DependencyError  an extra that is not installed, or a backend that is not on this machine
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

# OpenVINO puts the source locations that an error passed through before its text.
_OPENVINO_LOCATION = re.compile(r"(Exception from|Check '.*' failed at) src/.*:\d+:$")
# Fragments of error texts of libraries and systems, in lower case -> what the user can do.
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
    """The plugin library is missing, cannot be loaded or does not support the model."""


class InputError(LfxError):
    """Ids, masks or text that the model cannot take."""


class LengthError(InputError):
    """A sequence of more tokens than the model takes."""


class ParityError(LfxError):
    """An artifact whose outputs differ from the model's by more than the tolerance."""


class ArtifactError(LfxError):
    """A bundle or plan that is missing, truncated, changed or of another format."""


class OverloadError(LfxError):
    """More pending requests than a Batcher's max_pending, or a closed Batcher; a server should answer 503."""


class DependencyError(LfxError):
    """An extra that is not installed, or a backend that is not on this machine."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra installs it.

    Raises:
        DependencyError: the module is not installed, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        failure, package = "is not installed; install it with", module.split(".", maxsplit=1)[0]
        if not isinstance(error, ModuleNotFoundError) or (error.name or "").split(".")[0] != package:
            failure = f"cannot be imported ({one_line(error, 160)}); correct that, or install it again with"
        raise DependencyError(f"{module} {failure}: pip install 'longformer-lfx[{extra}]'") from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first informative line of another library's error, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not _OPENVINO_LOCATION.match(line)]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def with_cure(error: BaseException, limit: int = 300) -> str:
    """`one_line`, or an OSError's own text, followed by a cure if memory or disk ran out or a file is missing."""
    text = one_line(error, limit)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        text = f"out of memory: {text}" if str(error) else "out of memory"
    message = f"{text} {error}".lower()
    cures = [cure for fragments, cure in _CURES.items() if any(fragment in message for fragment in fragments)]
    return "; ".join([text, *cures[:1]])
