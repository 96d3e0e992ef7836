"""The routes, with their OpenAPI description.

To add a route that takes texts: a body with examples and a handler in `native`, `openai`, `tei` or `tgi` (or a module
beside them), and an `add` in `_add_models`; its path in `gate.KNOWN_PATHS`; the form of its errors in
`replies.error_body`, if it is not lfx's own; tests in tests/runtime/serve/test_routes.py; a row in docs/deployment.md.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer

import lfx
from lfx.checks import shown
from lfx.errors import LfxError
from lfx.inline_hashes import inline_hashes
from lfx.runtime.serve import native, openai, tei, tgi
from lfx.runtime.serve.body import request_body
from lfx.runtime.serve.gate import Gate
from lfx.runtime.serve.replies import RefusalError, error_body, error_reply, json_reply, refusal_of
from lfx.runtime.serve.service import Service
from lfx.runtime.serve.stats import Stats

PAGE = Path(__file__).with_name("page.html")
_DESCRIPTION = (
    "Longformer models over HTTP: lfx's own endpoint for every task, OpenAI's embeddings, and the routes of "
    "text-embeddings-inference and text-generation-inference. A list of texts in one request, and requests that arrive "
    "together, run in batches."
)
_REFUSALS = {
    400: "The request does not match the schema (OpenAI's routes), or a text is empty.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The client sent its request too slowly.",
    413: "The body, the number of texts, a text or the reply is above its limit.",
    415: "The body is compressed.",
    422: "The request does not match the schema, or the model cannot take it.",
    424: "The route does not serve the model's task.",
    429: "Too many texts are in progress. Try again after the seconds of Retry-After.",
    500: "The model failed.",
    503: "The models are being opened, the server is stopping, or the answer took too long. See Retry-After.",
}
Handler = Callable[..., Awaitable[Response]]


def make_app(service: Service, stats: Stats) -> Gate:
    """Make the ASGI application that answers requests with `service`."""
    secured = [Security(HTTPBearer(auto_error=False))] if service.settings.api_key is not None else []
    app = FastAPI(
        title="lfx serve",
        version=lfx.__version__,
        description=_DESCRIPTION,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(app)
    _add_monitoring(app, service, stats)
    _add_descriptions(app, service, secured)
    _add_models(app, service, secured)
    return Gate(app, service, stats)


def _responses(path: str, example: Any) -> dict[int | str, dict[str, Any]]:
    """The replies of a route, for OpenAPI."""
    media_type = "text/event-stream" if path.endswith("_stream") else "application/json"
    replies: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer.", "content": {media_type: {"example": example}}}
    }
    for status, description in _REFUSALS.items():
        body = error_body(path, RefusalError(status, "what was given, what is allowed and what to do"))
        replies[status] = {"description": description, "content": {"application/json": {"example": body}}}
    return replies


def _add_errors(app: FastAPI) -> None:
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusalError)
        return error_reply(request.url.path, error)

    async def lfx_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, LfxError)
        return error_reply(request.url.path, refusal_of(error))

    async def no_route(request: Request, error: Exception) -> Response:
        return error_reply(
            request.url.path, RefusalError(404, f"there is no route {shown(request.url.path)}; see /openapi.json")
        )

    async def no_method(request: Request, error: Exception) -> Response:
        message = f"{request.url.path} does not take {shown(request.method)} requests; see /openapi.json"
        refusal = RefusalError(405, message)
        reply = error_reply(request.url.path, refusal)
        reply.headers.update(getattr(error, "headers", None) or {})
        return reply

    async def other_error(request: Request, error: Exception) -> Response:
        message = f"{type(error).__name__} in the server; please report it"
        return error_reply(request.url.path, RefusalError(500, message, "Backend", "server_error"))

    app.add_exception_handler(RefusalError, refuse)
    app.add_exception_handler(LfxError, lfx_error)
    app.add_exception_handler(404, no_route)
    app.add_exception_handler(405, no_method)
    app.add_exception_handler(Exception, other_error)


def _add_monitoring(app: FastAPI, service: Service, stats: Stats) -> None:
    @app.get("/health", summary="Whether the models are ready", responses={503: {"description": "Not ready."}})
    async def health() -> Response:
        condition = service.condition
        reply = json_reply({"status": condition}, 200 if condition == "ready" else 503)
        if condition != "ready":
            reply.headers["Retry-After"] = "1"
        return reply

    @app.get("/metrics", summary="Counters of all workers in the Prometheus text format")
    async def metrics() -> Response:
        return Response(await stats.prometheus(), media_type="text/plain; version=0.0.4")

    page = PAGE.read_bytes()
    policy = _content_security_policy(page.decode())

    @app.get("/", summary="A page to try the models", include_in_schema=False)
    async def try_page() -> Response:
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")

    # Load balancers may ask with HEAD.
    for path, handler in (("/health", health), ("/", try_page)):
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


def _content_security_policy(page: str) -> str:
    """Allow the page's own script and style, and requests to this server; nothing else."""
    own = f"script-src {inline_hashes(page, 'script')}; style-src {inline_hashes(page, 'style')}"
    return (
        f"default-src 'none'; {own}; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _add_descriptions(app: FastAPI, service: Service, secured: list[Any]) -> None:
    @app.get("/models", summary="Inputs, outputs and limits of each model", dependencies=secured)
    async def models() -> Response:
        service.check_opened()
        limits = {"max_inputs": service.settings.max_inputs, "max_body_bytes": service.max_body_bytes}
        return json_reply({"models": service.describe(), **limits})

    @app.get("/v1/models", summary="The models (OpenAI)", dependencies=secured)
    async def openai_models() -> Response:
        return json_reply(openai.models(service))

    @app.get("/v1/models/{name:path}", summary="A model (OpenAI)", dependencies=secured, responses={404: {}})
    async def openai_model(name: str) -> Response:
        for model in openai.models(service)["data"]:
            if model["id"] == name:
                return json_reply(model)
        raise service.no_such_model(name)

    @app.get("/info", summary="The first model (text-embeddings-inference)", dependencies=secured)
    async def info() -> Response:
        service.check_opened()
        return json_reply(tei.info(service))


def _add_models(app: FastAPI, service: Service, secured: list[Any]) -> None:
    def add(path: str, summary: str, form: Any, examples: dict[str, Any], reply: Any, handler: Handler) -> None:
        app.add_api_route(
            path,
            handler,
            methods=["POST"],
            summary=summary,
            dependencies=secured,
            response_class=Response,
            responses=_responses(path, reply),
            openapi_extra=request_body(form, examples),
            name=path,
            operation_id=re.sub(r"\W+", "_", path).strip("_"),
        )

    async def run(request: Request) -> Response:
        return await native.run(service, await request.body(), None)

    async def run_model(request: Request, name: str) -> Response:
        return await native.run(service, await request.body(), name)

    async def v1_embeddings(request: Request) -> Response:
        return await openai.embeddings(service, await request.body())

    async def embed(request: Request) -> Response:
        return await tei.embeddings(service, await request.body(), None)

    async def embed_model(request: Request, name: str) -> Response:
        return await tei.embeddings(service, await request.body(), name)

    async def predict(request: Request) -> Response:
        return await tei.predictions(service, await request.body(), None)

    async def predict_model(request: Request, name: str) -> Response:
        return await tei.predictions(service, await request.body(), name)

    async def generate(request: Request) -> Response:
        return await tgi.generate(service, await request.body(), None)

    async def generate_model(request: Request, name: str) -> Response:
        return await tgi.generate(service, await request.body(), name)

    async def generate_stream(request: Request) -> Response:
        return await tgi.generate_stream(service, await request.body(), None)

    async def generate_model_stream(request: Request, name: str) -> Response:
        return await tgi.generate_stream(service, await request.body(), name)

    runs = ("Answers and outputs of any model", native.RunRequest, native.EXAMPLES, native.REPLY)
    embeds = ("Embeddings (text-embeddings-inference)", tei.EmbedRequest, tei.EMBED_EXAMPLES, tei.EMBED_REPLY)
    labels = ("Labels (text-embeddings-inference)", tei.PredictRequest, tei.PREDICT_EXAMPLES, tei.PREDICT_REPLY)
    vectors = ("Embeddings (OpenAI)", openai.EmbeddingsRequest, openai.EXAMPLES, openai.REPLY)
    texts = ("A text (text-generation-inference)", tgi.GenerateRequest, tgi.EXAMPLES, tgi.REPLY)
    streams = (
        "A text, token by token as server-sent events (text-generation-inference)",
        tgi.GenerateRequest,
        tgi.STREAM_EXAMPLES,
        tgi.STREAM_REPLY,
    )
    add("/run", *runs, run)
    add("/models/{name:path}/run", *runs, run_model)
    add("/v1/embeddings", *vectors, v1_embeddings)
    add("/embed", *embeds, embed)
    add("/models/{name:path}/embed", *embeds, embed_model)
    add("/predict", *labels, predict)
    add("/models/{name:path}/predict", *labels, predict_model)
    add("/generate", *texts, generate)
    add("/models/{name:path}/generate", *texts, generate_model)
    add("/generate_stream", *streams, generate_stream)
    add("/models/{name:path}/generate_stream", *streams, generate_model_stream)
