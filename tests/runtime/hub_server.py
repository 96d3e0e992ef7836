"""A server on this machine with the part of the hub's HTTP API that huggingface_hub needs; repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_test"
_LARGE = 10_000  # files from this size on go through Git LFS


@dataclass
class Repository:
    """Files of one branch by name, and the digest of the last commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = "0" * 40


@dataclass
class Hub:
    """The repositories by name, the uploaded objects of Git LFS, and all requests as "METHOD path"."""

    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run the server on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_of_this_process(cache: Path) -> Iterator[Hub]:
    """A hub for this process and for those that it starts, with a cache of its own."""
    from huggingface_hub import constants

    with running_hub() as server, pytest.MonkeyPatch.context() as patch:
        variables = {
            "HF_ENDPOINT": server.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in variables.items():
            patch.setenv(name, value)
        # huggingface_hub reads its variables when it is imported.
        patch.setattr(constants, "ENDPOINT", server.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        parts = path.strip("/").split("/")
        if self.command in ("HEAD", "GET") and parts[2:3] == ["resolve"]:
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), allowed)
        elif parts[0] == "objects":
            self.hub.objects[parts[1]] = body
            self._send({})
        elif not allowed:
            self._send({"error": "Invalid user token."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            private = bool(asked.get("private")) or asked.get("visibility") == "private"  # before and since version 2
            exists = name in self.hub.repositories
            self.hub.repositories.setdefault(name, Repository(private=private))
            address = f"{self.hub.address}/{name}"
            self._send({"url": address, "error": "You already created this model repo"}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] >= _LARGE else "regular"} for f in files]
            self._send({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.address}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif parts[:2] == ["api", "models"] and (len(parts) == 4 or parts[4:] == ["revision", "main"]):
            name = "/".join(parts[2:4])
            self._send({"id": name, "sha": self.hub.repositories[name].commit})
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), body)
        else:
            self._send({"error": f"the test server does not know {path}"}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        items = [json.loads(line) for line in body.splitlines()]
        if items[0]["value"].get("parentCommit", repository.commit) != repository.commit:
            self._send({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        for item in items:
            value = item["value"]
            if item["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commit = hashlib.sha1(repository.commit.encode() + body).hexdigest()
        address = f"{self.hub.address}/{name}/commit/{repository.commit}"
        self._send({"success": True, "commitUrl": address, "commitOid": repository.commit, "hookOutput": ""})

    def _send_file(self, name: str, revision: str, file: str, allowed: bool) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not allowed):
            self._send({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", repository.commit):
            self._send({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif file not in repository.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}
            self._send({"error": "Entry not found"}, 404, headers)
        else:
            content = repository.files[file]
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send_bytes(content, 200, headers)

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
