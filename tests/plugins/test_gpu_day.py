"""The command for the day a GPU is there, with small programs in the place of its steps, and its dry run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import gpu_day, record
from scripts.bench import gpu
from scripts.gpu_day import State, Step
from tests.marks import first_of_each
from tests.plugins.build import ROOT


def step(name: str, code: str, **attributes: Any) -> Step:
    """A step that runs Python code."""
    return Step(name, [sys.executable, "-c", code], **{"minutes": 1.0, **attributes})


def soon(seconds: float = 60.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds


@pytest.fixture
def state(tmp_path: Path) -> State:
    """No results yet."""
    return State(tmp_path / "state.json")


def test_steps_that_are_alone_run_in_their_order_and_keep_their_results(state: State, tmp_path: Path) -> None:
    order = tmp_path / "order"
    todo = [
        step("first", f"open({str(order)!r}, 'a').write('1'); print('said')", alone=True),
        step("second", f"open({str(order)!r}, 'a').write('2'); raise SystemExit(5)", alone=True),
        step(
            "third, last",
            f"import os; open({str(order)!r}, 'a').write(os.environ['X'])",
            environment=(("X", "3"),),
            alone=True,
        ),
    ]
    assert gpu_day.run(todo, state, soon()) == []
    assert order.read_text() == "123"
    results = json.loads(state.path.read_text())["steps"]
    assert [results[s.name]["status"] for s in todo] == ["passed", "failed", "passed"]
    assert results["second"]["code"] == 5
    assert (tmp_path / "state.log").read_text() == "# first\nsaid\n# second\n# third, last\n"


def test_steps_run_side_by_side_unless_one_is_alone() -> None:
    names = ["check 1", "check 2", "time 1", "time 2", "check 3", "time 3"]
    todo = [step(name, "", alone=name.startswith("time")) for name in names]
    groups = [[one.name for one in group] for group in gpu_day.groups(todo)]
    assert groups == [["check 1", "check 2"], ["time 1"], ["time 2"], ["check 3"], ["time 3"]]
    assert gpu_day.groups([]) == []


def test_two_checks_run_at_the_same_time_with_a_log_of_their_own(state: State, tmp_path: Path) -> None:
    there, back = (str(tmp_path / name) for name in ("there", "back"))
    os.mkfifo(there)
    os.mkfifo(back)
    todo = [  # each waits for a word of the other
        step("check one", f"print('1'); open({there!r}, 'w').write('hello'); print(open({back!r}).read())"),
        step("check two", f"print('2'); print(open({there!r}).read()); open({back!r}, 'w').write('welcome')"),
        step("times", f"import pathlib; print(*pathlib.Path({str(tmp_path)!r}).glob('check-*'))", alone=True),
    ]
    assert gpu_day.run(todo, state, soon()) == []
    assert [state.results[one.name]["status"] for one in todo] == ["passed"] * 3
    *checks, times = (tmp_path / "state.log").read_text().split("# ")[1:]
    assert sorted(checks) == ["check one\n1\nwelcome\n", "check two\n2\nhello\n"]
    assert times == "times\n\n"  # no check is left beside it
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["state.log"]


def test_a_check_that_takes_longer_than_its_minutes_is_stopped_beside_the_others(state: State) -> None:
    ended = f"while 'stopped after' not in open({str(state.path)!r}).read(): time.sleep(0.05)"
    todo = [step("slow", "import time; time.sleep(600)", minutes=0.01), step("other", f"import time\n{ended}")]
    assert gpu_day.run(todo, state, soon()) == []
    assert state.results["slow"]["reason"] == "stopped after 0.01 minutes"
    assert state.results["other"]["status"] == "passed"


def test_the_next_call_goes_on_with_what_is_left(state: State, tmp_path: Path) -> None:
    count = tmp_path / "count"
    todo = [step(name, f"open({str(count)!r}, 'a').write('{name}')") for name in "ab"]
    assert gpu_day.run(todo[:1], state, soon()) == []
    assert gpu_day.run(todo, state, soon(5)) == todo[1:]  # too little time is left to start a step
    assert gpu_day.run(todo, State(state.path), soon()) == []
    assert count.read_text() == "ab"


def test_a_step_that_the_end_of_the_call_cuts_off_is_tried_again(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "LEAST_SECONDS", 0.1)
    slow = step("slow", "import time; time.sleep(60)")
    for attempts in (1, 2):
        assert gpu_day.run([slow], state, soon(0.5)) == [slow]
        assert state.results["slow"] == {"attempts": attempts}
    assert gpu_day.run([slow], state, soon(0.5)) == []  # enough
    assert "status" not in state.results["slow"]


def test_a_step_that_takes_longer_than_its_minutes_has_failed(state: State) -> None:
    slow = step("slow", "import time; time.sleep(60)", minutes=0.01)
    assert gpu_day.run([slow], state, soon()) == []
    assert state.results["slow"]["status"] == "failed"
    assert state.results["slow"]["reason"] == "stopped after 0.01 minutes"


def test_a_step_that_limits_itself_gets_the_time_and_stays_open_if_it_was_too_short(
    state: State, tmp_path: Path
) -> None:
    code = "import sys; print(sys.argv[1:]); print('time is over: 3 of 4 were not started')"
    limited = step("limited", code, minutes=2.0, limits_itself=True)
    assert gpu_day.run([limited], state, soon(100)) == [limited]
    assert (tmp_path / "state.log").read_text().startswith("# limited\n['--minutes', '0.9")
    assert gpu_day.run([limited], state, soon(1000)) == []  # its own time was too short
    assert state.results["limited"]["status"] == "passed"
    assert state.results["limited"]["reason"] == "time is over: 3 of 4 were not started"


def test_a_step_whose_program_is_missing_is_skipped_with_the_reason(state: State) -> None:
    assert gpu_day.run([step("x", "", program="no-such-program")], state, soon()) == []
    assert state.results["x"] == {"status": "skipped", "reason": "no-such-program is not on the PATH"}


def test_a_call_that_is_asked_to_stop_stops_its_steps(tmp_path: Path) -> None:
    children = [tmp_path / name for name in "xy"]
    codes = [
        f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)" for child in children
    ]
    script = (
        "import signal, sys, time; from pathlib import Path; from scripts import gpu_day\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"steps = [gpu_day.Step(n, [sys.executable, '-c', c], 1.0) for n, c in zip('xy', {codes!r})]\n"
        f"gpu_day.run(steps, gpu_day.State(Path({str(tmp_path / 'state.json')!r})), time.monotonic() + 60)\n"
    )
    call = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not all(child.exists() and child.read_text() for child in children):
        time.sleep(0.05)
    call.send_signal(signal.SIGTERM)
    assert call.wait(30) == 143
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child.read_text()), 0)
    steps = {"x": {"attempts": 1}, "y": {"attempts": 1}}
    assert json.loads((tmp_path / "state.json").read_text()) == {"key": "", "steps": steps}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux stops the step")
def test_a_call_that_is_killed_takes_its_step_with_it_and_the_next_call_runs_it_again(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # whose end is read when the step has ended
    os.mkfifo(pipe)
    waits = (
        "import time; print('first try', flush=True)\n"
        f"pipe = open({str(pipe)!r}, 'w'); pipe.write('x'); pipe.flush(); time.sleep(600)"
    )
    script = (
        "from pathlib import Path; from scripts import gpu_day; from tests.plugins.test_gpu_day import soon, step\n"
        f"state = gpu_day.State(Path({str(tmp_path / 'state.json')!r}))\n"
        f"gpu_day.run([step('a', '', alone=True), step('b', {waits!r})], state, soon())\n"
    )
    call = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    with pipe.open() as end:
        assert end.read(1) == "x"
        call.kill()
        assert end.read() == ""
    call.wait()
    state = State(tmp_path / "state.json")
    assert state.results["a"]["status"] == "passed"
    assert state.results["b"] == {"attempts": 1}
    assert gpu_day.run([step("a", "raise SystemExit(5)"), step("b", "print('again')")], state, soon()) == []
    assert [state.results[name]["status"] for name in "ab"] == ["passed", "passed"]
    assert (tmp_path / "state.log").read_text() == "# a\n# b\nfirst try\n# b\nagain\n"


def test_steps_that_have_not_passed_begin_again_if_they_are_asked_to(state: State) -> None:
    passed, failed, missing = step("a", ""), step("b", "raise SystemExit(5)"), step("c", "", program="no-such-program")
    assert gpu_day.run([passed, failed, missing], state, soon()) == []
    state.forget()
    assert gpu_day.run([passed, step("b", ""), step("c", "")], state, soon()) == []
    assert [(r["attempts"], r["status"]) for r in state.results.values()] == [(1, "passed")] * 3


def test_there_is_a_library_for_each_architecture_and_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[str] = []

    def build(folder: Path, headers: Path | None, target: str) -> None:
        built.append(target)
        (folder / "liblfx_plugins.so").touch()

    monkeypatch.setattr(gpu, "build", build)
    monkeypatch.setattr(record, "query_gpu", lambda fields: "")
    for target in ("sm_90", "sm_80", "sm_90"):
        arguments = ["gpu_day", "--build-only", "--target", target, "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        gpu_day.main()
    assert built == ["sm_90", "sm_80"]
    libraries = capsys.readouterr().out.splitlines()
    assert libraries[0] == libraries[2] != libraries[1]


def test_packages_that_are_missing_are_named_before_any_step_fails(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day, "PACKAGES", ("numpy", "no_such_package"))
    arguments = ["gpu_day", "--library", str(library), "--folder", str(tmp_path / "day")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="not installed: no_such_package; pip install no_such_package"):
        gpu_day.main()
    assert not (tmp_path / "day").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "--dry-run"])
    gpu_day.main()
    assert capsys.readouterr().out.splitlines()[-1] == "install before the steps run: no_such_package"


def test_the_records_are_published(tmp_path: Path) -> None:
    folder, target = tmp_path / "folder", tmp_path / "records"
    folder.mkdir()
    target.mkdir()
    assert gpu_day.publish(folder, target) == []
    (folder / "gpu.jsonl").write_text("{}\n")
    (folder / "other.jsonl").write_text("{}\n")
    assert gpu_day.publish(folder, target) == [target / "gpu.jsonl"]
    State(folder / "state.json", "a GPU").end(step("memcheck", ""), status="passed", code=0)
    assert gpu_day.publish(folder, target) == [target / "gpu.jsonl", target / "gpu_day.jsonl"]
    row = json.loads((target / "gpu_day.jsonl").read_text())
    assert row == {"key": "a GPU", "step": "memcheck", "status": "passed", "code": 0}


def test_on_another_gpu_or_source_all_steps_begin_again(tmp_path: Path) -> None:
    State(tmp_path / "state.json", "one").end(step("x", ""), status="failed")
    assert State(tmp_path / "state.json", "one").is_done(step("x", ""))
    assert not State(tmp_path / "state.json", "two").is_done(step("x", ""))


def test_bytes_of_a_step_that_are_no_text_stop_nothing(state: State) -> None:
    todo = [step(name, r"import os; os.write(1, b'\xc2')") for name in "ab"]
    assert gpu_day.run(todo, state, soon()) == []
    assert [state.results[name]["status"] for name in "ab"] == ["passed", "passed"]


def test_the_steps_check_before_they_measure_and_measure_the_claims_before_plans(tmp_path: Path) -> None:
    steps = gpu_day.steps(tmp_path, tmp_path / "library.so", None)
    checks, kernels, model, *rest = ([one.name for one in group] for group in gpu_day.groups(steps))
    assert checks[:5] == ["check fp16", "check bf16", "check fp32", "check torch", "check onnxruntime"]
    assert checks[5:] == ["memcheck", "racecheck"]
    assert [kernels, model] == [["kernels, claims"], ["model, claims"]]
    assert rest == [["check plans"], ["model, all"], ["kernels, all"]]
    assert all(one.alone == one.limits_itself for one in steps)
    assert sum(max(one.minutes for one in group) for group in gpu_day.groups(steps)[:3]) <= 2 * 9.5


def test_a_record_is_continued_on_the_same_gpu_and_commit_only(tmp_path: Path) -> None:
    about = {"date": "2026-01-02", "gpu": "H100", "commit": "abc"}
    rows = [{**about, "date": "2026-01-01", "case": 1}, {**about, "gpu": "A100", "case": 2}, {"claim": "c"}]
    path = tmp_path / "record.jsonl"
    assert gpu.resumed(path, about) == []
    record.write(path, rows)
    assert gpu.resumed(path, about) == rows[:1]


def test_measuring_leaves_out_the_cases_that_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    measured: list[int] = []

    def measure(case: int) -> dict[str, Any]:
        measured.append(case)
        return {"case": case}

    def case_of(row: dict[str, Any]) -> Any:
        return row["case"]

    rows = gpu.measure_all([1, 2, 3], measure, lambda rows: [], soon(), path, [{"case": 2}], case_of)
    assert measured == [1, 3]
    assert [row["case"] for row in rows] == [2, 1, 3]
    assert [json.loads(line)["case"] for line in path.read_text().splitlines()] == [2, 1, 3]
    gpu.measure_all([1, 2, 3], measure, lambda rows: [], soon(-1), path, rows[:1], case_of)
    assert f"{gpu_day.TIME_IS_OVER}: 2 of 3 were not started" in capsys.readouterr().out


def test_a_variable_names_the_commit_where_git_does_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFX_COMMIT", "abc1234")
    assert record.environment()["commit"] == "abc1234"
    monkeypatch.delenv("LFX_COMMIT")
    assert record.environment()["commit"] != "abc1234"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the place of the library: a dry run does not load it."""
    path = tmp_path_factory.mktemp("library") / "liblfx_plugins.so"
    path.touch()
    return path


def command(*options: str) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.gpu_day", *options], check=False, capture_output=True, text=True, cwd=ROOT
    )


def test_a_dry_run_lists_every_step(library: Path, tmp_path: Path) -> None:
    done = command("--dry-run", "--library", str(library), "--folder", str(tmp_path / "day"))
    assert done.returncode == 0, done.stderr
    steps = gpu_day.steps(tmp_path / "day", library, None)
    assert [line.split(": at most")[0] for line in done.stdout.splitlines()[1:]] == [one.name for one in steps]
    assert not (tmp_path / "day").exists()


@pytest.mark.parametrize(
    "name", first_of_each(["check fp16", "check torch", "check onnxruntime", "memcheck", "check plans"])
)
def test_the_options_of_the_checks_are_known(name: str, library: Path, tmp_path: Path) -> None:
    (found,) = (one for one in gpu_day.steps(tmp_path, library, None) if one.name == name)
    arguments = found.command[found.command.index(sys.executable) :]
    done = subprocess.run([*arguments, "--dry-run"], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("dry run: nothing was run on a GPU\n")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(library: Path, tmp_path: Path) -> None:
    done = command("--library", str(library), "--folder", str(tmp_path / "day"))
    assert done.returncode == 1
    assert "PyTorch sees no NVIDIA GPU" in done.stderr
    assert command("--publish", "--folder", str(tmp_path / "day")).returncode == 1
