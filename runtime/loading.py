"""Checks a bundle, an ONNX file or a plan, and loads it into a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfx.checks import file_path, one_of, shown
from lfx.errors import ArtifactError, DependencyError, InputError, LfxError
from lfx.machine import int8_overflows
from lfx.manifest import MANIFEST, Manifest
from lfx.runtime import backends, custom_ops
from lfx.runtime.artifact import Artifact, open_artifact
from lfx.runtime.hub import local_path
from lfx.runtime.plan import SUFFIX, PlanManifest, decoder_path, json_path
from lfx.runtime.text_files import ListedFolder
from lfx.signature import PAST, PRESENT, QUANTIZED, Signature

COMPUTE_PRECISIONS = ("fp32", "bf16")
_CACHED_DTYPES = ("float32", "float16")
_LARGEST_AXIS = 2**24
_OPENINGS = 3  # of a model that is replaced each time


@dataclass(frozen=True)
class LoadedModel:
    """A model that was loaded into a backend, with its signature and files.

    Attributes:
        path: the bundle, ONNX file or plan; for a repository of the hub, its folder in the hub's cache.
        manifest: None for a single ONNX file.
        around: the bundle that a single ONNX file is in, if any, which has its tokenizer; else None.
        artifact: the files of a bundle or ONNX file; None for a plan.
        kernels: "fused" if lfx's own kernels run all attention nodes, "function" otherwise.
        graphs: the encoder's and the decoder's graph of a model that writes texts, of which `backend` is the first;
            None for other models.
    """

    path: Path
    backend: backends.Backend
    signature: Signature
    manifest: Manifest | PlanManifest | None
    artifact: Artifact | None
    kernels: str
    around: ListedFolder | None = None
    graphs: tuple[backends.TensorBackend, backends.TensorBackend] | None = None


def load_model(
    path: Any, backend: str, provider: str, threads: int | None, precision: str | None, kernels: str = "auto"
) -> LoadedModel:
    """Check a model's files and load it; see `lfx.runtime.Engine` for the arguments.

    Raises:
        InputError: `path` has another type.
        ArtifactError: a file is missing, truncated, changed or no model, or cannot be fetched.
        DependencyError: the backend, provider, precision or kernels are not known, not installed, or cannot run this
            model.
    """
    one_of(backend, "backend", ("auto", *backends.BACKENDS, "tensorrt"), DependencyError)
    one_of(provider, "provider", backends.PROVIDERS, DependencyError)
    if precision is not None:
        one_of(precision, "precision", COMPUTE_PRECISIONS, DependencyError)
    one_of(kernels, "kernels", custom_ops.KERNELS, DependencyError)
    file = local_path(_checked_path(path))
    load = _load_plan if file.suffix == SUFFIX and not file.is_dir() else _load_onnx
    model = _load_unreplaced(file, lambda: load(file, backend, provider, threads, precision, kernels))
    names = ([spec.name for spec in model.signature.inputs], [spec.name for spec in model.signature.outputs])
    if (sorted(model.backend.input_names), model.backend.output_names) != (sorted(names[0]), names[1]):
        raise ArtifactError(f"{file} has other inputs or outputs than its manifest; export it again")
    if "input_ids" not in names[0]:
        raise ArtifactError(f"{file} has no input input_ids; export it again")
    if model.graphs is not None:
        _check_decoder(file, model.signature, model.graphs[1])
    return model


def _load_unreplaced(file: Path, load: Callable[[], LoadedModel]) -> LoadedModel:
    """Load a model; load it again if it is replaced meanwhile, as `lfx export` and `lfx build-engine` do."""
    for _ in range(_OPENINGS):
        before = _stamps(file)
        try:
            model = load()
        except LfxError:
            if _stamps(file) == before:
                raise
            continue
        if _stamps(file) == before:
            return model
    raise ArtifactError(f"{file} was replaced while it was opened, {_OPENINGS} times in a row; open it again")


def _stamps(file: Path) -> list[tuple[int, ...] | None]:
    """Which files a bundle, an ONNX file or a plan consists of now; they change when it is replaced."""
    if file.suffix == SUFFIX and not file.is_dir():
        files = [file, decoder_path(file), json_path(file)]
    else:
        files = [file, file / MANIFEST, file.parent / MANIFEST, file.absolute().parent.parent / MANIFEST]
    return [_stamp(path) for path in files]


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    identity = (status.st_dev, status.st_ino)
    return identity if path.is_dir() else (*identity, status.st_size, status.st_mtime_ns)


def _check_decoder(file: Path, signature: Signature, backend: backends.Backend) -> None:
    """Raise ArtifactError if the decoder's graph is not the one that the signature describes, or does not fit."""
    spec = signature.decoder
    assert spec is not None
    inputs, outputs = [item.name for item in spec.inputs], [item.name for item in spec.outputs]
    if (sorted(backend.input_names), backend.output_names) != (sorted(inputs), outputs):
        raise ArtifactError(
            f"{spec.model_file} of {file} has other inputs or outputs than the signature says; export it again"
        )
    produced = {item.name for item in signature.outputs} | set(outputs)
    cached = [name.replace(PAST, PRESENT, 1) for name in inputs if name.startswith(PAST)]
    if (
        not {"input_ids", "encoder_attention_mask"} <= set(inputs)
        or "logits" not in outputs
        or not set(cached) <= produced
    ):
        raise ArtifactError(f"{spec.model_file} of {file} does not fit the encoder's outputs; export it again")
    logits = next(item for item in spec.outputs if item.name == "logits")
    for item in (logits, *(item for item in spec.inputs if item.name.startswith(PAST))):
        fixed = [logits.shape[-1:]] if item is logits else [item.shape[1:2], item.shape[3:]]
        is_known = item is logits or item.dtype in _CACHED_DTYPES
        if not is_known or not all(_is_size(axes) for axes in fixed):
            raise ArtifactError(
                f"{item.name} of {spec.model_file} of {file} is {shown(item.dtype)} of the shape {shown(item.shape)}, "
                "which no decoder has; export it again"
            )


def _is_size(axes: tuple[int | str, ...]) -> bool:
    """Whether this is one axis of a fixed and plausible size."""
    return len(axes) == 1 and isinstance(axes[0], int) and 1 <= axes[0] < _LARGEST_AXIS


def _load_plan(
    plan: Path, backend: str, provider: str, threads: int | None, precision: str | None, kernels: str
) -> LoadedModel:
    if precision is not None:
        raise DependencyError(f"{plan} is a plan, whose precision is fixed; leave precision out")
    if threads is not None:
        raise DependencyError(f"{plan} is a plan, which runs on the GPU; leave threads out")
    if backend not in ("auto", "tensorrt") or provider != "cpu":
        option = f"backend {backend!r}" if backend not in ("auto", "tensorrt") else f"provider {provider!r}"
        raise DependencyError(f"{option} cannot run {plan}: a plan runs on TensorRT; leave backend and provider out")
    manifest = PlanManifest.read(plan)
    built_with = "fused" if 0 < manifest.attention_nodes == manifest.plugin_layers else "function"
    if kernels not in ("auto", built_with):
        raise DependencyError(
            f"kernels is {kernels!r}, and {plan} was built with {manifest.plugin_layers} plugin layers for "
            f"{manifest.attention_nodes} attention nodes; leave kernels out, or build it again with "
            f"{'--plugin' if kernels == 'fused' else '--no-plugin'}"
        )
    manifest.verify(plan)
    from lfx.runtime.backends.tensorrt import TensorRt, TensorRtDecoder

    loaded = TensorRt(plan, manifest)
    graphs = (loaded, TensorRtDecoder(plan, manifest)) if manifest.decoder_plan is not None else None
    return LoadedModel(plan, loaded, manifest.signature, manifest, None, built_with, graphs=graphs)


def _load_onnx(
    path: Path, backend: str, provider: str, threads: int | None, precision: str | None, kernels: str
) -> LoadedModel:
    artifact = open_artifact(path)
    signature = artifact.signature
    _check_weight_bits(path, signature, provider)
    stored = signature.precision
    if backend == "auto" and (precision is not None or (stored == "bf16" and provider == "cpu")):
        backend = "openvino"  # the only one with a compute precision, and with all bf16 kernels on the CPU
    backend = "onnxruntime" if backend == "auto" else backend
    reason = custom_ops.reason_for_function(backend, provider, stored, artifact.has_attention_nodes)
    if reason and kernels == "fused":
        raise DependencyError(f"kernels is 'fused', and {reason}, or leave kernels out")
    # The reference backend is the onnx package, which refuses files with more than one hard link.
    with artifact.plain_files(unshared=backend == "reference") as model:
        loaded = backends.load(model, backend, provider, threads, precision, stored, "function" if reason else kernels)
        graphs = None
        if signature.decoder is not None:
            decoder = model.with_name(signature.decoder.model_file)
            graphs = (loaded, backends.load(decoder, backend, provider, threads, precision, stored))
    used = loaded.kernels if isinstance(loaded, backends.OnnxRuntime) else "function"
    around = ListedFolder.around(path) if artifact.manifest is None else None
    return LoadedModel(path, loaded, signature, artifact.manifest, artifact, used, around, graphs)


def _check_weight_bits(path: Path, signature: Signature, provider: str) -> None:
    """Raise DependencyError if products with the model's int8 weights overflow on this CPU."""
    if signature.precision == QUANTIZED and signature.weight_bits != 7 and provider == "cpu" and int8_overflows():
        raise DependencyError(
            f"{path} has int8 weights of 8 bits, which overflow on this CPU without VNNI; quantize it again without "
            "--full-range"
        )


def _checked_path(path: Any) -> Path:
    if not isinstance(path, str | Path):
        raise InputError(f"path is {type(path).__name__}; give the path of a bundle, an .onnx file or a plan")
    if path == "":
        raise ArtifactError("path is empty; give the path of a bundle, made with: lfx export")
    return file_path(path, "path", ArtifactError)
