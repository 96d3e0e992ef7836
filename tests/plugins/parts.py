"""Which parameters of a test are in the fast part of the tests, and which in the slow part, which runs after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def first_of_each(values: Iterable[Any], key: Callable[[Any], object] = lambda value: None) -> list[Any]:
    """Parameters for pytest: the first value with each key is in the fast part, the others in the slow part."""
    seen: set[object] = set()
    parameters = []
    for value in values:
        is_fast = key(value) not in seen
        seen.add(key(value))
        parameters.append(pytest.param(*_tuple(value), marks=[] if is_fast else [pytest.mark.slow]))
    return parameters


def fast_if(values: Iterable[Any], is_fast: Callable[[Any], bool]) -> list[Any]:
    """Parameters for pytest: values for which `is_fast` holds are in the fast part, the others in the slow part."""
    return [pytest.param(*_tuple(value), marks=[] if is_fast(value) else [pytest.mark.slow]) for value in values]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
