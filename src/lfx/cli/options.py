"""click parameter types for paths and texts, and a command class that refuses contradicting options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfx.checks import file_path
from lfx.errors import InputError
from lfx.files import MOUNTED, is_mount_point, is_same

MOST_TOKENS = 2**31 - 1  # upper limit of options in tokens


class FilledText(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on only
    """A non-empty string."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the string; an empty one is a usage error."""
        if not value:
            self.fail("it is empty", param, ctx)
        return value


class FilePath(FilledText):
    """A valid path, existing or not.

    Args:
        description: the file's type, such as "a bundle", for error messages.
    """

    name = "path"

    def __init__(self, description: str = "") -> None:
        self._description = f" ({description})" if description else ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; an empty one is a usage error.

        Raises:
            InputError: the path is too long, or holds a NUL.
        """
        return file_path(super().convert(value, param, ctx), _label(param) + self._description)


class OutputPath(FilePath):
    """A path that a result is written to: a new path or an existing file, which is replaced.

    Args:
        folder: an existing folder is allowed too.
    """

    def __init__(self, *, folder: bool = False) -> None:
        super().__init__()
        self._folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; an empty one is a usage error.

        Raises:
            InputError: the path is a device, a pipe or (without `folder`) a folder or a mount point, or its folder does
                not exist.
        """
        path = super().convert(value, param, ctx)
        reason = self._reason(path)
        if reason:
            raise InputError(f"{_label(param)} {path} cannot be written: {reason}")
        return path

    def _reason(self, path: Path) -> str:
        # Nothing in /dev is allowed: /dev/stdout is a symbolic link, which a rename would replace.
        if path.absolute().parent == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):
            return "it is a device or a pipe; give the name of a file"
        if path.is_dir() and not self._folder:
            return f"it is a folder; give the name of a file, such as {path / 'result'}"
        if not path.absolute().parent.is_dir():
            return "its folder does not exist; make it first"
        if not self._folder and is_mount_point(path):
            return MOUNTED
        return ""


class Command(click.Command):
    """A command that refuses contradicting options; click would silently take the last one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            click.UsageError: an option is given twice, or an output path equals another path argument.
        """
        _, _, options = self.make_parser(ctx).parse_args(args=list(args))
        _check_options([p for p in options if isinstance(p, click.Option) and not p.multiple], ctx)
        remaining = super().parse_args(ctx, args)
        _check_outputs([p for p in self.params if isinstance(p.type, FilePath)], ctx)
        return remaining


def _check_options(options: list[click.Option], ctx: click.Context) -> None:
    for option in options:
        labels = dict.fromkeys(_label(other) for other in options if other.name == option.name)
        if len(labels) > 1:
            raise click.UsageError(f"{' and '.join(labels)} contradict each other; give one", ctx)
        may_repeat = option.is_flag and not option.secondary_opts
        if options.count(option) > 1 and not may_repeat:
            raise click.UsageError(f"{_label(option)} is given more than once; give it once", ctx)


def _check_outputs(params: list[click.Parameter], ctx: click.Context) -> None:
    paths = {p: path for p in params if (path := ctx.params.get(str(p.name))) is not None}
    for output in (p for p in paths if isinstance(p.type, OutputPath)):
        for other, path in paths.items():
            if other is not output and is_same(path, paths[output]):
                names = f"{_label(output)} and {_label(other)}"
                raise click.UsageError(f"{names} are the same file, which would be replaced; give another name", ctx)


def _label(param: click.Parameter | None) -> str:
    """Return the name of an option or argument, as the help shows it."""
    if isinstance(param, click.Option):
        return "/".join((param.opts[0], *param.secondary_opts[:1]))
    return param.human_readable_name if param is not None else "path"


def document_options(command: Any) -> Any:
    """Add the options of commands that run on documents: --stride, --max-windows and --tokenizer."""
    stride = click.option(
        "--stride",
        type=click.IntRange(1, MOST_TOKENS),
        metavar="N",
        help="Cut long documents into windows that start every N tokens.",
    )
    max_windows = click.option(
        "--max-windows",
        type=click.IntRange(1, MOST_TOKENS),
        metavar="N",
        help="Refuse a document that --stride cuts into more windows.  [default: 4096]",
    )
    tokenizer = click.option(
        "--tokenizer", type=FilePath(), help="Read the tokenizer from this folder.  [default: the bundle's]"
    )
    return stride(max_windows(tokenizer(command)))
