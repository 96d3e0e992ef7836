"""Runs TensorRT's builder: `python -m lfx.runtime.build.trt_process JOB.json`, started by `launch`.

TensorRT's builder has its own process for two reasons. When a graph has a plugin, TensorRT-RTX's parser opens
`libtensorrt_rtx.so` by that name; the wheel has no file of that name, and the loader reads the library path only at the
start of a process. And if TensorRT aborts, the caller of `build_engine` does not.

Each line on stdout is a JSON object: {"step": text}, {"log": text, "severity": name} or, last, {"result": {…}} or
{"error": text}, with "disk_full" if the disk may be the cause. The process ends when its stdin is closed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from lfx.errors import require
from lfx.files import is_disk_full, replacing


def main(job_path: str) -> None:
    """Build the plan of a job, and write it to the job's path."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # output that TensorRT itself prints to stdout goes to stderr

    def send(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")

    try:
        result = _build(job, send)
    except _RefusedError as error:
        send(error=str(error))
    except Exception as error:
        send(error=f"{type(error).__name__}: {error}", disk_full=is_disk_full(error))
    else:
        send(result=result)


def _exit_with_parent() -> None:
    """Exit when stdin is closed; the system closes it when the parent ends, even if the parent is killed."""
    os.read(0, 1)
    os._exit(1)


class _RefusedError(Exception):
    """TensorRT refused the job; the message is complete."""


def _build(job: dict[str, Any], send: Any) -> dict[str, Any]:
    """Build and write the plan; returns the result for the parent."""
    trt = require(job["module"], job["extra"])
    logger = _logger(trt, send)
    if job["plugin"] is not None:
        _load_plugins(trt, logger, job["plugin"])
    builder = trt.Builder(logger)
    if builder is None:
        raise _RefusedError("TensorRT could not start; a build without --target needs an NVIDIA GPU")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    send(step="TensorRT: parsing")
    if not parser.parse_from_file(job["onnx"]):
        raise _RefusedError("; ".join(_describe(parser.get_error(i)) for i in range(parser.num_errors)))
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    config = _config(trt, builder, job, send)
    send(step="TensorRT: building")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _RefusedError("TensorRT built no engine; its own errors are above")
    Path(job["plan"]).write_bytes(memoryview(plan))
    if job["timing_cache"] is not None:
        with replacing(Path(job["timing_cache"])) as cache:
            cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return {
        "tensorrt_version": trt.__version__,
        "network_layers": len(layers),
        "plugin_layers": sum(layer == trt.LayerType.PLUGIN_V3 for layer in layers),
    }


def _load_plugins(trt: Any, logger: Any, library: str) -> None:
    """Register the lfx plugins with TensorRT."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    registry = trt.get_plugin_registry()
    registry.load_library(library)
    creators = {creator.name for creator in registry.all_creators if creator.plugin_namespace == "lfx"}
    if not {"BandedAttention", "GlobalAttention"} <= creators:
        raise _RefusedError(
            f"the plugin library {library} could not be loaded; it has {sorted(creators) or 'no creators'}"
        )


def _logger(trt: Any, send: Any) -> Any:
    """An ILogger that sends warnings and errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                send(log=message.strip(), severity=str(severity).rpartition(".")[2].lower())

    return Logger()


def _config(trt: Any, builder: Any, job: dict[str, Any], send: Any) -> Any:
    """The builder config of a job, with its optimization profiles."""
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; PyTorch does not round the factors of float32 products
    if job["target"] is not None:
        capability = getattr(getattr(trt, "ComputeCapability", None), job["target"].upper(), None)
        if capability is None:
            names = [name.lower() for name in vars(getattr(trt, "ComputeCapability", object)) if name.startswith("SM")]
            raise _RefusedError(
                f"target {job['target']} is not one that {trt.__name__} {trt.__version__} builds for: {names}"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    if job["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    if job["optimization_level"] is not None:
        config.builder_optimization_level = job["optimization_level"]
    for name in job["flags"]:
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None:
            raise _RefusedError(f"{trt.__name__} {trt.__version__} has no option {name.lower()}")
        config.set_flag(flag)
    if job["timing_cache"] is not None:
        path = Path(job["timing_cache"])
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (smallest, optimum, largest) in shapes.items():
            profile.set_shape(name, smallest, optimum, largest)
        config.add_optimization_profile(profile)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, send)
    return config


def _monitor(trt: Any, send: Any) -> Any:
    """An IProgressMonitor that sends the names of top-level phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                send(step=f"TensorRT: {phase_name}")

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

    return Monitor()


def _describe(error: Any) -> str:
    """The text of a parser error, and its node."""
    node = f" at node {error.node_name()}" if error.node_name() else ""
    return f"{error.desc().strip()}{node}"


if __name__ == "__main__":
    main(sys.argv[1])
