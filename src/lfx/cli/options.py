"""What paths and texts of the command line may be, and which options contradict each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from lfx.checks import file_path
from lfx.errors import InputError

MOST_TOKENS = 2**31 - 1  # largest number that an option of tokens takes


class FilledText(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on only
    """A string that is not empty."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuses an empty string, as wrong usage."""
        if not value:
            self.fail("it is empty", param, ctx)
        return value


class FilePath(FilledText):
    """A path that the system can look up, whether or not something is there; `what` says of what, for errors."""

    name = "path"

    def __init__(self, what: str = "") -> None:
        self._what = f" ({what})" if what else ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuses an empty string, as wrong usage. Raises: InputError: the path cannot be looked up."""
        return file_path(super().convert(value, param, ctx), _label(param) + self._what)


class OutputPath(FilePath):
    """A path that a result is written to: a new one, or a file (or with `folder`, a folder) to replace."""

    def __init__(self, *, folder: bool = False) -> None:
        super().__init__()
        self._folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As `FilePath`. Raises: InputError: something else is there, or no folder to write to."""
        path = super().convert(value, param, ctx)
        reason = self._reason(path)
        if reason:
            raise InputError(f"{_label(param)} {path} cannot be written: {reason}")
        return path

    def _reason(self, path: Path) -> str:
        # Of /dev nothing: even /dev/stdout is a link, which would be replaced.
        if path.absolute().parent == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):
            return "it is a device or a pipe; give the name of a file"
        if path.is_dir() and not self._folder:
            return f"it is a folder; give the name of a file, such as {path / 'result'}"
        if not path.absolute().parent.is_dir():
            return "its folder does not exist; make it first"
        return ""


class Command(click.Command):
    """A command that refuses options of which one would beat the other in silence."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises: click.UsageError: an option is given twice, or an output is another path that is given."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        _check_options([p for p in given if isinstance(p, click.Option) and not p.multiple], ctx)
        rest = super().parse_args(ctx, args)
        _check_outputs([p for p in self.params if isinstance(p.type, FilePath)], ctx)
        return rest


def _check_options(given: list[click.Option], ctx: click.Context) -> None:
    for option in given:
        rivals = dict.fromkeys(_label(other) for other in given if other.name == option.name)
        if len(rivals) > 1:
            raise click.UsageError(f"{' and '.join(rivals)} contradict each other; give one", ctx)
        may_repeat = option.is_flag and not option.secondary_opts
        if given.count(option) > 1 and not may_repeat:
            raise click.UsageError(f"{_label(option)} is given more than once; give it once", ctx)


def _check_outputs(params: list[click.Parameter], ctx: click.Context) -> None:
    places = {p: os.path.realpath(path) for p in params if (path := ctx.params.get(str(p.name))) is not None}
    for output in (p for p in places if isinstance(p.type, OutputPath)):
        for other, place in places.items():
            if other is not output and place == places[output]:
                names = f"{_label(output)} and {_label(other)}"
                raise click.UsageError(f"{names} are the same file, which would be replaced; give another name", ctx)


def _label(param: click.Parameter | None) -> str:
    """An option as it is typed, an argument as the help calls it."""
    if isinstance(param, click.Option):
        return "/".join((param.opts[0], *param.secondary_opts[:1]))
    return param.human_readable_name if param is not None else "path"
