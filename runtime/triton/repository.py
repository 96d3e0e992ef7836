"""Writes a model into a model repository of Triton, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfx import __version__
from lfx.checks import LARGEST, file_path, flag, one_of, real_number, shown, whole_number
from lfx.errors import ArtifactError, DependencyError, InputError, LfxError
from lfx.files import copy, exchange, is_mount_point, is_same, locked, move_folder, private_folder, why_unwritten
from lfx.manifest import MANIFEST, MODEL, Manifest, sha256
from lfx.runtime import backends, plugin
from lfx.runtime.artifact import Artifact, open_artifact, unchanged
from lfx.runtime.engine import MAX_THREADS
from lfx.runtime.hub import local_path
from lfx.runtime.loading import COMPUTE_PRECISIONS
from lfx.runtime.plan import SUFFIX, PlanManifest, json_path, replaced
from lfx.runtime.ragged import check_cuttable
from lfx.runtime.text_files import TOKENIZER, text_files, text_folder
from lfx.runtime.triton.config import Instances, ModelConfig
from lfx.runtime.triton.requests import MODEL_PARAMETER, finds_tokenizer, input_specs, output_specs
from lfx.signature import Signature

TRITON_BACKENDS = ("python", "onnxruntime", "tensorrt")
VERSION = "1"  # the folder of the model's only version
CONFIG, MODEL_PY, BUNDLE, PLAN = "config.pbtxt", "model.py", "bundle", "model.plan"
MOST_INSTANCES = 64
_MARK = "# Written by lfx triton"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_CURE = "choose another --output"
_DAY_MS = 86_400_000
_MAX_UINT32 = 2**32 - 1  # the largest number of config.pbtxt


@dataclass(frozen=True)
class Settings:
    """How Triton runs a model.

    Attributes:
        name: name of the model; None = that of the bundle or plan.
        triton_backend: "python" (an Engine), or a backend in C++: "onnxruntime" for a bundle, "tensorrt" for a plan.
        link: whether the repository names the path of the bundle or plan, and holds no copy.
        max_batch: largest number of sequences that Triton puts together, 1 or more; None = 64, or a plan's largest.
        max_delay_ms: longest time that a request waits for others.
        max_pending: largest number of waiting requests; the next one is refused.
        instances: number of instances of the model, for each GPU if it runs on GPUs.
        gpus: numbers of the GPUs; empty = all that the server has. For a model that runs on GPUs.
        custom_ops: library of custom ops that ONNX Runtime loads; for "onnxruntime".
        backend, provider, threads, precision, token_budget: as `Engine`'s; for "python".
    Raises:
        InputError: an option has another type or is out of range.
        DependencyError: the backend, provider or precision is not known.
    """

    name: str | None = None
    triton_backend: str = "python"
    link: bool = False
    max_batch: int | None = None
    max_delay_ms: float = 5.0
    max_pending: int = 1024
    instances: int = 1
    gpus: Sequence[int] = ()
    custom_ops: str | Path | None = None
    backend: str = "auto"
    provider: str = "cpu"
    threads: int | None = None
    precision: str | None = None
    token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise InputError(
                f"{shown(self.name)} is no name of a model; give up to 100 letters, digits, '.', '_' and '-', with a "
                "letter, a digit or '_' first"
            )
        flag(self.link, "link")
        if self.custom_ops is not None:
            file_path(self.custom_ops, "custom_ops")
        one_of(self.triton_backend, "triton_backend", TRITON_BACKENDS)
        one_of(self.backend, "backend", ("auto", *backends.BACKENDS, "tensorrt"), DependencyError)
        one_of(self.provider, "provider", backends.PROVIDERS, DependencyError)
        if self.precision is not None:
            one_of(self.precision, "precision", COMPUTE_PRECISIONS, DependencyError)
        real_number(self.max_delay_ms, "max_delay_ms", 0, _DAY_MS)
        whole_number(self.max_pending, "max_pending", 1, _MAX_UINT32)
        whole_number(self.instances, "instances", 1, MOST_INSTANCES)
        for name, largest in (("max_batch", 2**31 - 1), ("threads", MAX_THREADS), ("token_budget", LARGEST)):
            if (value := getattr(self, name)) is not None:
                whole_number(value, name, 1, largest)
        if not isinstance(self.gpus, list | tuple):
            raise InputError(f"gpus is {shown(self.gpus)}; give a list of numbers of GPUs")
        for number in self.gpus:
            whole_number(number, "gpus", 0, 1023)
        if len(set(self.gpus)) < len(self.gpus):
            raise InputError(f"gpus names a GPU twice: {', '.join(map(str, self.gpus))}; name each once")


@dataclass(frozen=True)
class _Source:
    """The bundle, ONNX file or plan, whose files were checked."""

    path: Path
    signature: Signature
    artifact: Artifact | None  # None for a plan
    plan: PlanManifest | None  # None for a bundle or an ONNX file
    repository: str | None = None  # name of the repository of the hub that it is from

    @property
    def manifest(self) -> Any:
        """The manifest of the bundle or the plan; None for an ONNX file."""
        return self.plan if self.artifact is None else self.artifact.manifest

    @property
    def model_name(self) -> str:
        """A name for the model, from its path or its repository of the hub."""
        path = self.path.absolute()
        return self.repository or (path.name if path.is_dir() else path.stem)


@dataclass(frozen=True)
class Written:
    """A model in a repository.

    Attributes:
        folder: its folder in the repository.
        name: its name in Triton.
        plugins: the plugin library that the server has to load; None if it needs none.
        lacks_tokenizer: whether the model takes no texts, since a tokenizer outside of a bundle is not copied.
    """

    folder: Path
    name: str
    plugins: Path | None
    lacks_tokenizer: bool = False


def write_model(model: str | Path, repository: str | Path, settings: Settings) -> Written:
    """Write a model into a repository, which is made if it does not exist. A model of lfx of that name is replaced.

    Files are copies, since onnx refuses weights that have a second hard link. With `settings.link` the bundle or plan
    stays where it is, and its path must be the same on the server.

    Raises:
        InputError: an option does not fit the model.
        ArtifactError: the bundle or plan is missing, truncated or changed, or has outputs that Triton cannot take.
        LfxError: the repository cannot be written, or the name is that of a model that lfx did not write.
    """
    if not isinstance(settings, Settings):
        raise InputError(f"settings is {shown(settings)}; give Settings")
    source = _open(file_path(model, "model"))
    name = _model_name(source, settings)
    _check_fit(source, settings)
    output = file_path(repository, "output")
    if not output.absolute().parent.is_dir():
        raise InputError(f"the folder {output.absolute().parent} does not exist; make it, or {_CURE}")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder; {_CURE}")
    target = output.absolute() / name
    if settings.link and any(is_same(target, path) for path in source.path.resolve().parents):
        raise InputError(f"{source.path} is in {target}, which is replaced; leave link out, or give another name")
    plugins: Path | None = None
    try:
        output.mkdir(exist_ok=True)
        with _replacing(target) as folder, _unchanged(source):
            version = folder / VERSION
            version.mkdir()
            if settings.triton_backend == "python":
                parameters = _write_python(source, version, settings)
            else:
                parameters, plugins = {}, _write_native(source, version)
            _write_config(folder, _config(name, source, settings, parameters))
    except OSError as error:
        raise LfxError(why_unwritten(output, error, _CURE)) from error
    lacks_tokenizer = (
        settings.triton_backend == "python"
        and not _has_texts(source, link=settings.link)
        and finds_tokenizer(source.path, source.manifest)
    )
    return Written(target, name, None if plugins is None else target / VERSION / plugins, lacks_tokenizer)


def _open(given: Path) -> _Source:
    path = local_path(given)
    if path != given:
        artifact = open_artifact(path)
        return _Source(path, artifact.signature, artifact, None, given.name.partition("@")[0])
    if path.suffix == SUFFIX and not path.is_dir():
        plan = PlanManifest.read(path)
        plan.verify(path)
        return _Source(path, plan.signature, None, plan)
    artifact = open_artifact(path)
    return _Source(artifact.bundle or path, artifact.signature, artifact, None)


def _unchanged(source: _Source) -> contextlib.AbstractContextManager[None]:
    """Refuse the copies of a bundle that is replaced meanwhile."""
    artifact = source.artifact
    if artifact is None or artifact.bundle is None or artifact.manifest is None:
        return contextlib.nullcontext()
    return unchanged(artifact.bundle, artifact.manifest)


def _model_name(source: _Source, settings: Settings) -> str:
    if settings.name is None:
        return re.sub(r"[^A-Za-z0-9._-]", "-", source.model_name).lstrip(".-")[:100] or "model"
    return settings.name


def _check_fit(source: _Source, settings: Settings) -> None:
    """Raise InputError for options that contradict the model or each other."""
    plan = source.plan
    if settings.triton_backend == "python":
        _check_python(source, settings)
    else:
        _check_native(source, settings)
    if settings.gpus and not _on_gpu(source, settings):
        raise InputError("gpus are for a model that runs on GPUs, and this one runs on the CPU; choose provider cuda")
    most = settings.max_batch
    if most is not None and plan is not None and most > (largest := _largest_batch(plan)):
        raise InputError(f"max_batch {most} is above the plan's {largest}; give less, or build it with --batch")


def _check_python(source: _Source, settings: Settings) -> None:
    check_cuttable(source.signature)
    if settings.link and not str(source.path.resolve()).isascii():
        raise InputError(
            f"{source.path} has other letters than ASCII in its path, which Triton's Python cannot open; leave link "
            "out, or give another path"
        )
    if settings.custom_ops is not None:
        raise InputError("custom ops are for Triton's onnxruntime backend; leave them out, or choose it")
    if source.plan is None:
        return
    if (settings.threads, settings.precision) != (None, None):
        raise InputError(f"{source.path} is a plan; leave threads and precision out")
    if settings.backend not in ("auto", "tensorrt") or settings.provider != "cpu":
        raise InputError(f"{source.path} is a plan, which runs on TensorRT; leave backend and provider out")


def _check_native(source: _Source, settings: Settings) -> None:
    native = settings.triton_backend
    given = {"backend": settings.backend != "auto", "provider": settings.provider not in ("cpu", "cuda")}
    given |= {name: getattr(settings, name) is not None for name in ("threads", "precision", "token_budget")}
    if refused := [name for name, is_given in given.items() if is_given]:
        raise InputError(f"{refused[0]} is for the Engine, and Triton's {native} backend has none; leave it out")
    if settings.link:
        raise InputError(f"Triton's {native} backend reads the model from the repository; leave link out")
    if native == "tensorrt":
        _check_tensorrt(source, settings)
    elif source.plan is not None:
        raise InputError(f"{source.path} is a plan; choose Triton's tensorrt or python backend")
    elif source.signature.precision == "bf16" and settings.provider == "cpu":
        raise InputError("ONNX Runtime has no bf16 kernels for the CPU; use provider cuda, or the python backend")


def _check_tensorrt(source: _Source, settings: Settings) -> None:
    plan = source.plan
    if plan is None:
        raise InputError(f"{source.path} is no plan; build one with: lfx build-engine, or choose another backend")
    if plan.flavor != "tensorrt":
        raise InputError(
            f"{source.path} is for {plan.flavor}, and Triton's backend is TensorRT; build it with: --flavor tensorrt, "
            "or choose the python backend"
        )
    if settings.provider != "cpu" or settings.custom_ops is not None:
        raise InputError("provider and custom ops are for ONNX Runtime, and this is a plan; leave them out")


def _on_gpu(source: _Source, settings: Settings) -> bool:
    return source.plan is not None or settings.provider != "cpu"


def _largest_batch(plan: PlanManifest) -> int:
    return max(profile.batch.max for profile in plan.profiles)


def _write_python(source: _Source, version: Path, settings: Settings) -> dict[str, str]:
    """Write model.py and the model's files; return the parameters of the Engine."""
    copy(Path(__file__).with_name("model.py"), version / MODEL_PY)
    if settings.link:
        named = str(source.path.resolve() if source.path.is_dir() else source.path.absolute())
    elif source.plan is not None:
        named = _add_plan(source, source.plan, version)
    else:
        named = _add_bundle(source, version)
    engine = {
        "backend": settings.backend,
        "provider": settings.provider,
        "threads": settings.threads,
        "precision": settings.precision,
        "token_budget": settings.token_budget,
    }
    return {MODEL_PARAMETER: named, **{name: str(value) for name, value in engine.items() if value is not None}}


def _add_bundle(source: _Source, version: Path) -> str:
    """Add the files of a bundle or an ONNX file to the version's folder; return the name of the model there."""
    assert source.artifact is not None
    folder = version / BUNDLE
    if source.artifact.manifest is None:
        folder.mkdir()
        for name, file in source.artifact.files.items():
            copy(file, folder / name)
        return f"{BUNDLE}/{source.artifact.path.name}"
    _add_files(source.path, folder, source.artifact.manifest.files)
    return BUNDLE


def _add_files(bundle: Path, folder: Path, names: Iterable[str]) -> None:
    for name in (*names, MANIFEST):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy(bundle / name, target)


def _add_plan(source: _Source, plan: PlanManifest, version: Path) -> str:
    """Add a plan, its JSON and the text files of its bundle, if they are there."""
    for file in (*plan.files(source.path), json_path(source.path)):
        copy(file, version / file.name)
    added = version / source.path.name
    if PlanManifest.read(added) != plan:  # it may have been replaced since it was opened
        raise replaced(source.path)
    plan.verify(added)
    if _has_texts(source, link=False):
        bundle = text_folder(source.path, plan)
        manifest = Manifest.read(bundle)
        with unchanged(bundle, manifest):
            # No other file of it is read, and Python in Triton would import modules from this folder.
            texts = [name for name in manifest.files if name.endswith(".json")]
            _add_files(bundle, version / bundle.name, manifest.verify(bundle, texts))
    return source.path.name


def _write_native(source: _Source, version: Path) -> Path | None:
    """Write the files for a backend in C++; return the name of the plugin library that is among them."""
    if source.plan is None:
        assert source.artifact is not None
        model, *weights = source.artifact.files.items()
        copy(model[1], version / MODEL)
        for name, file in weights:
            copy(file, version / name)
        return None
    copy(source.path, version / PLAN)
    if sha256(version / PLAN) != source.plan.plan["sha256"]:
        raise replaced(source.path)
    if not source.plan.plugin_layers:
        return None
    copy(plugin.library(), version / plugin.LIBRARY)
    return Path(plugin.LIBRARY)


def _has_texts(source: _Source, *, link: bool) -> bool:
    """Whether the model has its tokenizer in Triton. It is copied only if a bundle lists it."""
    _, listed = text_files(source.path, source.manifest)
    return TOKENIZER in (listed or ()) or (link and finds_tokenizer(source.path, source.manifest))


def _config(name: str, source: _Source, settings: Settings, parameters: Mapping[str, str]) -> ModelConfig:
    signature, plan = source.signature, source.plan
    inputs, outputs = list(signature.inputs), list(signature.outputs)
    is_python = settings.triton_backend == "python"
    if is_python:
        has_tokenizer = _has_texts(source, link=settings.link)
        inputs = input_specs(signature, has_tokenizer=has_tokenizer)
        outputs = output_specs(signature, has_tokenizer=has_tokenizer)
    on_gpu = _on_gpu(source, settings)
    several = plan is not None and not is_python and len(plan.profiles) > 1
    files = {"python": None, "onnxruntime": MODEL, "tensorrt": PLAN}
    return ModelConfig(
        name=name,
        backend=settings.triton_backend,
        inputs=inputs,
        outputs=outputs,
        any_inputs=is_python,
        max_batch=settings.max_batch or (64 if plan is None else _largest_batch(plan)),
        max_delay_us=round(settings.max_delay_ms * 1000),
        max_pending=settings.max_pending,
        instances=Instances(settings.instances, tuple(settings.gpus) if on_gpu else None),
        profiles=range(len(plan.profiles)) if plan is not None and several else (),
        model_file=files[settings.triton_backend],
        custom_ops=None if settings.custom_ops is None else str(Path(settings.custom_ops).absolute()),
        parameters=parameters,
    )


def _write_config(folder: Path, config: ModelConfig) -> None:
    text = config.text()
    path = folder / CONFIG
    path.write_text("", encoding="utf-8")
    line = f"{_MARK} {__version__}, {_seal(text, folder)}. If you edit it, lfx will not replace this model.\n"
    path.write_text(f"{line}{text}", encoding="utf-8")


def _seal(text: str, folder: Path) -> str:
    """A digest of the config and of the model's other files, which says whether they are as lfx wrote them.

    For a file that is too large to be edited by hand, the digest has the size and not the bytes.
    """
    digest = hashlib.sha256(text.encode())
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            continue
        if "__pycache__" in name.parts or str(name) == CONFIG:  # Triton's Python writes the former
            continue
        size = path.lstat().st_size
        content = path.read_bytes() if size < 1 << 20 and path.is_file() and not path.is_symlink() else b""
        digest.update(f"\n{name}\n{size}\n".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def _refusal(folder: Path) -> str | None:
    """The reason why a folder may not be replaced: it holds something that lfx did not write; None if it may."""
    cure = "remove it, or give the model another --name"
    config = folder / CONFIG
    if folder.is_symlink() or not folder.is_dir() or (config.exists() and not config.is_file()):
        return f"{folder} exists and is no model of lfx; {cure}"
    try:
        first, _, text = config.read_text(encoding="utf-8").partition("\n")
    except (FileNotFoundError, UnicodeDecodeError):
        return f"{folder} exists and is no model of lfx; {cure}" if any(folder.iterdir()) else None
    if not first.startswith(_MARK):
        return f"{folder} exists and is no model of lfx; {cure}"
    if _seal(text, folder) not in first:
        return f"{folder} has files or a {CONFIG} that lfx did not write, which would be lost; {cure}"
    return None


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Make a new folder that takes the place of `target` if the block ends without an error."""
    repository = target.parent
    with locked(target):  # while another process replaces it, files of both models would be read
        _check_replaceable(target)
    # Not in the repository, if the parent can be used: Triton takes each folder there for a model.
    beside = repository.parent if _is_usable(repository.parent, repository) else repository
    with private_folder(beside, f"triton {target}") as private:
        new = private / "new"
        new.mkdir()
        yield new
        with locked(target):
            _check_replaceable(target)
            if not os.path.lexists(target):
                new.rename(target)
            elif not exchange(new, target):
                old = private / "old"
                try:
                    move_folder(target, old)
                    new.rename(target)
                except BaseException:
                    if os.path.lexists(old) and os.path.lexists(new):
                        if os.path.lexists(target):  # what is left of it, where it was copied
                            shutil.rmtree(target)
                        old.rename(target)
                    raise


def _check_replaceable(target: Path) -> None:
    if os.path.lexists(target) and (refusal := _refusal(target)) is not None:
        raise ArtifactError(refusal)


def _is_usable(parent: Path, repository: Path) -> bool:
    """Whether a folder in the parent can be renamed into the repository: not if that is a mount point."""
    same_disk = parent.stat().st_dev == repository.stat().st_dev and not is_mount_point(repository)
    return same_disk and os.access(parent, os.W_OK | os.X_OK)
