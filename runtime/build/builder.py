"""`build_engine`: an ONNX bundle in, a TensorRT plan out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lfx.checks import file_path, flag, one_of, output_file, shown, whole_number
from lfx.errors import BuildError, LfxError, require
from lfx.files import is_disk_full, private_folder, temporary_folder, why_unwritten
from lfx.machine import package_versions
from lfx.manifest import MANIFEST, MODEL, Manifest, locate, sha256
from lfx.runtime import plugin as plugins
from lfx.runtime.artifact import check_bundle
from lfx.runtime.build.check_graph import check_conversion
from lfx.runtime.build.launch import run_tensorrt
from lfx.runtime.flavor import FLAVORS, choose_flavor
from lfx.runtime.plan import SUFFIX, PlanManifest, json_path, publish
from lfx.runtime.profile import Profile, Range, profiles
from lfx.signature import PRECISIONS, Signature

Progress = Callable[[str], None]


MAX_SLOTS = 3840  # of TensorRT's TopK
OLDEST_PLUGIN_TARGET = 80
_CURE = "choose another --output"


@dataclass(frozen=True)
class Options:
    """What is passed to TensorRT as it is.

    Attributes:
        timing_cache: read if it is there, and written after the build.
        workspace_bytes: most device memory that a layer may take for scratch; None = all there is.
        optimization_level: 0 to 5; None = TensorRT's own default.
        version_compatible: the plan runs with later TensorRT versions of the same major one.
        refit: weights can be exchanged in the plan.
    """

    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    refit: bool = False

    def flags(self) -> list[str]:
        """Names of TensorRT's builder flags."""
        return ["VERSION_COMPATIBLE"] * self.version_compatible + ["REFIT"] * self.refit


def build_engine(
    bundle: str | Path,
    output: str | Path | None = None,
    *,
    precision: str | None = None,
    batch: Sequence[str | int] = ("1:1:8",),
    seqlen: Sequence[str | int] | None = None,
    max_global: str | int | None = None,
    flavor: str | None = None,
    target: str | None = None,
    plugin: bool = True,
    options: Options | None = None,
    progress: Progress = lambda step: None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Path:
    """Build a TensorRT plan from an ONNX bundle.

    Args:
        bundle: the folder that `lfx export` wrote.
        output: the plan; default: the bundle's name with .plan, in the current folder. Its JSON stands beside it.
        precision: fp32, fp16 or bf16; default: the bundle's. A float32 bundle is converted, strongly typed, and the
            conversion is checked against the bundle before anything is built.
        batch, seqlen: MIN:OPT:MAX or one number; one optimization profile for each entry. seqlen defaults to all that
            the model takes, tuned for the longest.
        max_global: global slots of a row, the MAX where MIN:OPT:MAX is given; default: what the bundle was exported
            with, or 64. TensorRT needs it constant; fewer slots are faster, and more global tokens are refused.
        flavor: "tensorrt" or "tensorrt-rtx"; default: the one that is installed, "tensorrt" first.
        target: compute capability to build for, such as "sm89", without a GPU; TensorRT-RTX only.
        plugin: attention by the lfx plugin; False builds it from the ops' function bodies.
        progress: called with the name of each step.
        log: called with each warning and error of TensorRT's.
    Returns:
        The plan's path.
    Raises:
        ArtifactError: no bundle, or a broken one.
        BuildError: an option that does not fit, a conversion that is not accurate, TensorRT's own refusal, or a place
            that cannot be written.
        PluginError: the plugin library is not installed, or cannot take this model.
        DependencyError: no TensorRT is installed.
        LfxError: there is no temporary folder.
    """
    folder, _ = locate(file_path(bundle, "bundle", BuildError))
    if folder is None:
        raise BuildError(f"{bundle} is a file without its bundle; give the folder that lfx export wrote")
    manifest = Manifest.read(folder)
    chosen = choose_flavor(flavor)
    options = options if options is not None else Options()
    _check_target(chosen, target, flag(plugin, "plugin", BuildError))
    _check_options(chosen, options)
    slots = _slots(max_global, manifest.signature)
    # The function body scatters the slots into the sequence, which TensorRT does not do with fewer tokens than slots.
    shortest = 1 if plugin else max(slots - 1, 1)
    lengths = seqlen if seqlen is not None else (_whole(manifest.signature, shortest),)
    ranges = profiles(batch, lengths, manifest.signature)
    if any(p.seqlen.min < shortest for p in ranges):
        raise BuildError(
            f"without the plugin, {slots} global slots need sequences of {shortest} tokens at least; give "
            "--seqlen from there, or a smaller --max-global"
        )
    library = plugins.library() if plugin else None
    path = _output(output if output is not None else folder.resolve().name + SUFFIX)
    signature = _signature(manifest.signature, precision, slots, ranges)
    if manifest.quantization.get("activations", "int8") != "int8":
        raise BuildError(
            f"{bundle} has {manifest.quantization['activations']} activations, and TensorRT takes int8; make it again "
            "with: lfx quantize --activations int8"
        )
    progress("checking the bundle")
    artifact = check_bundle(folder, manifest)
    try:
        with (
            artifact.plain_files(unshared=True) as source,  # the onnx-ir package refuses hard links
            temporary_folder("build-engine") as scratch,
            private_folder(path.absolute().parent, path.name) as private,
        ):
            model, built = scratch / MODEL, private / path.name
            progress("preparing the graph")
            require("onnx_ir", "rtx")
            from lfx.runtime.build.prepare_graph import prepare_graph

            nodes = prepare_graph(source, model, manifest, signature, slots, plugin)
            conversion = check_conversion(folder, manifest, model, signature, progress, log)
            job = {
                "module": FLAVORS[chosen].module,
                "extra": FLAVORS[chosen].extra,
                "onnx": str(model),
                "plan": str(built),
                "plugin": str(library) if library is not None else None,
                "target": target,
                "profiles": [{t.name: p.shapes(t) for t in signature.inputs} for p in ranges],
                "workspace_bytes": options.workspace_bytes,
                "optimization_level": options.optimization_level,
                "timing_cache": str(Path(options.timing_cache).absolute()) if options.timing_cache else None,
                "flags": options.flags(),
            }
            result = run_tensorrt(job, scratch, progress, log)
            if plugin and result["plugin_layers"] != nodes:
                raise BuildError(
                    f"only {result['plugin_layers']} of {nodes} attention nodes became plugin layers; please report "
                    "this"
                )
            PlanManifest(
                signature=signature,
                flavor=chosen,
                tensorrt_version=result["tensorrt_version"],
                target=target or _local_target(),
                profiles=ranges,
                plugin_version=plugins.VERSION if plugin else None,
                attention_nodes=nodes,
                plugin_layers=result["plugin_layers"],
                bundle={"name": folder.resolve().name, "sha256": sha256(folder / MANIFEST)},
                source=manifest.source,
                quantization=manifest.quantization,
                options={name: job[name] for name in ("workspace_bytes", "optimization_level", "flags")},
                versions=package_versions(("onnx", "onnx-ir", "onnxruntime", "numpy")),
                conversion=conversion,
                plan={"sha256": sha256(built), "bytes": built.stat().st_size},
            ).write(built)
            publish(built, path)
    except OSError as error:
        raise BuildError(why_unwritten(path, error, _CURE)) from error
    except LfxError as error:
        if not is_disk_full(error):
            raise
        raise BuildError(why_unwritten(path, error, f"{_CURE}, or a temporary folder with room by TMPDIR")) from error
    return path


def _check_target(flavor: str, target: str | None, plugin: bool) -> None:
    if target is None:
        if not _local_target():
            raise BuildError(
                "this machine has no NVIDIA GPU to build for; build ahead of time with: "
                "--flavor tensorrt-rtx --target sm89 (or another compute capability)"
            )
        return
    if flavor != "tensorrt-rtx":
        raise BuildError(f"--target {shown(target)} is TensorRT-RTX's; {flavor} builds for the GPU of this machine")
    if not isinstance(target, str) or not re.fullmatch("sm[0-9]{1,4}", target):
        raise BuildError(f"--target {shown(target)} is no compute capability; give one such as sm86, sm89 or sm120")
    if plugin and int(target[2:]) < OLDEST_PLUGIN_TARGET:
        raise BuildError(
            f"--target {target} is older than the plugin's kernels, which begin at sm{OLDEST_PLUGIN_TARGET}; build "
            "with --no-plugin"
        )


def _local_target() -> str:
    """Compute capability of the first GPU, such as "sm90"; empty where there is none."""
    from lfx.runtime.device import compute_capability

    return compute_capability() or ""


def _slots(asked: str | int | None, signature: Signature) -> int:
    fixed = 1 if signature.global_attention != "mask" else signature.max_global
    if asked is None:
        return fixed if fixed is not None else min(64, signature.max_seqlen or 64)
    slots = Range.parse(asked, "--max-global").max
    if fixed is not None and slots != fixed:
        raise BuildError(f"--max-global {asked} does not fit: the bundle was exported with {fixed}; leave it out")
    most = min(MAX_SLOTS, signature.max_seqlen or MAX_SLOTS)
    if slots > most:
        raise BuildError(
            f"--max-global {asked} is above {most}, the most that this model and TensorRT take; give fewer"
        )
    return slots


def _whole(signature: Signature, shortest: int) -> str:
    longest = signature.max_seqlen or 4096
    return f"{min(shortest, longest)}:{longest}:{longest}"


def _check_options(flavor: str, options: Options) -> None:
    """Check their types; TensorRT-RTX has its own names for two, and ignores the one and fails over the other."""
    if not isinstance(options, Options):
        raise BuildError(f"options is {shown(options)}; give lfx.runtime.build.Options")
    flag(options.version_compatible, "version_compatible", BuildError)
    flag(options.refit, "refit", BuildError)
    if options.workspace_bytes is not None:
        whole_number(options.workspace_bytes, "workspace_bytes", 1, 2**63 - 1, BuildError)
    if options.optimization_level is not None:
        whole_number(options.optimization_level, "optimization_level", 0, 5, BuildError)
    if flavor == "tensorrt-rtx" and (options.timing_cache is not None or options.version_compatible):
        asked = "--timing-cache" if options.timing_cache is not None else "--version-compatible"
        raise BuildError(f"{asked} is TensorRT's; TensorRT-RTX has no such thing: leave it out")
    if options.timing_cache is not None:
        output_file(options.timing_cache, "--timing-cache", BuildError)


def _output(asked: str | Path) -> Path:
    path = output_file(asked, "--output", BuildError)
    if path.suffix != SUFFIX:
        raise BuildError(f"{path} is no name for a plan; end it with {SUFFIX}")
    output_file(json_path(path), "--output", BuildError)
    return path


def _signature(source: Signature, precision: str | None, slots: int, ranges: Sequence[Profile]) -> Signature:
    wanted = one_of(precision, "precision", PRECISIONS, BuildError) if precision is not None else source.precision
    if source.precision not in (wanted, "fp32"):
        raise BuildError(
            f"the bundle is {source.precision}; {wanted} is converted from an fp32 bundle: export it again"
        )
    return replace(
        source,
        precision=wanted,
        max_seqlen=max(p.seqlen.max for p in ranges),
        max_global=slots if source.global_attention == "mask" else None,
    )
