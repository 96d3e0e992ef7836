"""Run everything that waits for an NVIDIA GPU: checks, sanitizers and benchmarks, with a record of each.

    python -m scripts.gpu_day --headers DIR              # for --minutes; call it again until nothing is left
    python -m scripts.gpu_day --build-only --target sm_90   # only builds the library; needs no GPU
    python -m scripts.gpu_day --dry-run                  # builds, and lists what it would run; needs no GPU
    python -m scripts.gpu_day --again                    # tries the steps that have failed or were skipped once more
    python -m scripts.gpu_day --publish                  # copies the records to docs/records

The checks run side by side, and the benchmarks one after another and alone, each step in a process of its own. Records,
logs and the state of the steps are in --folder (default build/gpu_day) and are written as the work proceeds. A call
that is cut off loses at most the checks that were running, or the case that it was measuring: the next call continues
with the same --folder. On another GPU, or after a change of the sources, all steps begin again.

The checks, the sanitizers and the cases of the claims come first, then the plans and all other cases. How many calls
they take depends on the machine: a step may take all of its minutes, and leaves out the cases that do not fit into
them. Where only the files of one folder come back from the machine with the GPU, make it the --folder, copy what came
back into it before the next call, and build the library elsewhere: --library, with libenqueue.so beside it if --headers
is given. Where git does not know the commit, LFX_COMMIT names it for the records.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import record
from scripts.bench import gpu

ROOT = record.ROOT
TIME_IS_OVER = "time is over"
LEAST_SECONDS = 20.0  # that a step is started with
MOST_ATTEMPTS = 3  # of a step that is cut off by the end of a call
PRECISIONS = ("fp16", "bf16", "fp32")
PACKAGES = ("numpy", "ml_dtypes", "torch", "transformers")  # that the steps cannot do without
RECORDS = ("gpu.jsonl", "gpu_memcheck.jsonl", "gpu_racecheck.jsonl", "gpu_kernels.jsonl", "gpu_model.jsonl")
# Runs the command after it, which Linux stops when this process ends, also if it is killed: prctl(PR_SET_PDEATHSIG).
_END_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
ENDS_WITH_PARENT = [sys.executable, "-c", _END_WITH_PARENT]


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        minutes: it is stopped, or stops itself, after that many; those of a check are for all checks side by side.
        limits_itself: it has the option --minutes, gets the time that is left, and prints TIME_IS_OVER if it leaves
            something out.
        program: that must be on the PATH; empty: none.
        alone: it measures times, and nothing else runs beside it.
    """

    name: str
    command: list[str]
    minutes: float
    limits_itself: bool = False
    program: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    alone: bool = False


@dataclass(frozen=True)
class Running:
    """A step that was started.

    Attributes:
        seconds: it is stopped after that many.
        started: of time.monotonic.
        log: of this step alone; an attempt that was interrupted leaves its output there.
        begin: size of the log before this attempt, bytes.
    """

    step: Step
    process: subprocess.Popen[bytes]
    seconds: float
    started: float
    log: Path
    begin: int

    def is_over(self) -> bool:
        """Return whether the process has ended, or has to."""
        return self.process.poll() is not None or time.monotonic() > self.started + self.seconds

    def kill(self) -> None:
        """End the process, and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def steps(folder: Path, library: Path, headers: Path | None) -> list[Step]:
    """Return all steps in their order."""
    python = [sys.executable, "-m"]
    shared = ["--library", str(library)]
    check = [*python, "scripts.gpu_check", *shared, *(["--headers", str(headers)] if headers else [])]
    into = ["--record", str(folder / "gpu.jsonl"), "--resume"]
    kernels = [*python, "scripts.bench.gpu_kernels", *shared, "--record", str(folder / "gpu_kernels.jsonl"), "--resume"]
    model = [*python, "scripts.bench.gpu_model", *shared, "--record", str(folder / "gpu_model.jsonl"), "--resume"]

    def sanitizer(tool: str) -> Step:
        launcher = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        if tool == "memcheck":  # PyTorch and the CUDA runtime ask the driver for functions that it may not have
            launcher += ["--report-api-errors", "no"]
        quick = ["--quick", "--part", "kernels", "--record", str(folder / f"gpu_{tool}.jsonl")]
        # Each tensor in an allocation of its own, so that an access past its end is outside of all memory.
        separate = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        return Step(tool, [*launcher, *check, *quick], 4, program="compute-sanitizer", environment=separate)

    def benchmark(name: str, command: list[str], minutes: float) -> Step:
        return Step(name, command, minutes, limits_itself=True, alone=True)

    return [
        *(Step(f"check {p}", [*check, *into, "--part", "kernels", "--precision", p], 3) for p in PRECISIONS),
        Step("check torch", [*check, *into, "--part", "torch"], 4),
        Step("check onnxruntime", [*check, *into, "--part", "onnxruntime"], 2),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        benchmark("kernels, claims", [*kernels, "--quick"], 5),
        benchmark("model, claims", [*model, "--quick"], 4),
        Step("check plans", [*check, *into, "--part", "plans"], 5),  # may be slow, and no claim waits for it
        benchmark("model, all", model, 5),
        benchmark("kernels, all", kernels, 60),
    ]


class State:
    """The results of the steps, in a file that is replaced after each one; `key` names the GPU and the source."""

    def __init__(self, path: Path, key: str = "") -> None:
        self.path, self.key = path, key
        saved = json.loads(path.read_text()) if path.exists() else {}
        self.results: dict[str, dict[str, Any]] = saved["steps"] if saved.get("key") == key else {}

    def is_done(self, step: Step) -> bool:
        """Return whether a step has ended, or was cut off too often."""
        result = self.results.get(step.name, {})
        return "status" in result or result.get("attempts", 0) >= MOST_ATTEMPTS

    def forget(self) -> None:
        """Let the steps that have not passed begin again."""
        self.results = {name: result for name, result in self.results.items() if result.get("status") == "passed"}

    def begin(self, step: Step) -> None:
        """Count an attempt, before it begins: the call may end at any time."""
        attempts = self.results.get(step.name, {}).get("attempts", 0)
        self._write(step, {"attempts": attempts + 1})

    def end(self, step: Step, **result: Any) -> None:
        """Keep the result of a step."""
        self._write(step, {**self.results.get(step.name, {}), **result})

    def _write(self, step: Step, result: dict[str, Any]) -> None:
        self.results[step.name] = result
        unfinished = self.path.with_suffix(".unfinished")
        text = json.dumps({"key": self.key, "steps": self.results}, indent=1)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def run(todo: list[Step], state: State, deadline: float) -> list[Step]:
    """Run steps until `deadline` (of time.monotonic); returns those that are left."""
    for step in todo:
        if step.program and shutil.which(step.program) is None and not state.is_done(step):
            state.end(step, status="skipped", reason=f"{step.program} is not on the PATH")
    for group in groups([step for step in todo if not state.is_done(step)]):
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            break
        run_group(group, state, left)
    return [step for step in todo if not state.is_done(step)]


def groups(todo: list[Step]) -> list[list[Step]]:
    """Group consecutive steps that run side by side."""
    result: list[list[Step]] = []
    for step in todo:
        if result and not step.alone and not result[-1][-1].alone:
            result[-1].append(step)
        else:
            result.append([step])
    return result


def run_group(group: list[Step], state: State, left: float) -> None:
    """Run steps side by side, for at most `left` seconds."""
    running: list[Running] = []
    try:
        for step in group:
            running.append(start(step, state, left))
        while running:
            for one in [one for one in running if one.is_over()]:
                end(one, state)
                running.remove(one)
            time.sleep(0.05)
    finally:  # also if this process is asked to stop
        for one in running:
            one.kill()


def start(step: Step, state: State, left: float) -> Running:
    """Start a step, which may take `left` seconds, with its output in a log beside the state."""
    seconds = min(left, 60 * step.minutes)
    # A step that limits itself starts nothing new after its minutes, and then finishes what it has begun.
    own = ["--minutes", f"{max(seconds - 45, 1) / 60:.2f}"] if step.limits_itself else []
    log = state.path.with_name(re.sub(r"\W+", "-", step.name) + ".log")
    print(f"{step.name}: at most {seconds:.0f} s", flush=True)
    state.begin(step)
    with log.open("a", encoding="utf-8") as output:
        print(f"# {step.name}", file=output, flush=True)
        begin = output.tell()
        process = subprocess.Popen(
            [*(ENDS_WITH_PARENT if sys.platform == "linux" else []), *step.command, *own],
            cwd=ROOT,
            env={**os.environ, **dict(step.environment)},
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    return Running(step, process, seconds, time.monotonic(), log, begin)


def end(one: Running, state: State) -> None:
    """Stop a step if it has not ended, keep its result, and append its log to that of all steps."""
    step, code = one.step, one.process.poll()
    one.kill()
    took = round(time.monotonic() - one.started, 1)
    output = one.log.read_bytes()
    said = output[one.begin :].decode(errors="replace").splitlines()
    left_out = next((line for line in said if line.startswith(TIME_IS_OVER)), None)
    had_its_minutes = one.seconds >= 60 * step.minutes
    if code is not None and (had_its_minutes or left_out is None):
        reason = {} if left_out is None else {"reason": left_out}
        state.end(step, status="passed" if code == 0 else "failed", code=code, seconds=took, **reason)
    elif code is None and had_its_minutes:
        state.end(step, status="failed", reason=f"stopped after {step.minutes} minutes", seconds=took)
    with state.path.with_suffix(".log").open("ab") as log:
        log.write(output)
    one.log.unlink()
    print(f"{step.name}: {state.results[step.name]}", flush=True)


def publish(folder: Path, target: Path) -> list[Path]:
    """Copy the records, and a record of the steps, to docs/records; returns the copies."""
    found = [folder / name for name in RECORDS if (folder / name).exists()]
    copies = [Path(shutil.copy(path, target / path.name)) for path in found]
    state = folder / "state.json"
    if state.exists():
        saved = json.loads(state.read_text(encoding="utf-8"))
        rows = [{"key": saved["key"], "step": name, **result} for name, result in saved["steps"].items()]
        copies.append(record.write(target / "gpu_day.jsonl", rows))
    return copies


def main() -> None:
    """Run the steps that are left; exits with 1 if one has failed, with 3 if some are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=Path, help="folder of NvInfer.h, to check the plugin's creator too")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu_day", help="default %(default)s")
    parser.add_argument("--library", type=Path, help="use this library; default: build it in the folder, once")
    parser.add_argument("--minutes", type=float, default=9.5, help="length of this call; default %(default)s")
    parser.add_argument("--target", default="sm_90", help="architecture without a GPU; default %(default)s")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="build and list the steps; needs no GPU")
    parser.add_argument("--again", action="store_true", help="begin the steps again that have not passed")
    parser.add_argument("--publish", action="store_true", help="copy the records to docs/records")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    folder = options.folder.resolve()
    if options.publish:
        copies = publish(folder, record.RECORDS)
        print("\n".join(map(str, copies)) or f"no records in {folder}")
        sys.exit(0 if copies else 1)
    digest, target = source_digest(), gpu.architecture(options.target)
    library = options.library.resolve() if options.library else built(folder / f"library-{target}-{digest}", options)
    todo = steps(folder, library, options.headers)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if options.build_only or options.dry_run:
        print(f"library: {library}")
        for step in todo if options.dry_run else []:
            print(f"{step.name}: at most {step.minutes:g} minutes: {' '.join(step.command)}")
        if options.dry_run and missing:
            print(f"install before the steps run: {' '.join(missing)}")
        return
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
    gpu.require()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder / "state.json", f"{record.query_gpu('name')} {digest}")
    if options.again:
        state.forget()
    left = run(todo, state, deadline)
    failed = [
        name
        for name, result in state.results.items()
        if result.get("status", "failed") == "failed" and name not in {step.name for step in left}
    ]
    print(f"{len(todo) - len(left)} of {len(todo)} steps done, failed: {', '.join(failed) or 'none'}")
    for name, result in state.results.items():
        if "reason" in result:
            print(f"{name}: {result['reason']}")
    if left:
        print(f"call it again for: {', '.join(step.name for step in left)}")
    sys.exit(3 if left else 1 if failed else 0)


def built(folder: Path, options: argparse.Namespace) -> Path:
    """Build the library of this source, and with headers libenqueue.so, if an earlier call has not done so."""
    library = folder / "liblfx_plugins.so"
    if not library.exists() or (options.headers and not library.with_name("libenqueue.so").exists()):
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        gpu.build(unfinished, options.headers, options.target)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return library


def source_digest() -> str:
    """Return a digest of the sources that the steps run."""
    digest = hashlib.sha256()
    for folder in ("plugins", "scripts", "src", "runtime", "export", "tests/plugins"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
