"""Checks of what comes from outside: numbers and paths of options, JSON. Each failure is one of lfx's own errors."""

from __future__ import annotations

import json
import math
import numbers
import os
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from lfx.errors import InputError, LfxError

NUMBER, COUNT = (int, float), (int, NoneType)  # types of JSON values; see `check_shape`
LARGEST = 2**63 - 1  # of a whole number that names no other limit
_DEEPEST = 100  # levels of JSON, far fewer than Python's own stack has


def whole_number(value: Any, name: str, low: int, high: int = LARGEST, error: type[LfxError] = InputError) -> int:
    """An option that must be a whole number from `low` to `high`; numpy's integers will do.

    Raises:
        LfxError: of the type `error`, where it is another type or out of range.
    """
    allowed = f"a whole number from {low} to {high}" if high < LARGEST else f"a whole number, {low} or more"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} is {shown(value)}; give {allowed}")
    number = int(value)
    if not low <= number <= high:
        raise error(f"{name} {shown(number)} is out of range; give {allowed}")
    return number


def real_number(value: Any, name: str, low: float, high: float, error: type[LfxError] = InputError) -> float:
    """An option that must be a number from `low` to `high`.

    Raises:
        LfxError: of the type `error`, where it is another type or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name} is {shown(value)}; give a number from {low:g} to {high:g}")
    try:
        number = float(value)
    except OverflowError:  # an int may be too large for a float
        number = math.inf
    if not low <= number <= high:
        raise error(f"{name} {shown(value)} is out of range; give a number from {low:g} to {high:g}")
    return number


def one_of(value: Any, name: str, allowed: Any, error: type[LfxError] = InputError) -> str:
    """An option that must be one of some strings.

    Raises:
        LfxError: of the type `error`, where it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{name} {shown(value)} is not known; choose one of: {', '.join(allowed)}")
    return value


def flag(value: Any, name: str, error: type[LfxError] = InputError) -> bool:
    """An option that must be True or False.

    Raises:
        LfxError: of the type `error`, where it is not.
    """
    if not isinstance(value, bool):
        raise error(f"{name} is {shown(value)}; give True or False")
    return value


def file_path(value: Any, name: str, error: type[LfxError] = InputError) -> Path:
    """An option that must be a path which the system can look up, whether or not something is there.

    Raises:
        LfxError: of the type `error`, where it is another type, too long, or holds a NUL.
    """
    if not isinstance(value, str | os.PathLike):
        raise error(f"{name} is {shown(value)}; give a path")
    try:
        path = Path(value)
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, TypeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise error(f"{name} {shown(os.fspath(value))} cannot be opened: {reason}; give another path") from problem
    return path


def output_file(value: Any, name: str, error: type[LfxError] = InputError) -> Path:
    """An option that must be a path where a file can be: no folder, in a folder that is there.

    Raises:
        LfxError: of the type `error`, where it is none.
    """
    path = file_path(value, name, error)
    try:
        fits = not path.is_dir() and path.absolute().parent.is_dir()
    except OSError as problem:
        raise error(f"{path} cannot be written: {problem.strerror}; choose another {name}") from problem
    if not fits:
        raise error(f"{path} cannot be written: it is a folder, or its folder does not exist; choose another {name}")
    return path


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as its standard has it: without NaN or infinities, and with each key of an object once.

    Raises:
        ValueError: the text is no such JSON, not UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    layer = [value]
    for _ in range(_DEEPEST):
        inner = (list(item.values()) if isinstance(item, dict) else item for item in layer)
        layer = [item for items in inner if isinstance(items, list) for item in items if isinstance(item, dict | list)]
        if not layer:
            return value
    raise ValueError("nested too deeply")


def check_shape(value: Any, shape: Any, name: str) -> None:
    """Check that a JSON value has the types that it should have.

    Args:
        shape: a type, or a tuple of types; [shape] for a list; {key: shape} for an object that has these keys, and may
            have others. A key that ends with "?" may be missing; "*" stands for every key of the object.
        name: what the value is, for the message.
    Raises:
        ValueError: a value of another type, or a key that is missing; says where.
    """
    if isinstance(shape, dict):
        _require_type(value, (dict,), name)
        for key, inner in shape.items():
            if key == "*":
                for found, item in value.items():
                    label = found if found.isprintable() else ascii(found)
                    check_shape(item, inner, f"{name}: {label[:80]}")
            elif key.removesuffix("?") in value:
                check_shape(value[key.removesuffix("?")], inner, f"{name}: {key.removesuffix('?')}")
            elif not key.endswith("?"):
                raise ValueError(f"{name} is broken: it has no {key}")
    elif isinstance(shape, list):
        _require_type(value, (list, tuple), name)
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{name}[{i}]")
    else:
        _require_type(value, shape if isinstance(shape, tuple) else (shape,), name)


def _require_type(value: Any, types: tuple[type, ...], name: str) -> None:
    if type(value) not in types:  # a bool is no int here
        names = " or ".join("null" if found is NoneType else found.__name__ for found in types)
        raise ValueError(f"{name} is broken: {type(value).__name__} where {names} should be")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON of plain types, with null in the place of NaN and infinities, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def shown(value: Any) -> str:
    """A value for a message: its own form, cut, or its type where that is no short line."""
    try:
        text = repr(f"{value[:60]}…" if isinstance(value, str) and len(value) > 70 else value)
    except Exception:
        return type(value).__name__
    return text if len(text) <= 80 and text.isprintable() else f"a {type(value).__name__}"
