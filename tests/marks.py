"""Which cases of a test are in the fast part of the tests (`make test-fast`): the others get the marker `slow`."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def fast_if(rule: Callable[..., bool]) -> pytest.MarkDecorator:
    """Mark as slow the cases of a parametrized test whose parameters do not fulfil a rule.

    Args:
        rule: a function of some of the test's parameters, by their names. `case` is the id of the case, as in the
            brackets of its name.
    """
    return pytest.mark.fast_if.with_args(rule)
