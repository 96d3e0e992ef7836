"""`relayout`: write a bundle in the layout that other clients of the hub read.

    config.json, tokenizer.json, …, modules.json     as in the bundle
    onnx/model.onnx, onnx/model.onnx_data            float32; _fp16 and _quantized (int8) beside it
    lfx.json                                         with `model_file` onnx/model.onnx: `Engine` opens the folder

These clients feed input_ids and attention_mask alone and read standard ops alone. So the functions are inlined, and
the global tokens are fixed by the rule of the task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.checks import file_path, flag, json_text, one_of
from lfx.errors import ExportError, ParityError
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.checkpoint import Fetch
from lfx.export.layout_models import ENDINGS, file_name, static_mode, write_models
from lfx.export.options import check_progress
from lfx.export.sentence_folder import MODULES, copy_weights, has_weights, read_modules
from lfx.export.settings import read_object
from lfx.files import is_same
from lfx.manifest import LAYOUT_FOLDER, Manifest
from lfx.parity import Case, OutputResult, quick_cases
from lfx.runtime import Engine
from lfx.runtime.artifact import Artifact, check_bundle, unchanged
from lfx.runtime.runner import model_inputs, outputs_runner, with_text
from lfx.runtime.text_files import CONFIG, TOKENIZER_CONFIG
from lfx.signature import QUANTIZED, SENTENCE_EMBEDDING

LAYOUTS = ("lfx", "hf")
MODEL_TYPES = ("longformer", "roberta", "bart")
# Keys of config.json that may differ between bundles which compute the same.
_NOT_COMPUTED = {
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "num_hidden_layers",  # the weights say it; for an LED, transformers before 5.20 writes it and others do not
    "transformers_version",
    "transformers.js_config",
}

Progress = Callable[[str], None]


def relayout(
    bundle: str | Path,
    output: str | Path | None = None,
    *,
    others: Sequence[str | Path] = (),
    model_type: str | None = None,
    external_data: bool | None = None,
    progress: Progress = lambda step: None,
) -> Path:
    """Write a bundle in the layout of the hub, for transformers.js, optimum, sentence-transformers and others.

    Args:
        bundle: an fp32, fp16 or int8 bundle. Its global tokens become those of its task's default, which must be the
            first token or none.
        output: the new folder; default: the bundle's name with -hf, in the current folder.
        others: bundles of the same checkpoint in other precisions, which are written beside the first.
        model_type: written into config.json in place of its own. transformers.js has no classification for
            "longformer", and runs these models as "roberta"; it has no "led", and runs these models as "bart".
        external_data: write the weights of each model to a file of their own, model.onnx_data. Default: from 2 GB on,
            which one file cannot hold.
        progress: called with the name of each step.
    Returns:
        The new folder, which `Engine` opens too.
    Raises:
        ArtifactError: a path is no bundle, or a bundle is broken.
        ExportError: the global tokens depend on the input, a bundle does not belong to the first, or an option cannot
            be used.
        ParityError: a written model does not give the bundle's outputs.
    """
    folder = file_path(bundle, "bundle", ExportError)
    if not isinstance(others, Sequence) or isinstance(others, str | bytes):
        raise ExportError(f"others is {type(others).__name__}; give a list of bundles")
    folders = [folder, *(file_path(other, f"others[{i}]", ExportError) for i, other in enumerate(others))]
    check_options(model_type)
    if external_data is not None:
        flag(external_data, "external_data", ExportError)
    check_progress(progress)
    target = Path(f"{folder.resolve().name}-hf") if output is None else file_path(output, "output", ExportError)
    check_target(target)
    if any(is_same(target, path) for path in folders):
        raise ExportError(f"{target} is a bundle that is read, which would be lost; give another output")
    manifests = [Manifest.read(path) for path in folders]
    check_space(target, sum(entry["bytes"] for manifest in manifests for entry in manifest.files.values()))
    with atomic_folder(target) as new, contextlib.ExitStack() as checks:
        for path, manifest in zip(folders, manifests, strict=True):
            checks.enter_context(unchanged(path, manifest))
        write_layout(folders, new, model_type=model_type, in_own_file=external_data, progress=progress)
    return target


def check_options(model_type: Any) -> None:
    """Check the options of the layout.

    Raises:
        ExportError: one is not known.
    """
    if model_type is not None:
        one_of(model_type, "model_type", MODEL_TYPES, ExportError)


def write_layout(
    bundles: Sequence[Path],
    folder: Path,
    *,
    model_type: str | None,
    in_own_file: bool | None,
    fetch: Fetch | None = None,
    progress: Progress,
) -> None:
    """Write bundles of one checkpoint to an empty folder, in the layout of the hub.

    Args:
        fetch: of the checkpoint, from which the weights of modules of sentence-transformers are copied.
        in_own_file: whether the weights are written to files of their own; None = from 2 GB on.
    Raises:
        ArtifactError, ExportError, ParityError: see `relayout`.
    """
    progress("checking the bundle")
    artifacts = [check_bundle(bundle, Manifest.read(bundle)) for bundle in bundles]
    _check_together(artifacts)
    names = {}
    (folder / LAYOUT_FOLDER).mkdir()
    for artifact in artifacts:
        name = file_name(artifact.signature)
        progress(f"writing {name}")
        names[name] = write_models(artifact, folder / LAYOUT_FOLDER / name, in_own_file)
        progress(f"comparing {name} with its bundle")
        _compare(artifact, folder / LAYOUT_FOLDER / name)
    finest = min(artifacts, key=lambda artifact: list(ENDINGS).index(artifact.signature.precision))
    for artifact in artifacts:
        if artifact is not finest:
            _compare_two(artifact, finest, folder / LAYOUT_FOLDER)
    manifest, name = artifacts[0].manifest, file_name(artifacts[0].signature)
    assert manifest is not None
    _copy_files(artifacts[0], folder, fetch)
    graphs = folder / LAYOUT_FOLDER
    files = sorted(path.name for path in graphs.glob("*.onnx"))
    _edit_config(folder / CONFIG, model_type, [file for file in files if _has_data(graphs / file)])
    _edit_tokenizer(folder / TOKENIZER_CONFIG)
    for bundle in bundles:
        if folder in bundle.parents:  # the bundle that `export` wrote first, inside the folder
            shutil.rmtree(bundle)
    model_file = f"{LAYOUT_FOLDER}/{name}"
    dataclasses.replace(manifest, signature=names[name], inlined=True, model_file=model_file).write(folder)


def _check_together(artifacts: Sequence[Artifact]) -> None:
    first = artifacts[0].manifest
    assert first is not None
    precisions: set[str] = set()
    for artifact in artifacts:
        manifest, precision = artifact.manifest, artifact.signature.precision
        assert manifest is not None
        if precision not in ENDINGS:
            raise ExportError(f"{artifact.bundle} is {precision}, which no client of the layout hf runs; give fp32")
        if precision in precisions:
            raise ExportError(f"two bundles are {precision}; give one of each precision")
        precisions.add(precision)
        if artifact.signature.output_attentions:
            raise ExportError(f"{artifact.bundle} has attention outputs; export it without --output-attentions")
        if (manifest.source.get("sha256"), manifest.signature.task) != (
            first.source.get("sha256"),
            first.signature.task,
        ):
            raise ExportError(
                f"{artifact.bundle} was made from another checkpoint, or for another task, than {artifacts[0].bundle}; "
                "give bundles of one checkpoint"
            )
        if _options(manifest) != _options(first):
            raise ExportError(
                f"{artifact.bundle} was exported with another --global-attention or --pooling than "
                f"{artifacts[0].bundle}; give bundles that compute the same"
            )
        if differing := _settings(artifact).items() ^ _settings(artifacts[0]).items():
            raise ExportError(
                f"{artifact.bundle} was exported with another {min(differing)[0]} than {artifacts[0].bundle}; export "
                "both from the same files"
            )


def _settings(artifact: Artifact) -> dict[str, str]:
    """Return what config.json says, by key, and the digest of each settings file of sentence-transformers."""
    assert artifact.bundle is not None
    assert artifact.manifest is not None
    files = artifact.manifest.files
    settings = {name: files[name]["sha256"] for name in files if name == MODULES or name.endswith(f"/{CONFIG}")}
    config = read_object(artifact.bundle / CONFIG) if CONFIG in files else {}
    return {**settings, **{f"{CONFIG}: {key}": json_text(config[key]) for key in config.keys() - _NOT_COMPUTED}}


def _options(manifest: Manifest) -> tuple[str, Any]:
    return static_mode(manifest.signature), manifest.source.get("pooling")


def _compare(artifact: Artifact, path: Path) -> None:
    """Check that a written model gives the outputs of its bundle, within the tolerance that the bundle was held to.

    Raises:
        ParityError: it does not.
    """
    measured = _measured(artifact)
    # Both by the functions: on some inputs the rounding of lfx's kernels differs from theirs by more than the limit.
    old_engine = Engine(artifact.path, "onnxruntime", kernels="function")
    with old_engine as old, Engine(path, "onnxruntime") as new:
        windows, longest = new.signature.attention_windows, new.signature.max_seqlen
        for case in quick_cases(max(windows), longest):
            inputs = with_text(case, model_inputs(case, new.signature), new.signature)
            expected, actual = outputs_runner(old)(inputs), outputs_runner(new)(inputs)
            if new.signature.task == SENTENCE_EMBEDDING:
                expected.pop("last_hidden_state", None)  # of a bundle that has the layout already; not measured
            if new.signature.decoder is not None:  # whose keys and values of cross-attention the decoder makes
                expected = {name: array for name, array in expected.items() if name in actual}
            if missing := expected.keys() - measured.keys():
                raise ExportError(f"{artifact.bundle} has no measured error of {min(missing)}; make it again")
            for name, array in expected.items():
                error, limit = _difference(actual[name], array, case), measured[name]["tolerance"]
                if not error <= limit:
                    raise ParityError(
                        f"{path.name}: {name} differs from the bundle's by {error:.3g}, above the tolerance "
                        f"{limit:.3g}, at {case}; please report this"
                    )


def _compare_two(artifact: Artifact, finest: Artifact, folder: Path) -> None:
    """Check that a written model computes what that of the finest precision does, within twice the tolerances of both.

    Weights and config.json do not say it of a module in memory, nor of everything that sentence-transformers reads.
    Tolerances of int8 are of text: on random ids only the shapes are compared.

    Raises:
        ExportError: it does not.
    """
    tolerances = [{} if one.signature.precision == QUANTIZED else _measured(one) for one in (artifact, finest)]
    paths = [folder / file_name(one.signature) for one in (artifact, finest)]
    with Engine(paths[0], "onnxruntime") as own, Engine(paths[1], "onnxruntime") as other:
        longest = min((one.signature.max_seqlen for one in (own, other) if one.signature.max_seqlen), default=None)
        for case in quick_cases(max(other.signature.attention_windows), longest):
            inputs = with_text(case, model_inputs(case, other.signature), other.signature)
            actual, expected = outputs_runner(own)(inputs), outputs_runner(other)(inputs)
            for name in sorted(actual.keys() | expected.keys()):
                limit = 2 * sum(of[name]["tolerance"] if name in of else math.inf for of in tolerances)
                is_same = name in actual and name in expected and actual[name].shape == expected[name].shape
                is_float = is_same and expected[name].dtype.kind == "f"
                if not is_same or (is_float and _difference(actual[name], expected[name], case) > limit):
                    raise ExportError(
                        f"{artifact.bundle} computes another {name} than {finest.bundle}; give bundles of one model"
                    )


def _measured(artifact: Artifact) -> dict[str, Any]:
    """Return the error and the tolerance of each output that export or `quantize` has measured."""
    assert artifact.manifest is not None
    if artifact.manifest.quantization:
        return dict(artifact.manifest.quantization.get("accuracy", {}).get("outputs", {}))
    return dict(artifact.manifest.validation.get("outputs", {}))


def _difference(actual: NDArray[Any], expected: NDArray[Any], case: Case) -> float:
    """The largest error, as validation counts it; for outputs that are not floats, infinity if any number differs."""
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(actual, expected) else math.inf
    return OutputResult().add(case, expected, expected, actual).error


def _copy_files(artifact: Artifact, folder: Path, fetch: Fetch | None) -> None:
    """Copy every file of a bundle but the model, and the weights of sentence-transformers' modules."""
    bundle, manifest = artifact.bundle, artifact.manifest
    assert bundle is not None and manifest is not None
    model = Path(manifest.model_file)
    left_out = {manifest.model_file, *((model.parent / name).as_posix() for name in artifact.files)}
    for name in manifest.files:
        if name not in left_out and not name.startswith(f"{LAYOUT_FOLDER}/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / name, folder / name)
    if not (folder / MODULES).exists():
        return
    modules = read_modules(folder / MODULES)
    if fetch is not None:
        for module in modules[1:]:
            copy_weights(fetch, folder, module["path"])
    elif without := [module["path"] for module in modules[1:] if has_weights(module)]:
        raise ExportError(
            f"{bundle} does not have the weights of {without[0]}, which sentence-transformers loads; use lfx export "
            "--layout hf with the checkpoint"
        )


def _has_data(path: Path) -> bool:
    return path.with_name(f"{path.name}_data").exists()


def _edit_config(path: Path, model_type: str | None, with_data: Sequence[str]) -> None:
    """Set the model's type, and tell transformers.js which ONNX files have their weights in another file."""
    if not path.exists():
        if model_type is not None:
            raise ExportError("the bundle has no config.json, in which model_type would be written; leave it out")
        return
    settings = read_object(path)
    if model_type is not None:
        settings["model_type"] = model_type
    if with_data:
        settings["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(with_data, 1)}
    path.write_text(json_text(settings, indent=2) + "\n", encoding="utf-8")


def _edit_tokenizer(path: Path) -> None:
    """Name a class of tokenizer that transformers 4 knows too."""
    if not path.exists():
        return
    settings = read_object(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json_text(settings, indent=2) + "\n", encoding="utf-8")
