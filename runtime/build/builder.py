"""`build_engine` builds a TensorRT plan from an ONNX bundle."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

MAX_SLOTS = 3840  # limit of K of TensorRT's TopK
OLDEST_PLUGIN_TARGET = 80  # compute capability of the plugin's oldest kernels
_CURE = "choose another --output"


@dataclass(frozen=True)
class Options:
    """Options that are passed to TensorRT unchanged.

    Attributes:
        timing_cache: path of a timing cache; read if it exists, and written after the build. TensorRT only.
        workspace_bytes: limit of the device memory that a layer may use as workspace, 1 or more; None = no limit.
        optimization_level: builder optimization level, 0 to 5; None = TensorRT's default.
        version_compatible: whether the plan runs with later TensorRT versions of the same major version. TensorRT only.
        refit: whether the weights of the plan can be replaced.
        float16_outputs: whether the outputs of a plan in fp16 are float16, of which half as many bytes are copied to
            the host as of float32.
    """

    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    refit: bool = False
    float16_outputs: bool = False

    def flags(self) -> list[str]:
        """Names of the TensorRT BuilderFlags of these options."""
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
        output: path of the plan, with the suffix .plan; its JSON is written beside it. Default: the bundle's name with
            .plan, in the current folder.
        precision: "fp32", "fp16" or "bf16". Only an fp32 bundle can be converted to another precision: its graph
            becomes strongly typed, and its outputs are compared with the bundle's before the build. Default: the
            bundle's.
        batch, seqlen: lists of MIN:OPT:MAX or numbers, one entry for each optimization profile; a single entry is used
            for all. Default: batch 1:1:8, and all lengths that the model takes, tuned for the longest.
        max_global: number of global slots of a sequence, 1 or more; MIN:OPT:MAX counts as MAX. TensorRT needs a
            constant; fewer slots are faster, and a sequence with more global tokens is refused. Default: the number
            that the bundle was exported with, else 64.
        flavor: "tensorrt" or "tensorrt-rtx". Default: the installed one, "tensorrt" if both are.
        target: compute capability to build for without a GPU, such as "sm89"; TensorRT-RTX only. Default: that of the
            first GPU.
        plugin: whether the lfx plugin computes attention. If False, TensorRT builds it from the ops' function bodies.
        options: further options for TensorRT. Default: `Options()`.
        progress: called with the name of each step.
        log: called with each warning and error of TensorRT. Default: prints it to stderr.
    Returns:
        The path of the plan.
    Raises:
        ArtifactError: the bundle does not exist or is broken.
        BuildError: an option is not supported, the converted graph is not accurate, TensorRT fails, or the plan cannot
            be written.
        PluginError: the plugin library is not installed.
        DependencyError: TensorRT is not installed.
        LfxError: there is no temporary folder.
    """
    arguments = _checked(bundle, output, precision, batch, seqlen, max_global, flavor, target, plugin, options)
    progress("checking the bundle")
    artifact = check_bundle(arguments.bundle, arguments.manifest)
    path = arguments.output
    try:
        with (
            artifact.plain_files(unshared=True) as source,  # the onnx-ir package refuses hard links
            temporary_folder("build-engine") as scratch,
            private_folder(path.absolute().parent, path.name) as private,
        ):
            built = private / path.name
            _build_plan(arguments, source, scratch, built, progress, log)
            publish(built, path)
    except OSError as error:
        raise BuildError(why_unwritten(path, error, _CURE)) from error
    except LfxError as error:
        if not is_disk_full(error):
            raise
        raise BuildError(why_unwritten(path, error, f"{_CURE}, or set TMPDIR to a folder with room")) from error
    return path


@dataclass(frozen=True)
class _Arguments:
    """The checked arguments of `build_engine`."""

    bundle: Path
    manifest: Manifest
    signature: Signature  # the plan's
    slots: int
    profiles: tuple[Profile, ...]
    flavor: str
    target: str | None
    library: Path | None  # the plugin library; None builds attention from the function bodies
    options: Options
    output: Path


def _checked(
    bundle: str | Path,
    output: str | Path | None,
    precision: str | None,
    batch: Sequence[str | int],
    seqlen: Sequence[str | int] | None,
    max_global: str | int | None,
    flavor: str | None,
    target: str | None,
    plugin: bool,
    options: Options | None,
) -> _Arguments:
    """Check the arguments of `build_engine`, and fill in their defaults."""
    folder, _ = locate(file_path(bundle, "bundle", BuildError))
    if folder is None:
        raise BuildError(f"{bundle} is a file without its bundle; give the folder that lfx export wrote")
    manifest = Manifest.read(folder)
    if manifest.signature.output_attentions:
        raise BuildError(
            f"{bundle} has attention outputs, whose size depends on the number of global tokens, and TensorRT needs it "
            "constant; export it without --output-attentions"
        )
    flavor_name = choose_flavor(flavor)
    options = options if options is not None else Options()
    _check_target(flavor_name, target, flag(plugin, "plugin", BuildError))
    _check_options(flavor_name, options)
    slots = _slots(max_global, manifest.signature)
    ranges = _profiles(batch, seqlen, slots, plugin, manifest.signature)
    path = _output(output if output is not None else folder.resolve().name + SUFFIX)
    signature = _signature(manifest.signature, precision, slots, ranges, float16_outputs=options.float16_outputs)
    if signature.adds_globals and slots < (signature.max_seqlen or slots):
        raise BuildError(
            f"{bundle} gives tokens global attention by a rule of its own, and TensorRT needs their number constant: "
            f"{slots} slots may be too few for {signature.max_seqlen} tokens; give a --max-global of the longest "
            "--seqlen, or run the bundle itself"
        )
    if manifest.quantization.get("activations", "int8") != "int8":
        raise BuildError(
            f"{bundle} has {manifest.quantization['activations']} activations, and TensorRT takes int8; make it again "
            "with: lfx quantize --activations int8"
        )
    library = plugins.library() if plugin else None
    return _Arguments(folder, manifest, signature, slots, ranges, flavor_name, target, library, options, path)


def _profiles(
    batch: Sequence[str | int], seqlen: Sequence[str | int] | None, slots: int, plugin: bool, signature: Signature
) -> tuple[Profile, ...]:
    """The optimization profiles of the plan, from the options --batch and --seqlen."""
    # The function body scatters the slots into the sequence, for which TensorRT needs at least slots - 1 tokens.
    shortest = 1 if plugin else max(slots - 1, 1)
    ranges = profiles(batch, seqlen if seqlen is not None else (_default_seqlen(signature, shortest),), signature)
    if any(profile.seqlen.min < shortest for profile in ranges):
        raise BuildError(
            f"without the plugin, {slots} global slots need sequences of at least {shortest} tokens; give a larger MIN "
            "of --seqlen, or a smaller --max-global"
        )
    return ranges


def _build_plan(
    arguments: _Arguments, source: Path, scratch: Path, plan: Path, progress: Progress, log: Callable[[str], None]
) -> None:
    """Prepare and check the graph, build the plan, and write both the plan and its JSON.

    Args:
        source: the bundle's ONNX file. scratch: a temporary folder. plan: path of the plan.
    """
    progress("preparing the graph")
    require("onnx_ir", "rtx")
    from lfx.runtime.build.prepare_graph import prepare_graph

    model, plugin = scratch / MODEL, arguments.library is not None
    nodes = prepare_graph(source, model, arguments.manifest, arguments.signature, arguments.slots, plugin)
    conversion = check_conversion(arguments.bundle, arguments.manifest, model, arguments.signature, progress, log)
    job = _job(arguments, model, plan)
    result = run_tensorrt(job, scratch, progress, log)
    if plugin and result["plugin_layers"] != nodes:
        raise BuildError(
            f"only {result['plugin_layers']} of {nodes} attention nodes became plugin layers; please report this"
        )
    PlanManifest(
        signature=arguments.signature,
        flavor=arguments.flavor,
        tensorrt_version=result["tensorrt_version"],
        target=arguments.target or _local_target(),
        profiles=arguments.profiles,
        plugin_version=plugins.VERSION if plugin else None,
        attention_nodes=nodes,
        plugin_layers=result["plugin_layers"],
        bundle={"name": arguments.bundle.resolve().name, "sha256": sha256(arguments.bundle / MANIFEST)},
        source=arguments.manifest.source,
        quantization=arguments.manifest.quantization,
        options={name: job[name] for name in ("workspace_bytes", "optimization_level", "flags")},
        versions=package_versions(("onnx", "onnx-ir", "onnxruntime", "numpy")),
        conversion=conversion,
        plan={"sha256": sha256(plan), "bytes": plan.stat().st_size},
    ).write(plan)


def _job(arguments: _Arguments, model: Path, plan: Path) -> dict[str, Any]:
    """The job of `trt_process`, as JSON types."""
    options = arguments.options
    return {
        "module": FLAVORS[arguments.flavor].module,
        "extra": FLAVORS[arguments.flavor].extra,
        "onnx": str(model),
        "plan": str(plan),
        "plugin": str(arguments.library) if arguments.library is not None else None,
        "target": arguments.target,
        "profiles": [
            {spec.name: profile.shapes(spec) for spec in arguments.signature.inputs} for profile in arguments.profiles
        ],
        "workspace_bytes": options.workspace_bytes,
        "optimization_level": options.optimization_level,
        "timing_cache": str(Path(options.timing_cache).absolute()) if options.timing_cache else None,
        "flags": options.flags(),
    }


def _check_target(flavor: str, target: str | None, plugin: bool) -> None:
    if target is None:
        if not _local_target():
            raise BuildError(
                "this machine has no NVIDIA GPU to build for; build ahead of time with: "
                "--flavor tensorrt-rtx --target sm89 (or another compute capability)"
            )
        return
    if flavor != "tensorrt-rtx":
        raise BuildError(
            f"--target {shown(target)} is an option of TensorRT-RTX; {flavor} builds for the GPU of this machine"
        )
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


def _slots(requested: str | int | None, signature: Signature) -> int:
    """Number of global slots of the plan, from the option --max-global."""
    fixed = 1 if signature.global_attention != "mask" else signature.max_global
    if requested is None:
        return fixed if fixed is not None else min(64, signature.max_seqlen or 64)
    slots = Range.parse(requested, "--max-global").max
    if fixed is not None and slots != fixed:
        raise BuildError(f"--max-global {requested} does not fit: the bundle was exported with {fixed}; leave it out")
    limit = min(MAX_SLOTS, signature.max_seqlen or MAX_SLOTS)
    if slots > limit:
        raise BuildError(
            f"--max-global {requested} is above {limit}, the most that this model and TensorRT take; give fewer"
        )
    return slots


def _default_seqlen(signature: Signature, shortest: int) -> str:
    """All lengths that the model takes, as MIN:OPT:MAX."""
    longest = signature.max_seqlen or 4096
    return f"{min(shortest, longest)}:{longest}:{longest}"


def _check_options(flavor: str, options: Options) -> None:
    """Check types and ranges; refuse two options for TensorRT-RTX, which ignores one and fails on the other."""
    if not isinstance(options, Options):
        raise BuildError(f"options is {shown(options)}; give lfx.runtime.build.Options")
    flag(options.version_compatible, "version_compatible", BuildError)
    flag(options.refit, "refit", BuildError)
    flag(options.float16_outputs, "float16_outputs", BuildError)
    if options.workspace_bytes is not None:
        whole_number(options.workspace_bytes, "workspace_bytes", 1, 2**63 - 1, BuildError)
    if options.optimization_level is not None:
        whole_number(options.optimization_level, "optimization_level", 0, 5, BuildError)
    if flavor == "tensorrt-rtx" and (options.timing_cache is not None or options.version_compatible):
        option = "--timing-cache" if options.timing_cache is not None else "--version-compatible"
        raise BuildError(f"{option} is an option of TensorRT, and TensorRT-RTX has no such option; leave it out")
    if options.timing_cache is not None:
        output_file(options.timing_cache, "--timing-cache", BuildError)


def _output(output: str | Path) -> Path:
    """The path of the plan, from the option --output; its JSON must be writable too."""
    path = output_file(output, "--output", BuildError)
    if path.suffix != SUFFIX:
        raise BuildError(f"{path} is not the name of a plan; give one that ends with {SUFFIX}")
    output_file(json_path(path), "--output", BuildError)
    return path


def _signature(
    source: Signature, precision: str | None, slots: int, ranges: Sequence[Profile], *, float16_outputs: bool
) -> Signature:
    """The signature of the plan, from the bundle's."""
    target = one_of(precision, "precision", PRECISIONS, BuildError) if precision is not None else source.precision
    if source.precision not in (target, "fp32"):
        raise BuildError(
            f"the bundle is {source.precision}; {target} is converted from an fp32 bundle: export it again"
        )
    if float16_outputs and target != "fp16":
        raise BuildError(f"--float16-outputs is for a plan in fp16, and this one is {target}; add --fp16")
    dtypes = {"float32": "float16"} if float16_outputs else {}
    return replace(
        source,
        precision=target,
        outputs=tuple(replace(spec, dtype=dtypes.get(spec.dtype, spec.dtype)) for spec in source.outputs),
        max_seqlen=max(p.seqlen.max for p in ranges),
        max_global=slots if source.global_attention == "mask" else None,
    )
