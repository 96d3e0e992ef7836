"""Which cases of a test are in the fast part of the tests (`make test-fast`): the others get the marker `slow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def fast_if(rule: Callable[..., bool]) -> pytest.MarkDecorator:
    """Mark as slow the cases of a parametrized test whose parameters do not fulfil a rule.

    Args:
        rule: a function of some of the test's parameters, by their names. `case` is the id of the case, as in the
            brackets of its name.
    """
    return pytest.mark.fast_if.with_args(rule)


def first_of_each(values: Iterable[Any], key: Callable[[Any], object] = lambda value: None) -> list[Any]:
    """Parameters for pytest: the first value with each key is in the fast part, the others in the slow part."""
    seen: set[object] = set()
    parameters = []
    for value in values:
        is_fast = key(value) not in seen
        seen.add(key(value))
        parameters.append(pytest.param(*_tuple(value), marks=[] if is_fast else [pytest.mark.slow]))
    return parameters


def fast_where(values: Iterable[Any], is_fast: Callable[[Any], bool]) -> list[Any]:
    """Parameters for pytest: values for which `is_fast` holds are in the fast part, the others in the slow part."""
    return [pytest.param(*_tuple(value), marks=[] if is_fast(value) else [pytest.mark.slow]) for value in values]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
