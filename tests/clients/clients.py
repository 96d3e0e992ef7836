"""The clients that read the layout of the hub: how each is run, and what is expected of it."""

from __future__ import annotations

import atexit
import functools
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / "build" / "clients"
PYTHON = ENVIRONMENTS / "python" / "bin" / "python"
NODE = ENVIRONMENTS / "node"
INPUTS: dict[str, Any] = {
    "ids": [[5, 6, 7, 8, 9, 10, 11, 12] * 5, [5, 6, 7, 8] * 5 + [1] * 20],
    "mask": [[1] * 40, [1] * 20 + [0] * 20],
    "texts": ["the quick brown fox", "the lazy dog jumps over the fox"],
    "search": {"max_new_tokens": 10, "min_new_tokens": 10, "no_repeat_ngram_size": 2},
}
_BROWSER = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
_SECONDS = 120
# Largest difference from Engine's numbers. Chosen: 10 times the rounding error of two layers in float32. The int8 model
# runs the same graph in the same engine.
TOLERANCE = 1e-5
# Chromium's own implementation of Vulkan on the CPU, in the place of a GPU.
_SOFTWARE_WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


@dataclass(frozen=True)
class Case:
    """One client with one model.

    Attributes:
        client: name of the package.
        model: the model, as the page names it; `folder` is its folder, which `tests.clients.models` makes.
        file: the model's file in the folder; None if the client finds it.
        how: the options, as the page shows them.
        options: those given to the client, and for onnxruntime-web the name of its build.
        output: the output that is compared with Engine's.
        refused: part of the client's error, if it cannot run the model.
        is_wrong: whether the client gives other numbers, without an error.
    """

    client: str
    model: str
    how: str
    output: str = "last_hidden_state"
    file: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    is_wrong: bool = False

    @property
    def folder(self) -> str:
        """Name of the model's folder; transformers.js finds no files in one with spaces."""
        return slug(self.model)

    def __str__(self) -> str:
        return slug(f"{self.client} {self.model} {self.how}")


def slug(text: str) -> str:
    """Replace each run of other characters than letters, digits and dots by a hyphen."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


_ONNX = "onnx/model.onnx"
_CLASSIFY = {"task": "text-classification"}
_WRITE = {"task": "text2text-generation"}
_FEATURES = {"class": "ORTModelForFeatureExtraction"}
_WEB_DATA = {"externalData": [{"path": "model.onnx_data", "data": "/model/model.onnx_data"}]}
_WEBGPU = {"executionProviders": ["webgpu"], "build": "ort.webgpu"}
_WEBGPU_DEFAULT = {"executionProviders": ["webgpu"], "build": "ort"}
CASES = [
    Case("onnxruntime-node", "base", "the file", file=_ONNX),
    Case("onnxruntime-node", "base with model.onnx_data", "the file", file=_ONNX),
    Case("onnxruntime-node", "int8 of base", "the file", file="onnx/model_quantized.onnx"),
    Case("onnxruntime-node", "bundle (layout lfx)", "the file", file="model.onnx", refused="global_attention_mask"),
    Case("onnxruntime-web", "base", "WebAssembly", file=_ONNX),
    Case("onnxruntime-web", "base with model.onnx_data", "externalData given", file=_ONNX, options=_WEB_DATA),
    Case("onnxruntime-web", "base with model.onnx_data", "no option", file=_ONNX, refused="external data"),
    Case("onnxruntime-web", "base", "WebGPU, onnxruntime-web/webgpu", file=_ONNX, options=_WEBGPU),
    Case("onnxruntime-web", "base", "WebGPU, default build", file=_ONNX, options=_WEBGPU_DEFAULT, is_wrong=True),
    Case(
        "onnxruntime-web",
        "plain RoBERTa, torch.onnx",
        "WebGPU, default build",
        file="model.onnx",
        options=_WEBGPU_DEFAULT,
        is_wrong=True,
    ),
    Case("@huggingface/transformers", "base", "no option"),
    Case("@huggingface/transformers", "base with model.onnx_data", "no option"),
    Case("@huggingface/transformers", "int8 of base", "dtype: q8", options={"dtype": "q8"}),
    Case(
        "@huggingface/transformers",
        "classifier",
        "no option",
        "logits",
        options=_CLASSIFY,
        refused="Unsupported model type: longformer",
    ),
    Case("@huggingface/transformers", "classifier, --model-type roberta", "no option", "logits", options=_CLASSIFY),
    Case("optimum-onnx", "base", "ORTModelForFeatureExtraction", options={**_FEATURES, "subfolder": "onnx"}),
    Case(
        "optimum-onnx",
        "classifier",
        "ORTModelForSequenceClassification",
        "logits",
        options={"class": "ORTModelForSequenceClassification"},
    ),
    Case("sentence-transformers", "sentence embedding", 'backend="onnx"', "sentence_embedding"),
    Case("openvino", "base", "the file", file=_ONNX),
    Case("openvino", "classifier", "the file", "logits", file=_ONNX),
    Case("openvino", "bundle (layout lfx)", "the file", file="model.onnx", refused="lfx"),
    Case("optimum-onnx", "LED", "ORTModelForSeq2SeqLM", "tokens", options={"class": "ORTModelForSeq2SeqLM"}),
    Case(
        "@huggingface/transformers",
        "LED",
        "no option",
        "tokens",
        options=_WRITE,
        refused="Unsupported model type: led",
    ),
    Case("@huggingface/transformers", "LED, --model-type bart", "no option", "tokens", options=_WRITE),
]


def missing() -> str | None:
    """Say what is not installed; None if all clients are."""
    if not PYTHON.exists() or not (NODE / "node_modules").is_dir():
        return "the clients' own environments are not set up: make clients"
    if shutil.which("node") is None or _BROWSER is None:
        return "node or Chromium is not installed: apt-get install nodejs npm chromium"
    return None


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case on a folder; returns output -> flat list of numbers, or {"error": text}."""
    model = folder / case.file if case.file is not None else folder
    return _RUNNERS[case.client](case, model)


def _node(case: Case, model: Path) -> dict[str, Any]:
    arguments = ["node", str(HERE / "run_node.mjs"), case.client, str(model), json.dumps(case.options)]
    done = subprocess.run(
        arguments, input=json.dumps(INPUTS), capture_output=True, text=True, check=False, cwd=NODE, timeout=_SECONDS
    )
    lines = done.stdout.strip().splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {"error": done.stderr[-500:]}
    return result


def _python(case: Case, model: Path) -> dict[str, Any]:
    """Run a case in one process for all cases: each would import torch again."""
    client = _python_client()
    job = {"client": case.client, "model": str(model), "options": case.options, "inputs": INPUTS}
    watchdog = threading.Timer(_SECONDS, client.kill)
    watchdog.start()
    try:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(json.dumps(job) + "\n")
        client.stdin.flush()
        lines = (line.removeprefix("result ") for line in client.stdout if line.startswith("result "))
        result: dict[str, Any] = json.loads(next(lines, '{"error": "the process of the client ended"}'))
        return result
    finally:
        watchdog.cancel()


@functools.cache
def _python_client() -> subprocess.Popen[str]:
    command = [str(PYTHON), str(HERE / "run_python.py")]
    client = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    atexit.register(client.communicate)  # it ends with its input
    return client


def _openvino(case: Case, model: Path) -> dict[str, Any]:
    import numpy as np
    import openvino

    try:
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        feeds = {"input_ids": np.array(INPUTS["ids"]), "attention_mask": np.array(INPUTS["mask"])}
        return {output.any_name: value.ravel().tolist() for output, value in compiled(feeds).items()}
    except Exception as error:
        return {"error": " ".join(str(error).split()).rpartition("-- ")[2]}  # without OpenVINO's source lines


def _browser(case: Case, model: Path) -> dict[str, Any]:
    """Open web.html in Chromium, from a server on this machine, and wait for the result that it posts."""
    posted: list[bytes] = []
    done = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def translate_path(self, path: str) -> str:
            name = path.split("?", maxsplit=1)[0].lstrip("/")
            root, _, rest = name.partition("/")
            if root == "model":
                return str(model.parent / rest)
            return str(NODE / name if root == "node_modules" else HERE / name)

        def do_GET(self) -> None:
            if self.path != "/inputs":
                super().do_GET()
                return
            body = json.dumps({**INPUTS, "options": case.options}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            done.set()

    Handler.extensions_map = {**Handler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/web.html"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        uses_gpu = "webgpu" in case.options.get("executionProviders", ())
        options = ["--headless", "--no-sandbox", f"--user-data-dir={profile}"]
        options += _SOFTWARE_WEBGPU if uses_gpu else ["--disable-gpu"]
        browser = subprocess.Popen(
            ["chromium", *options, address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            done.wait(_SECONDS)
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
            server.server_close()
    return json.loads(posted[0]) if posted else {"error": "the page posted no result"}


_RUNNERS = {
    "onnxruntime-node": _node,
    "@huggingface/transformers": _node,
    "onnxruntime-web": _browser,
    "optimum-onnx": _python,
    "sentence-transformers": _python,
    "openvino": _openvino,
}


def versions() -> dict[str, str]:
    """Versions of the clients."""
    import openvino

    lock = json.loads((HERE / "package-lock.json").read_text())["packages"]
    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().split() if "==" in line)
    node = ("onnxruntime-node", "onnxruntime-web", "@huggingface/transformers")
    return {
        **{name: lock[f"node_modules/{name}"]["version"] for name in node},
        **{name: pins[name] for name in ("optimum-onnx", "sentence-transformers")},
        "openvino": openvino.__version__.split("-")[0],
    }
