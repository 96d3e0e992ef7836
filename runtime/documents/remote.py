"""A file of a pyarrow file system, such as an object of S3, with the methods of `Path` that reading documents needs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True)
class RemoteFile:
    """A file that is read through pyarrow.

    Args:
        filesystem: the `pyarrow.fs.FileSystem`.
        path: path of the file in that file system.
    """

    filesystem: Any
    path: str

    @property
    def suffix(self) -> str:
        """The suffix of the file's name, with its dot."""
        return PurePosixPath(self.path).suffix

    def is_file(self) -> bool:
        """Whether the file exists."""
        return bool(self.filesystem.get_file_info(self.path).is_file)

    def open(self, mode: str = "rb") -> Any:
        """Open the file for reading its bytes from the first to the last.

        Raises:
            OSError: the file cannot be opened.
        """
        assert mode == "rb"
        return io.BufferedReader(self.filesystem.open_input_stream(self.path), 1 << 20)

    def open_random_access(self) -> Any:
        """Open the file for pyarrow, which reads parts of it.

        Raises:
            OSError: the file cannot be opened.
        """
        return self.filesystem.open_input_file(self.path)

    def __str__(self) -> str:
        return self.path
