"""The process that TensorRT builds in: `python -m lfx.runtime.build.trt_process JOB.json`, started by `builder`.

A process of its own, for two reasons. TensorRT-RTX's parser opens `libtensorrt_rtx.so` by that very name when it meets
a plugin; its wheel has no file of that name, and the library path is read only when a process starts. And where
TensorRT aborts, what asked for the engine goes on.

Every line on stdout is a JSON object: {"step": text}, {"log": text, "severity": name} or, at the end, {"result": {…}}
or {"error": text}, with "disk_full" true where that is why. The process ends when its stdin is closed.
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
    """Build what the job says and write the plan to its place."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what TensorRT itself prints to stdout goes to stderr

    def say(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")

    try:
        result = _build(job, say)
    except _RefusedError as error:
        say(error=str(error))
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}", disk_full=is_disk_full(error))
    else:
        say(result=result)


def _end_with_parent() -> None:
    """End this process when stdin does: its other end is the parent's, which closes it however the parent ends."""
    os.read(0, 1)
    os._exit(1)


class _RefusedError(Exception):
    """TensorRT said no; the message says to what."""


def _build(job: dict[str, Any], say: Any) -> dict[str, Any]:
    trt = require(job["module"], job["extra"])
    logger = _logger(trt, say)
    if job["plugin"] is not None:
        trt.init_libnvinfer_plugins(logger, "") if hasattr(trt, "init_libnvinfer_plugins") else None
        trt.get_plugin_registry().load_library(job["plugin"])
        found = {
            creator.name for creator in trt.get_plugin_registry().all_creators if creator.plugin_namespace == "lfx"
        }
        if not {"BandedAttention", "GlobalAttention"} <= found:
            raise _RefusedError(
                f"the plugin library {job['plugin']} was not taken; it has {sorted(found) or 'no creators'}"
            )
    builder = trt.Builder(logger)
    if builder is None:
        raise _RefusedError("TensorRT could not start; a build without --target needs an NVIDIA GPU")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    say(step="TensorRT: parsing")
    if not parser.parse_from_file(job["onnx"]):
        raise _RefusedError("; ".join(_describe(parser.get_error(i)) for i in range(parser.num_errors)))
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    config = _config(trt, builder, job, say)
    say(step="TensorRT: building")
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


def _logger(trt: Any, say: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                say(log=message.strip(), severity=str(severity).rpartition(".")[2].lower())

    return Logger()


def _config(trt: Any, builder: Any, job: dict[str, Any], say: Any) -> Any:
    config = builder.create_builder_config()
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
        for name, (smallest, best, largest) in shapes.items():
            profile.set_shape(name, smallest, best, largest)
        config.add_optimization_profile(profile)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, say)
    return config


def _monitor(trt: Any, say: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                say(step=f"TensorRT: {phase_name}")

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

    return Monitor()


def _describe(error: Any) -> str:
    node = f" at node {error.node_name()}" if error.node_name() else ""
    return f"{error.desc().strip()}{node}"


if __name__ == "__main__":
    main(sys.argv[1])
