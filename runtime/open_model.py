"""`OpenModel`: a loaded model with its files, which stays open until it is closed or its process forks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lfx.checks import whole_number
from lfx.errors import InputError, LfxError
from lfx.manifest import sha256
from lfx.runtime import backends, forks
from lfx.runtime.loading import load_model


class OpenModel:
    """The part of an Engine that is not about runs; see `lfx.runtime.Engine` for the arguments and attributes."""

    # Makes the same object again, in another process.
    _reopen: Callable[[], Any]

    def __init__(
        self, path: str | Path, backend: str, provider: str, threads: int | None, precision: str | None, kernels: str
    ) -> None:
        self.threads = threads
        self._forked = False
        model = load_model(path, backend, provider, threads, precision, kernels)
        self.manifest, self.signature = model.manifest, model.signature
        self._around = model.around
        self._files = tuple(model.artifact.files.values()) if model.artifact is not None else ()
        self._backend: backends.Backend | None = model.backend
        self._graphs = model.graphs
        self.backend = model.backend.name
        self.kernels = model.kernels
        self.precision = precision or self.signature.precision
        self.path = model.path.absolute()
        forks.watch(self)

    @property
    def graphs(self) -> tuple[backends.TensorBackend, backends.TensorBackend] | None:
        """The encoder and the decoder of an open model that writes texts; None for other models."""
        return self._graphs

    @property
    def text_source(self) -> Any:
        """The manifest, or for a single ONNX file the bundle that it was in when it was opened; see `text_files`."""
        return self.manifest if self.manifest is not None else self._around

    @property
    def identity(self) -> str:
        """Digest of the model: its manifest's, or those of a single ONNX file and of its weight files."""
        if self.manifest is not None:
            return str(self.manifest.to_dict()["manifest_sha256"])
        return " ".join(sha256(file) for file in self._files)

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether the Engine can run a batch of this shape: within the model's limits and, for a plan, in a profile."""
        batch, seqlen = whole_number(batch, "batch", 1), whole_number(seqlen, "seqlen", 1)
        longest = self.signature.max_seqlen
        return (longest is None or seqlen <= longest) and self._open().supports_shape(batch, seqlen)

    def shape_check(self) -> Callable[[int, int], bool]:
        """Return a function like `supports_shape` for lengths within the model's limits; it is fast for many calls.

        Raises:
            InputError: the Engine is closed.
            LfxError: the Engine was made before a fork.
        """
        return self._open().supports_shape

    def check_usable(self) -> None:
        """Raise an error if the Engine cannot run.

        Raises:
            InputError: the Engine is closed.
            LfxError: the Engine was made before a fork.
        """
        self._open()

    def _open(self) -> backends.Backend:
        if self._forked:
            raise LfxError(forks.made_before("Engine"))
        backend = self._backend  # another thread may close the Engine while this one runs
        if backend is None:
            raise InputError("this Engine is closed; make a new one")
        return backend

    def forked(self) -> None:
        """Refuse to run in a child process, and never free the model there: that may wait for the parent's threads."""
        self._forked = True
        for model in (self._backend, self._graphs):
            if model is not None:
                forks.keep(model)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._backend is None:
            raise InputError("this Engine is closed, and cannot be pickled or copied; make a new one")
        return self._reopen, ()

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        self._backend = self._graphs = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
