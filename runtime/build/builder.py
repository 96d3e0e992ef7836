"""`build_engine` builds a TensorRT plan from an ONNX bundle."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lfx.errors import BuildError, LfxError, require
from lfx.files import is_disk_full, private_folder, temporary_folder, why_unwritten
from lfx.machine import package_versions
from lfx.manifest import MANIFEST, sha256
from lfx.runtime import plugin as plugins
from lfx.runtime.artifact import check_bundle, unchanged
from lfx.runtime.build.arguments import Arguments, Options, check_arguments, local_target
from lfx.runtime.build.check_graph import check_conversion
from lfx.runtime.build.launch import run_tensorrt
from lfx.runtime.flavor import FLAVORS
from lfx.runtime.plan import DecoderPlan, PlanManifest, decoder_path, publish

Progress = Callable[[str], None]

_CURE = "choose another --output"


def build_engine(
    bundle: str | Path,
    output: str | Path | None = None,
    *,
    precision: str | None = None,
    batch: Sequence[str | int] = ("1:1:8",),
    seqlen: Sequence[str | int] | None = None,
    max_global: str | int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    flavor: str | None = None,
    target: str | None = None,
    plugin: bool = True,
    options: Options | None = None,
    progress: Progress = lambda step: None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Path:
    """Build a TensorRT plan from an ONNX bundle, or two from the bundle of a model that writes texts.

    Args:
        bundle: the folder that `lfx export` wrote.
        output: path of the plan, with the suffix .plan; its JSON is written beside it, and the decoder's plan of a
            model that writes texts, with .decoder appended. Default: the bundle's name with .plan, in the current
            folder.
        precision: "fp32", "fp16" or "bf16". Only an fp32 bundle can be converted to another precision: its graph
            becomes strongly typed, and its outputs are compared with the bundle's before the build. Default: the
            bundle's.
        batch, seqlen: lists of MIN:OPT:MAX or numbers, one entry for each optimization profile; a single entry is used
            for all. Default: batch 1:1:8, and all lengths that the model takes, tuned for the longest.
        max_global: number of global slots of a sequence, 1 or more; MIN:OPT:MAX counts as MAX. TensorRT needs a
            constant; fewer slots are faster, and a sequence with more global tokens is refused. Default: the number
            that the bundle was exported with, else 64.
        max_new_tokens: of a model that writes texts, the largest number of tokens after a text's first one. Default:
            what the decoder has positions for.
        num_beams: of a model that writes texts, the largest number of rows that are decoded for a sequence: beams, or
            sequences that are returned. Default: the checkpoint's own, else 1.
        flavor: "tensorrt" or "tensorrt-rtx". Default: the installed one, "tensorrt" if both are.
        target: compute capability to build for without a GPU, such as "sm89"; TensorRT-RTX only. Default: that of the
            first GPU.
        plugin: whether the lfx plugin computes attention. If False, TensorRT builds it from the ops' function bodies.
        options: further options for TensorRT. Default: `Options()`.
        progress: called with the name of each step.
        log: called with each warning and error of TensorRT. Default: prints it to stderr.
    Returns:
        The path of the plan, which `Engine` opens; the encoder's, if there are two.
    Raises:
        ArtifactError: the bundle does not exist or is broken.
        BuildError: an option is not supported, the converted graph is not accurate, TensorRT fails, or the plan cannot
            be written.
        PluginError: the plugin library is not installed.
        DependencyError: TensorRT is not installed.
        LfxError: there is no temporary folder.
    """
    arguments = check_arguments(
        bundle,
        output,
        precision,
        batch,
        seqlen,
        max_global,
        max_new_tokens,
        num_beams,
        flavor,
        target,
        plugin,
        options,
    )
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
            with unchanged(arguments.bundle, arguments.manifest):
                _build_plan(arguments, source, scratch, built, progress, log)
            publish(built, path)
    except OSError as error:
        raise BuildError(why_unwritten(path, error, _CURE)) from error
    except LfxError as error:
        if not is_disk_full(error):
            raise
        raise BuildError(why_unwritten(path, error, f"{_CURE}, or set TMPDIR to a folder with room")) from error
    return path


def _build_plan(
    arguments: Arguments, source: Path, scratch: Path, plan: Path, progress: Progress, log: Callable[[str], None]
) -> None:
    """Prepare and check the graphs, build the plans, and write them and their JSON.

    Args:
        source: the bundle's ONNX file, or the encoder's. scratch: a temporary folder. plan: path of the plan.
    """
    progress("preparing the graph")
    require("onnx_ir", "rtx")
    from lfx.runtime.build.prepare_graph import prepare_decoder, prepare_graph

    manifest, signature, plugin = arguments.manifest, arguments.signature, arguments.library is not None
    model = scratch / Path(manifest.model_file).name
    nodes = prepare_graph(source, model, manifest, signature, arguments.slots, plugin)
    if signature.decoder is not None:
        decoder = signature.decoder.model_file
        prepare_decoder(source.with_name(decoder), scratch / decoder, manifest, signature)
    conversion = check_conversion(arguments.bundle, manifest, model, signature, progress, log)
    job = _job(arguments, model, plan)
    result = run_tensorrt(job, scratch, progress, log)
    if plugin and result["plugin_layers"] != nodes:
        raise BuildError(
            f"only {result['plugin_layers']} of {nodes} attention nodes became plugin layers; please report this"
        )
    PlanManifest(
        signature=signature,
        flavor=arguments.flavor,
        tensorrt_version=result["tensorrt_version"],
        target=arguments.target or local_target(),
        profiles=arguments.profiles,
        plugin_version=plugins.VERSION if plugin else None,
        attention_nodes=nodes,
        plugin_layers=result["plugin_layers"],
        bundle={"name": arguments.bundle.resolve().name, "sha256": sha256(arguments.bundle / MANIFEST)},
        source=manifest.source,
        quantization=manifest.quantization,
        options={name: job[name] for name in ("workspace_bytes", "optimization_level", "flags")},
        versions=package_versions(("onnx", "onnx-ir", "onnxruntime", "numpy")),
        conversion=conversion,
        plan=_entry(plan),
        decoder_plan=_build_decoder(arguments, scratch, plan, progress, log),
    ).write(plan)


def _build_decoder(
    arguments: Arguments, scratch: Path, plan: Path, progress: Progress, log: Callable[[str], None]
) -> DecoderPlan | None:
    """Build the decoder's plan from its prepared graph, beside the encoder's; None if the model has no decoder."""
    decoder = arguments.signature.decoder
    if decoder is None:
        return None
    path, own_scratch = decoder_path(plan), scratch / "decoder"
    own_scratch.mkdir()
    job = _job(arguments, scratch / decoder.model_file, path)
    job |= {
        "plugin": None,  # the decoder has no attention nodes
        "profiles": [
            {spec.name: profile.shapes(spec) for spec in decoder.inputs} for profile in arguments.decoder_profiles
        ],
    }
    run_tensorrt(job, own_scratch, lambda step: progress(f"decoder, {step}"), log)
    return DecoderPlan(arguments.decoder_profiles, arguments.generation, _entry(path))


def _entry(plan: Path) -> dict[str, Any]:
    return {"sha256": sha256(plan), "bytes": plan.stat().st_size}


def _job(arguments: Arguments, model: Path, plan: Path) -> dict[str, Any]:
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
