"""Checks of input from outside lfx: options (numbers, strings, flags, paths) and JSON."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from lfx.errors import InputError, LfxError, one_line
from lfx.files import MOUNTED, is_mount_point

# Types of JSON values; see `check_shape`. A NUMBER is finite as a float; a COUNT may be null.
NUMBER, COUNT = (int, float), (int, NoneType)
LARGEST = 2**63 - 1  # default upper limit of whole numbers: the largest int64
_MAX_DEPTH = 100  # levels of nested JSON, far below Python's recursion limit


def whole_number(value: Any, name: str, low: int, high: int = LARGEST, error: type[LfxError] = InputError) -> int:
    """Check an option that must be a whole number, and return it as an int.

    Args:
        value: a Python or numpy integer; bool is refused.
        name: name of the option, for the message.
        low, high: smallest and largest allowed value, both included.
        error: the type of LfxError to raise.
    Raises:
        LfxError: of type `error`: the value has another type or is out of range.
    """
    limits = f"a whole number from {low} to {high}"
    allowed = limits if high < LARGEST else f"a whole number, {low} or more"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} is {shown(value)}; give {allowed}")
    number = int(value)
    if not low <= number <= high:
        raise error(f"{name} {shown(number)} is out of range; give {limits if number > high else allowed}")
    return number


def real_number(value: Any, name: str, low: float, high: float, error: type[LfxError] = InputError) -> float:
    """Check an option that must be a real number from `low` to `high`, and return it as a float.

    Raises:
        LfxError: of type `error`: the value has another type, or is out of range or NaN.
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
    """Check an option that must be one of the strings in `allowed`, and return it.

    Raises:
        LfxError: of type `error`: the value is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{name} {shown(value)} is not known; choose one of: {', '.join(allowed)}")
    return value


def flag(value: Any, name: str, error: type[LfxError] = InputError) -> bool:
    """Check an option that must be True or False, and return it.

    Raises:
        LfxError: of type `error`: the value is no bool.
    """
    if not isinstance(value, bool):
        raise error(f"{name} is {shown(value)}; give True or False")
    return value


def function(value: Any, name: str, error: type[LfxError] = InputError) -> Any:
    """Check an option that must be callable, and return it.

    Raises:
        LfxError: of type `error`: the value cannot be called.
    """
    if not callable(value):
        raise error(f"{name} is {shown(value)}; give a function")
    return value


def is_iterable(value: Any) -> bool:
    """Whether a value can be iterated over. An array without axes can not, although it is an `Iterable`."""
    return isinstance(value, Iterable) and getattr(value, "shape", None) != ()


def file_path(value: Any, name: str, error: type[LfxError] = InputError) -> Path:
    """Check an option that must be a path, and return it. The file need not exist.

    Raises:
        LfxError: of type `error`: the value is no path, is too long, holds a NUL, or lies in a folder that this user
            may not search.
    """
    if not isinstance(value, str | os.PathLike):
        raise error(f"{name} is {shown(value)}; give a path")
    try:
        path = Path(value)
    except Exception as problem:  # of its own __fspath__
        raise error(f"{name} is {shown(value)}, which gives no path ({one_line(problem, 80)})") from problem
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise error(f"{name} {shown(str(path))} cannot be opened: {reason}; give another path") from problem
    return path


def output_file(value: Any, name: str, error: type[LfxError] = InputError) -> Path:
    """Check an option that names a file to write, and return its path: not a folder, and its folder exists.

    Raises:
        LfxError: of type `error`: the path is a folder or a mount point, its folder does not exist, or `file_path`
            refuses it.
    """
    path = file_path(value, name, error)
    try:
        is_writable = not path.is_dir() and path.absolute().parent.is_dir()
    except OSError as problem:
        raise error(f"{path} cannot be written: {problem.strerror}; choose another {name}") from problem
    if not is_writable:
        raise error(f"{path} cannot be written: it is a folder, or its folder does not exist; choose another {name}")
    if is_mount_point(path):
        raise error(f"{path} cannot be written: {MOUNTED}")
    return path


def parse_json(text: str | bytes) -> Any:
    """Parse JSON strictly: NaN, Infinity and repeated keys of an object are errors.

    Raises:
        ValueError: the text is not such JSON, not UTF-8, or nested more than 100 levels deep.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        children = (list(item.values()) if isinstance(item, dict) else item for item in level)
        level = [
            item for items in children if isinstance(items, list) for item in items if isinstance(item, dict | list)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def check_shape(value: Any, shape: Any, name: str) -> None:
    """Check the types inside a JSON value.

    Args:
        shape: the expected types. A type, or a tuple of types, for a plain value; [shape] for a list; {key: shape} for
            an object, which may have other keys too. A key that ends with "?" is optional; "*" stands for all keys.
        name: name of the value, for the message.
    Raises:
        ValueError: a value has another type, a number is not finite or a key is missing; the message names it.
    """
    if isinstance(shape, dict):
        _require_type(value, (dict,), name)
        for key, inner in shape.items():
            if key == "*":
                for item_key, item in value.items():
                    label = item_key if item_key.isprintable() else ascii(item_key)
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
    if type(value) not in types:  # isinstance would take a bool for an int
        names = " or ".join("null" if allowed is NoneType else allowed.__name__ for allowed in types)
        raise ValueError(f"{name} is broken: {type(value).__name__} where {names} should be")
    if float in types and not _is_finite(value):
        raise ValueError(f"{name} is broken: {shown(value)} where a finite number should be")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int may be too large for a float
        return False


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Serialize plain types to JSON; NaN and infinities, which JSON does not have, become null."""
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
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {shown(next(name for name in counts if counts[name] > 1))} appears twice")
    return value


def shown(value: Any) -> str:
    """Format a value for an error message: its repr, strings shortened; its type if the repr is long or unprintable."""
    try:
        text = repr(f"{value[:60]}…" if isinstance(value, str) and len(value) > 70 else value)
    except Exception:
        return type(value).__name__
    if len(text) <= 80 and text.isprintable():
        return text
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
