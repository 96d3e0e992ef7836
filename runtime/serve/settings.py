"""The settings of `lfx serve`, which a supervisor passes to its workers as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from lfx.checks import file_path, real_number, shown
from lfx.errors import InputError

KEEP_ALIVE_SECONDS = 60  # longest time that a connection is idle between two requests
MAX_HEADER_BYTES = 65_536
# Default limit of a body, in bytes per token of the longest sequence. In UTF-8, English has 4 to 5 bytes per token and
# Chinese 3; a character that JSON escapes has 6.
BYTES_PER_TOKEN = 16
OTHER_BYTES = 1024  # of a body besides its texts
NO_LIMIT_TOKENS = 16_384  # longest sequence of a model without a limit
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Settings:
    """What is served, where, and within which limits.

    Attributes:
        models: name -> path of a bundle, an .onnx file or a plan; requests that name no model use the first.
        host, port: the address; port 0 takes a free one.
        workers: number of processes that share the port, each with its own Engines.
        backend, provider, threads, precision, token_budget: those of `Engine`; the Batcher uses the token_budget too.
        tokenizer: folder of the tokenizer, for a single model; None = the bundle's.
        max_delay_ms: that of `Batcher`.
        api_key: requests must carry it as `Authorization: Bearer KEY`; None = no key is needed.
        max_pending: a worker with this number of texts in progress (being tokenized, waiting, being computed, or
            without a reply yet) answers further requests with status 429.
        max_inputs: largest number of texts in a request.
        max_beams: largest number of beams of a generated text.
        max_body_bytes: largest body of a request; None = derived from the longest sequence of the models.
        answer_seconds: longest time from a request's last byte to its answer; afterwards it is cancelled.
        client_seconds: longest time for a client to send its request, and longest wait for it to read its reply.
        stop_seconds: longest time after a SIGTERM for the requests in progress to be answered.
        max_connections: largest number of open connections of a worker; further ones get status 503.
        log_requests: whether each request is logged on stderr, as a line of JSON.
    Raises:
        InputError: a time is out of range, or NaN.
    """

    models: dict[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    backend: str = "auto"
    provider: str = "cpu"
    threads: int | None = None
    precision: str | None = None
    token_budget: int | None = None
    tokenizer: str | None = None
    max_delay_ms: float = 5.0
    api_key: str | None = None
    max_pending: int = 512
    max_inputs: int = 32
    max_beams: int = 16
    max_body_bytes: int | None = None
    answer_seconds: float = 120.0
    client_seconds: float = 20.0
    stop_seconds: float = 30.0
    max_connections: int = 4096
    log_requests: bool = False

    def __post_init__(self) -> None:
        for name in ("answer_seconds", "client_seconds", "stop_seconds"):
            real_number(getattr(self, name), name, 0.01, 86_400)
        key = self.api_key
        if key is not None and not (key and key == key.strip() and key.isprintable()):
            raise InputError(
                "the API key is empty, begins or ends with a space, or has a character that no header can carry; give "
                "another key"
            )

    def to_json(self) -> str:
        """The settings as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def named_models(arguments: tuple[str, ...]) -> dict[str, str]:
    """Read the arguments NAME=PATH or PATH of the command line; a PATH alone is named after its last component.

    Returns:
        Name -> path.
    Raises:
        InputError: a name cannot be part of a URL, or two models have the same name.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or file_path(argument, "the model").exists():
            name, path = "", argument
        file_path(path, "the model")
        name = name or re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).absolute().name).lstrip(".") or "model"
        if not path or len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
            raise InputError(
                f"{shown(argument)} is no model; give PATH or NAME=PATH, with a NAME of letters, digits, '.', '_', '-' "
                "and '/'"
            )
        if name in models:
            raise InputError(f"two models are named {name}; give each another name: NAME=PATH")
        models[name] = path
    return models
