"""Fixtures that several folders use."""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from lfx.export import export, validate
from lfx.export.load import weights_sha256
from tests.models import VOCAB_SIZE, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.once import fill_once

MakeBundle = Callable[..., Path]
MakeLed = Callable[..., tuple[Any, Path]]
MakeOnce = Callable[[str, Callable[[Path], object]], Path]
SmallDisk = Callable[[], Path]
DEFAULTS = inspect.signature(export).parameters
# What Python says of a path with a null byte, as a pattern; from 3.13 on it differs by function.
NULL_BYTE = "embedded null byte" if sys.version_info < (3, 13) else "(l?stat: )?embedded null (byte|character in path)"

# `make fuzz` raises the number of examples. No deadline: a test does not fail by the clock.
settings.register_profile("lfx", max_examples=int(os.environ.get("LFX_FUZZ_EXAMPLES", "200")), deadline=None)
settings.load_profile("lfx")


# A shell ignores SIGINT in what it starts in the background, which passes that on: nothing could be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch and transformers make many objects that live on; by default Python searches them for garbage all the time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Mark as slow the cases that do not fulfil the rule of `tests.marks.fast_if`."""
    for item in items:
        for marker in item.iter_markers("fast_if"):
            (rule,) = marker.args
            values = {"case": item.callspec.id, **item.callspec.params}
            if not rule(*(values[name] for name in inspect.signature(rule).parameters)):
                item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def tables_of_torch_onnx() -> Iterator[None]:
    """Let torch.onnx make its tables of functions and decompositions once; each export takes 0.5 s to make them."""
    try:
        from torch.onnx._internal.exporter._decomp import create_onnx_friendly_decomposition_table
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # private to torch
        yield
        return
    table = functools.cache(lambda functions: create_onnx_friendly_decomposition_table(set(functions)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        patch.setattr(
            "torch.onnx._internal.exporter._decomp.create_onnx_friendly_decomposition_table",
            lambda functions: dict(table(frozenset(functions))),
        )
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """made_once(name, make) -> a folder that make(folder) has filled, once for all workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / name
        fill_once(folder, make, folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def bundle(made_once: MakeOnce) -> MakeBundle:
    """bundle(task, **export options) -> the folder of a tiny exported model with a tokenizer, which tests only read."""

    def make(task: str = "feature-extraction", **options: Any) -> Path:
        name = _name("bundle", task, options)

        def fill(folder: Path) -> None:
            export(tiny_model(task), folder / task, tokenizer=tiny_tokenizer(), **options)

        return made_once(name, fill) / task

    return make


@pytest.fixture(scope="session")
def checkpoint_bundle(made_once: MakeOnce) -> MakeBundle:
    """checkpoint_bundle(task, **export options) -> a bundle of a tiny checkpoint in a folder, which tests only read."""

    def make(task: str = "feature-extraction", **options: Any) -> Path:
        checkpoint = made_once(f"checkpoint,{task}", lambda folder: save_tiny_checkpoint(folder, task))
        name = _name("checkpoint-bundle", task, options)
        return made_once(name, lambda folder: export(checkpoint, folder / task, **options)) / task

    return make


def _name(first: str, task: str, options: dict[str, Any]) -> str:
    """Name a folder for a bundle by its task and the options that are not the defaults."""
    changed = {name: value for name, value in options.items() if DEFAULTS[name].default != value}
    return ",".join([first, task, *(f"{name}={changed[name]}" for name in sorted(changed))])


@pytest.fixture(scope="session")
def led_bundle(made_once: MakeOnce) -> MakeLed:
    """led_bundle(seed, **export options) -> Hugging Face's model, and the folder of its bundle, only read."""
    from tests.runtime.generation.led import tiny_led

    models: dict[int, Any] = {}

    def make(seed: int = 7, **options: Any) -> tuple[Any, Path]:
        model = models.setdefault(seed, tiny_led(seed, vocab_size=VOCAB_SIZE))
        name = ",".join(["led", str(seed), *(f"{key}={value}" for key, value in options.items())])

        def fill(folder: Path) -> None:
            tokenizer = tiny_tokenizer()
            tokenizer.add_tokens([f"w{i}" for i in range(VOCAB_SIZE - len(tokenizer))])  # the model writes any id
            model.save_pretrained(folder / "checkpoint")
            tokenizer.save_pretrained(folder / "checkpoint")
            export(folder / "checkpoint", folder / "led", **options)

        return model, made_once(name, fill) / "led"

    return make


@pytest.fixture(scope="session")
def _reference_outputs() -> dict[Any, Any]:
    return {}


@pytest.fixture(scope="module")
def remembered_references(_reference_outputs: dict[Any, Any]) -> Iterator[None]:
    """Let comparisons of one model share what PyTorch computes: it runs once for each precision and each input.

    For modules of tests whose models differ in their classes, configs or weights.
    """
    outputs = _reference_outputs

    def remembering(make: Callable[..., Any]) -> Callable[..., Any]:
        def runner(module: Any, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
            model = (repr(module), repr(getattr(module, "config", None)), weights_sha256(module))
            made = functools.cache(lambda: make(module, *arguments, **options))

            def run(inputs: dict[str, Any]) -> Any:
                values = [(name, array.shape, array.tobytes()) for name, array in inputs.items()]
                key = (make, model, repr(arguments), repr(sorted(options.items())), *values)
                if key not in outputs:
                    outputs[key] = made()(inputs)
                return dict(outputs[key])

            return run

        return runner

    with pytest.MonkeyPatch.context() as patch:
        for make in (validate.reference_runner, validate.torch_runner):
            patch.setattr(validate, make.__name__, remembering(make))
        yield


@pytest.fixture(scope="module")
def own_bundle(bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """own_bundle(task, **export options) -> a copy of the bundle for one module of tests.

    The onnx package refuses weights that have a second hard link, and the OpenVINO backend makes one while it opens a
    bundle, which another worker may be doing with the bundle that all tests share.
    """
    copies: dict[Path, Path] = {}

    def make(task: str = "feature-extraction", **options: Any) -> Path:
        source = bundle(task, **options)
        if source not in copies:
            copies[source] = Path(shutil.copytree(source, tmp_path_factory.mktemp("own") / task))
        return copies[source]

    return make


@pytest.fixture(scope="module")
def few_objects() -> None:
    """Let gc.collect() search the objects that a module of tests makes; all those of torch take a second."""
    gc.freeze()


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """mount(*arguments of the command, the last of which is the path): mount it until the test ends."""
    mounted: list[Path] = []

    def run(*arguments: str | Path) -> None:
        if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode != 0:
            pytest.skip("only root can mount")
        mounted.append(Path(arguments[-1]))

    yield run
    for path in reversed(mounted):
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def bind_mount(mount: Callable[..., None]) -> Callable[[Path], None]:
    """bind_mount(path): mount the file or the folder at its own path."""
    return lambda path: mount("--bind", path, path)


@pytest.fixture
def small_disk(mount: Callable[..., None], tmp_path: Path) -> SmallDisk:
    """small_disk() -> an empty folder on a disk of 128 KiB of its own."""
    numbers = itertools.count()

    def make() -> Path:
        folder = tmp_path / f"disk{next(numbers)}"
        folder.mkdir()
        mount("-t", "tmpfs", "-o", "size=128k", "tmpfs", folder)
        return folder

    return make


@pytest.fixture
def overlay(mount: Callable[..., None], small_disk: SmallDisk, tmp_path: Path) -> Callable[[Path], Path]:
    """overlay(image) -> a folder that shows the files of `image`, which stays as it is, as in a container."""

    def make(image: Path) -> Path:
        disk, container = small_disk(), tmp_path / "container"
        for folder in (disk / "changes", disk / "work", container):
            folder.mkdir()
        mount("-t", "overlay", "-o", f"lowerdir={image},upperdir={disk}/changes,workdir={disk}/work", "o", container)
        return container

    return make
