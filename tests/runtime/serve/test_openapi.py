"""schemathesis: requests made from the OpenAPI description, right and wrong ones, never get a 5xx."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.marks import fast_if
from tests.runtime.serve.running import Running

OPERATIONS = [
    "GET /health",
    "GET /info",
    "GET /metrics",
    "GET /models",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /embed",
    "POST /generate",
    "POST /generate_stream",
    "POST /models/{name}/embed",
    "POST /models/{name}/generate",
    "POST /models/{name}/generate_stream",
    "POST /models/{name}/predict",
    "POST /models/{name}/run",
    "POST /predict",
    "POST /run",
    "POST /v1/embeddings",
]


def test_every_operation_is_tried(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    assert sorted(operation.ok().label for operation in schema.get_all_operations()) == OPERATIONS


# Wrong requests have wrong bodies; the routes with a name take the same as those without.
WITH_BODIES = [label for label in OPERATIONS if label.startswith("POST") and "{" not in label]
CASES = [
    *(pytest.param(label, GenerationMode.POSITIVE, id=f"{label}-right") for label in OPERATIONS),
    *(pytest.param(label, GenerationMode.NEGATIVE, id=f"{label}-wrong") for label in WITH_BODIES),
]


@fast_if(lambda label: label in ("GET /info", "POST /run", "POST /embed"))
@pytest.mark.parametrize(("label", "mode"), CASES)
def test_no_request_gets_a_server_error(label: str, mode: GenerationMode, server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    method, path = label.split()
    operation = schema[path][method]

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_one(case: schemathesis.Case) -> None:
        reply = case.call(timeout=120)
        assert reply.status_code < 500, reply.text
        assert reply.status_code != 200 or "NaN" not in reply.text

    try_one()
