"""The arguments of `build_engine`: checked, and with their defaults filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lfx.checks import file_path, flag, one_of, output_file, shown, whole_number
from lfx.errors import BuildError
from lfx.manifest import Manifest, locate
from lfx.runtime import plugin as plugins
from lfx.runtime.flavor import choose_flavor
from lfx.runtime.generation.defaults import read_defaults
from lfx.runtime.generation.settings import MAX_BEAMS
from lfx.runtime.plan import SUFFIX, decoder_path, json_path
from lfx.runtime.profile import DecoderProfile, Profile, Range, decoder_profile, profiles
from lfx.signature import HIDDEN_STATES, PAST, PRECISIONS, PRESENT, Decoder, Signature, TensorSpec

MAX_SLOTS = 3840  # limit of K of TensorRT's TopK
OLDEST_PLUGIN_TARGET = 80  # compute capability of the plugin's oldest kernels


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


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of `build_engine`.

    Attributes:
        signature: the plan's.
        decoder_profiles: of the decoder's plan; none if the model has no decoder.
        generation: the checkpoint's defaults of `Engine.generate`, if the model has a decoder.
        library: the plugin library; None builds attention from the function bodies.
    """

    bundle: Path
    manifest: Manifest
    signature: Signature
    slots: int
    profiles: tuple[Profile, ...]
    decoder_profiles: tuple[DecoderProfile, ...]
    generation: dict[str, Any]
    flavor: str
    target: str | None
    library: Path | None
    options: Options
    output: Path


def check_arguments(
    bundle: str | Path,
    output: str | Path | None,
    precision: str | None,
    batch: Sequence[str | int],
    seqlen: Sequence[str | int] | None,
    max_global: str | int | None,
    max_new_tokens: int | None,
    num_beams: int | None,
    flavor: str | None,
    target: str | None,
    plugin: bool,
    options: Options | None,
) -> Arguments:
    """Check the arguments of `build_engine`, and fill in their defaults."""
    folder, _ = locate(file_path(bundle, "bundle", BuildError))
    if folder is None:
        raise BuildError(f"{bundle} is a file without its bundle; give the folder that lfx export wrote")
    manifest = Manifest.read(folder)
    decoder = manifest.signature.decoder
    if decoder is not None and any(spec.name == HIDDEN_STATES for spec in decoder.inputs):
        raise BuildError(f"{bundle} is in the layout hf; build from the bundle that it was made from")
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
    new_tokens = _max_new_tokens(max_new_tokens, bundle, manifest.signature)
    generation = read_defaults(folder) if decoder is not None else {}
    beams = _num_beams(num_beams, generation, bundle, manifest.signature)
    path = _output(output if output is not None else folder.resolve().name + SUFFIX, has_decoder=decoder is not None)
    signature = plan_signature(
        manifest.signature, precision, slots, ranges, new_tokens, float16_outputs=options.float16_outputs
    )
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
    return Arguments(
        bundle=folder,
        manifest=manifest,
        signature=signature,
        slots=slots,
        profiles=ranges,
        decoder_profiles=tuple(
            decoder_profile(profile, new_tokens, beams) for profile in ranges if decoder is not None
        ),
        generation=generation,
        flavor=flavor_name,
        target=target,
        library=plugins.library() if plugin else None,
        options=options,
        output=path,
    )


def _max_new_tokens(requested: int | None, bundle: str | Path, signature: Signature) -> int:
    """Number of tokens that a text may have after its first one, from the option --max-new-tokens; 0 for no texts."""
    if signature.decoder is None:
        _refuse_without_decoder("--max-new-tokens", requested, bundle, signature)
        return 0
    if requested is None:
        return signature.decoder.max_tokens
    return whole_number(requested, "--max-new-tokens", 1, signature.decoder.max_tokens, BuildError)


def _num_beams(requested: int | None, generation: Mapping[str, Any], bundle: str | Path, signature: Signature) -> int:
    """Number of rows that are decoded for a sequence, from --num-beams; default: the checkpoint's own."""
    if signature.decoder is None:
        _refuse_without_decoder("--num-beams", requested, bundle, signature)
        return 1
    if requested is not None:
        return whole_number(requested, "--num-beams", 1, MAX_BEAMS, BuildError)
    defaults = [generation.get(name) for name in ("num_beams", "num_return_sequences")]
    return max([1, *(n for n in defaults if type(n) is int and n <= MAX_BEAMS)])


def _refuse_without_decoder(option: str, value: int | None, bundle: str | Path, signature: Signature) -> None:
    if value is not None:
        raise BuildError(
            f"{option} {shown(value)} is for a model that writes texts, and {bundle} is for {signature.task}; leave it "
            "out"
        )


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


def _check_target(flavor: str, target: str | None, plugin: bool) -> None:
    if target is None:
        if not local_target():
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


def local_target() -> str:
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


def _output(output: str | Path, *, has_decoder: bool) -> Path:
    """The path of the plan, from the option --output; its JSON and its decoder's plan must be writable too."""
    path = output_file(output, "--output", BuildError)
    if path.suffix != SUFFIX:
        raise BuildError(f"{path} is not the name of a plan; give one that ends with {SUFFIX}")
    output_file(json_path(path), "--output", BuildError)
    if has_decoder:
        output_file(decoder_path(path), "--output", BuildError)
    return path


def plan_signature(
    source: Signature,
    precision: str | None,
    slots: int,
    ranges: Sequence[Profile],
    new_tokens: int,
    *,
    float16_outputs: bool,
) -> Signature:
    """The signature of the plan, from the bundle's."""
    target = one_of(precision, "precision", PRECISIONS, BuildError) if precision is not None else source.precision
    if source.precision not in (target, "fp32"):
        raise BuildError(
            f"the bundle is {source.precision}; {target} is converted from an fp32 bundle: export it again"
        )
    if float16_outputs and target != "fp16":
        raise BuildError(f"--float16-outputs is for a plan in fp16, and this one is {target}; add --fp16")
    # The keys and values of a decoder in fp16 stay float16 from step to step.
    halves = ("",) if float16_outputs else (PAST, PRESENT) if target == "fp16" else ()
    return replace(
        source,
        precision=target,
        outputs=_with_halves(source.outputs, halves),
        decoder=_decoder(source.decoder, halves, new_tokens) if source.decoder is not None else None,
        max_seqlen=max(p.seqlen.max for p in ranges),
        max_global=slots if source.global_attention == "mask" else None,
    )


def _decoder(source: Decoder, halves: tuple[str, ...], new_tokens: int) -> Decoder:
    """The signature of the decoder's plan."""
    return replace(
        source,
        inputs=_with_halves(source.inputs, halves),
        outputs=_with_halves(source.outputs, halves),
        max_tokens=new_tokens,
    )


def _with_halves(specs: tuple[TensorSpec, ...], prefixes: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """Make float32 tensors whose names have one of the prefixes float16."""
    return tuple(
        replace(spec, dtype="float16") if spec.dtype == "float32" and spec.name.startswith(prefixes) else spec
        for spec in specs
    )
