"""Real clients of the hub's layout give Engine's numbers, or refuse with the reason that the page states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.clients import clients
from tests.clients.models import expected, make_models
from tests.conftest import MakeOnce

pytestmark = [
    pytest.mark.slow,
    pytest.mark.clients,
    pytest.mark.skipif(clients.missing() is not None, reason=str(clients.missing())),
]


@pytest.fixture(scope="session")
def models(made_once: MakeOnce) -> Path:
    return made_once("clients", make_models)


@pytest.mark.parametrize("case", clients.CASES, ids=str)
def test_a_client_gives_the_engines_numbers_or_its_own_reason(case: clients.Case, models: Path) -> None:
    result = clients.run(case, models / case.folder)
    if case.refused is not None:
        assert case.refused in result["error"]
        return
    assert "error" not in result, result["error"]
    answer = expected(models / case.folder, case.output)
    error = np.abs(np.reshape(result[case.output], answer.shape) - answer).max()
    if case.is_wrong:  # if it is right now, the page must say so
        assert error > 100 * clients.TOLERANCE
    else:
        assert error <= clients.TOLERANCE
