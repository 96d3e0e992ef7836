"""`lfx bench`: the figures of the rows, alternation of the contenders, and the command."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.cli import bench as cli_bench
from lfx.cli import cli
from lfx.cli.bench import run_bench
from lfx.errors import DependencyError, InputError
from lfx.runtime import Engine, bench
from lfx.signature import TEXT_GENERATION
from tests.cli.commands import Forked, lfx
from tests.conftest import MakeBundle, SmallDisk
from tests.models import save_tiny_checkpoint


def test_contenders_take_turns_on_the_same_ids_after_a_warm_up() -> None:
    seen: list[tuple[str, Any]] = []
    contenders = {name: (lambda ids, name=name: seen.append((name, ids.copy()))) for name in "ab"}
    rows = bench.measure(contenders, [8], [2], rounds=3, vocab_size=50)
    assert "".join(name for name, _ in seen) == "ab" * 4
    assert all(np.array_equal(ids, seen[0][1]) and ids.shape == (2, 8) for _, ids in seen)
    assert [row["contender"] for row in rows] == ["a", "b"]


def test_rows_have_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float) -> bench.Run:
        def run(ids: Any) -> None:
            clock[0] += seconds

        return run

    one, other = bench.measure({"one": takes(0.5), "other": takes(1.5)}, [100], [4], rounds=5)
    assert (one["p50_ms"], one["p95_ms"], one["tokens_per_second"]) == pytest.approx((500, 500, 800))
    assert (one["times_the_first"], other["times_the_first"]) == pytest.approx((1, 3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds 0 is out of range; give a whole number, 1 or more"),
        ({"rounds": "3"}, "rounds is '3'; give a whole number"),
        ({"rounds": True}, "rounds is True"),
        ({"lengths": []}, r"lengths is \[\]; give a list of at least one"),
        ({"lengths": 5}, "lengths is 5; give a list"),
        ({"lengths": "64"}, "lengths is '64'; give a list"),
        ({"lengths": [0]}, "lengths 0 is out of range"),
        ({"lengths": [64, None]}, "lengths is None; give a whole number"),
        ({"batch_sizes": []}, "batch_sizes is"),
        ({"batch_sizes": [1.5]}, "batch_sizes is 1.5; give a whole number"),
        ({"vocab_size": 0}, "vocab_size 0 is out of range"),
        ({"vocab_size": 10**30}, "vocab_size 10+ is out of range"),
        ({"contenders": {}}, "contenders is {}; give at least one"),
        ({"contenders": None}, "contenders is None"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_runs(wrong: dict[str, Any], message: str) -> None:
    def never(ids: Any) -> None:
        raise AssertionError("it ran")

    with pytest.raises(InputError, match=message):
        bench.measure(**{"contenders": {"a": never}, "lengths": [8], "batch_sizes": [1], **wrong})


def test_a_plot_is_written_and_a_missing_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"contender": name, "batch": batch, "seqlen": n, "tokens_per_second": 100.0 * n}
        for name in "ab"
        for batch in (1, 8)
        for n in (512, 64)
    ]
    bench.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot be written"):
        bench.plot(rows, tmp_path / "no" / "plot.png")


def test_a_plot_does_not_depend_on_a_matplotlibrc(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    rows = [{"contender": "a_$b", "batch": 1, "seqlen": n, "tokens_per_second": 100.0 * n} for n in (64, 512)]
    bench.plot(rows, tmp_path / "before.png")
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "red"}):
        bench.plot(rows, tmp_path / "plot.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "plot.png").read_bytes() == (tmp_path / "before.png").read_bytes()


def test_a_plot_on_a_full_disk_says_what_to_do(small_disk: SmallDisk) -> None:
    pytest.importorskip("matplotlib")
    folder = small_disk()
    (folder / "ballast").write_bytes(bytes(110_000))
    rows = [{"contender": "a", "batch": 1, "seqlen": n, "tokens_per_second": 100.0 * n} for n in (64, 512)]
    with pytest.raises(
        InputError, match=r"plot\.png cannot be written: no disk space left; make room, or choose another"
    ):
        bench.plot(rows, folder / "plot.png")
    assert [path.name for path in folder.iterdir()] == ["ballast"]


@pytest.mark.parametrize("name", ["plot.svg", "plot.PNG", "plot"])
def test_a_plot_has_the_requested_name(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench.check_plot(tmp_path / name)
    bench.plot([{"contender": "a", "batch": 1, "seqlen": 64, "tokens_per_second": 1.0}], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("task", "options", "reason"),
    [
        (TEXT_GENERATION, {"only": ("logits",)}, "--only is for models with outputs"),
        (TEXT_GENERATION, {"plot": Path("plot.png")}, "--plot is not drawn for models that write texts"),
        ("fill-mask", {"new_tokens": 5}, "--new-tokens is for models that write texts"),
    ],
)
def test_an_option_of_other_tasks_is_refused(task: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        cli_bench._check_task(task, **{"new_tokens": None, "only": (), "plot": None, **options})


def test_a_plot_in_an_unknown_format_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"contender": "a", "batch": 1, "seqlen": 64, "tokens_per_second": 1.0}]
    with pytest.raises(InputError, match=r"plot\.xyz cannot be written: .*choose another --plot, such as plot\.png"):
        bench.plot(rows, tmp_path / "plot.xyz")
    assert list(tmp_path.iterdir()) == []


def test_rows_on_a_full_disk_say_what_to_do(small_disk: SmallDisk) -> None:
    folder = small_disk()
    rows = [{"model": "x" * 1000}] * 200
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be written: no disk space left; make room, or choose"):
        cli_bench._write(folder / "rows.jsonl", rows)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("as_json", [True, False])
def test_rows_that_cannot_be_written_are_printed(
    as_json: bool, bundle: MakeBundle, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk()
    (folder / "full").write_bytes(bytes(shutil.disk_usage(folder).free))
    settings: dict[str, Any] = {"lengths": (30,), "batch_sizes": (1,), "rounds": 1, "against": (), "source": None}
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be written: no disk space left"):
        run_bench(bundle(), Engine, **settings, output=folder / "rows.jsonl", plot=None, as_json=as_json)
    out = capsys.readouterr().out
    assert json.loads(out)["seqlen"] == 30 if as_json else "tokens/s" in out


def test_the_command_measures_beside_pytorch_and_writes_its_rows(
    checkpoint_bundle: MakeBundle, forked: Forked, tmp_path: Path
) -> None:
    bundle = checkpoint_bundle("text-classification")
    options = ["--length", "16", "--length", "40", "--batch", "2", "--rounds", "2", "--against", "pytorch", "--json"]
    command = ["bench", str(bundle), *options, "--output", "rows.jsonl", "--plot", "plot.png"]
    done = forked.run(command, tmp_path)
    assert done.code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["seqlen"], row["contender"]) for row in rows] == [
        (16, "lfx onnxruntime"),
        (16, "pytorch"),
        (40, "lfx onnxruntime"),
        (40, "pytorch"),
    ]
    assert all(row["tokens_per_second"] > 0 and row["cpu"] and row["versions"]["torch"] for row in rows)
    assert (tmp_path / "rows.jsonl").read_text() == done.stdout
    assert (tmp_path / "plot.png").is_file()


@pytest.mark.parametrize(
    ("task", "rule", "first"),
    [("question-answering", "first", 1), ("text-classification", "none", 0), (TEXT_GENERATION, "none", 0)],
)
def test_pytorch_gets_the_global_tokens_of_the_bundle(
    task: str, rule: str, first: int, checkpoint_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Any] = []

    def recorded(ids: Any, *, first: bool) -> Any:
        masks.append(global_mask(ids, first=first))
        return masks[-1]

    global_mask = cli_bench._global_mask
    monkeypatch.setattr(cli_bench, "_global_mask", recorded)
    bundle = checkpoint_bundle(task, global_attention=rule)
    settings: dict[str, Any] = {"lengths": (8,), "batch_sizes": (2,), "rounds": 1, "output": None, "as_json": True}
    new_tokens = 3 if task == TEXT_GENERATION else None
    run_bench(bundle, Engine, **settings, against=("pytorch",), source=None, new_tokens=new_tokens, plot=None)
    assert masks
    assert all(mask.tolist() == 2 * [[first] + 7 * [0]] for mask in masks)


def test_without_torch_the_extra_that_brings_it_is_named(
    checkpoint_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"lengths": (8,), "batch_sizes": (1,), "rounds": 1, "source": None, "output": None}
    folder = checkpoint_bundle()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r"torch is not installed; .*longformer-lfx\[export\]"):
        run_bench(folder, Engine, against=("pytorch",), **settings, plot=None, as_json=True)


@pytest.mark.slow
def test_a_checkpoint_with_other_weights_is_not_measured(
    checkpoint_bundle: MakeBundle, forked: Forked, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path / "other", seed=1)
    command = ["bench", str(checkpoint_bundle()), "--length", "8", "--against", "pytorch", "--source", "other"]
    done = forked.run(command, tmp_path)
    assert "other weights than the bundle was made from" in done.error()
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rounds": 0}, "rounds 0"),
        ({"rounds": True}, "rounds is True"),
        ({"lengths": ("8",)}, "length is '8'"),
        ({"batch_sizes": (1.5,)}, "batch is 1.5"),
        ({"against": ("tensorflow",)}, "against 'tensorflow' is not known"),
        ({"against": ("pytorch",), "source": 5}, "source is 5"),
        ({"output": 5}, "output is 5"),
        ({"plot": "a\0b"}, "cannot be opened"),
        ({"plot": Path("plot.xyz")}, "plot.xyz has a suffix that no plot has; give one of: .*png"),
    ],
)
def test_options_of_other_types_are_errors_of_one_line(
    options: dict[str, Any], reason: str, bundle: MakeBundle
) -> None:
    settings = {"lengths": (8,), "batch_sizes": (1,), "rounds": 1, "against": (), "source": None, "output": None}
    with pytest.raises(InputError, match=reason):
        run_bench(bundle(), Engine, **{**settings, "plot": None, "as_json": True, **options})


def test_the_command_alone_shows_the_memory_of_its_process(bundle: MakeBundle) -> None:
    done = lfx("bench", bundle(), "--length", "30", "--rounds", "1")
    assert done.code == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert float(done.stdout.splitlines()[-1].split()[-2]) > 0.03


def test_a_multiple_choice_model_is_not_measured(bundle: MakeBundle) -> None:
    with pytest.raises(InputError, match="multiple-choice is not measured"):
        cli.main(["bench", str(bundle("multiple-choice"))], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--length", "129"], "length 129 is above the model's maximum 128"),
        (["--output", "/nowhere/rows.jsonl"], "its folder does not exist"),
        (["--against", "pytorch"], r"made from a module in memory.*give: lfx bench \S+ --against pytorch --source"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: list[str], reason: str, bundle: MakeBundle) -> None:
    done = lfx("bench", bundle(), *options)
    assert re.search(reason, done.error())
    assert done.stdout == ""
