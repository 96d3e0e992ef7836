"""`lfx inspect`: print the manifest of a bundle or a plan as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfx.cli.options import Command, FilePath
from lfx.cli.terminal import echo_json, table
from lfx.errors import ArtifactError
from lfx.manifest import Manifest, locate
from lfx.signature import Signature, TensorSpec, grouped

if TYPE_CHECKING:
    from lfx.runtime.plan import PlanManifest


@click.command("inspect", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest.")
def command(model: Path, as_json: bool) -> None:
    """Show what a bundle or a plan is.

    The table has the model, inputs, outputs, limits and validation errors.
    """
    manifest = checked_manifest(model)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    table(["property", "value"], rows(manifest))


def checked_manifest(model: Path) -> Manifest | PlanManifest:
    """Read the manifest of a bundle or a plan, and check the files against it.

    Raises:
        ArtifactError: there is no manifest, or a file differs from it.
    """
    from lfx.runtime.hub import local_path
    from lfx.runtime.plan import SUFFIX, PlanManifest

    model = local_path(model)
    if model.suffix != SUFFIX or model.is_dir():
        return _bundle_manifest(model)
    manifest = PlanManifest.read(model)
    manifest.verify(model)
    return manifest


def _bundle_manifest(model: Path) -> Manifest:
    bundle, _ = locate(model)
    if bundle is None:
        raise ArtifactError(f"{model} has no manifest in its folder; give the bundle that lfx export wrote")
    from lfx.runtime.artifact import unchanged

    manifest = Manifest.read(bundle)
    with unchanged(bundle, manifest):
        manifest.verify(bundle)
    return manifest


def rows(manifest: Manifest | PlanManifest) -> list[list[str]]:
    """Return the table's rows: property and value."""
    return list(_bundle(manifest) if isinstance(manifest, Manifest) else _plan(manifest))


def _bundle(manifest: Manifest) -> Iterator[list[str]]:
    yield ["model", str(manifest.source.get("model"))]
    yield from _model(manifest.signature)
    yield ["opset", f"{manifest.opset}{', functions inlined' if manifest.inlined else ''}"]
    yield ["attention on the CPU", _kernels_text(manifest, "cpu")]
    if _has_library("cuda"):
        yield ["attention on CUDA", _kernels_text(manifest, "cuda")]
    measured = manifest.validation.get("outputs", {})
    for name, group in grouped(measured).items():
        label = "float32 validated" if manifest.quantization else "validated"
        error, tolerance = (
            max(measured[o]["max_abs_error"] for o in group),
            min(measured[o]["tolerance"] for o in group),
        )
        yield [label, f"{name}: error {error:.2g}, tolerance {tolerance:.2g}"]
    accuracy = manifest.quantization.get("accuracy", {"outputs": {}})
    results = accuracy["outputs"]
    for label, group in grouped(results).items():
        cosine, error = min(results[o]["cosine"] for o in group), max(results[o]["max_abs_error"] for o in group)
        agreements = [results[o]["label_agreement"] for o in group if "label_agreement" in results[o]]
        agreement = f", labels agree {min(agreements):.1%}" if agreements else ""
        yield ["int8 measured", f"{label}: cosine {cosine:.5f} with float32, error {error:.2g}{agreement}"]
    if (texts := accuracy.get("texts")) is not None:
        yield [
            "int8 measured",
            f"greedy search: {texts['text_agreement']:.1%} of {texts['texts']:,} texts equal to float32, "
            f"{texts['token_agreement']:.1%} of {texts['tokens']:,} tokens before the first difference",
        ]
    yield ["files", ", ".join(f"{name} ({entry['bytes']:,} bytes)" for name, entry in manifest.files.items())]
    yield ["made with", _versions(manifest.versions)]


def _has_library(provider: str) -> bool:
    """Whether lfx was installed with the kernels of an execution provider."""
    from lfx.runtime import custom_ops

    try:
        custom_ops.library(provider)
    except custom_ops.NoKernelError:
        return False
    return True


def _kernels_text(manifest: Manifest, provider: str) -> str:
    """What runs the attention nodes on an execution provider of ONNX Runtime."""
    from lfx.runtime import custom_ops

    reason = custom_ops.reason_for_function("onnxruntime", provider, manifest.signature.precision, not manifest.inlined)
    try:
        if not reason:
            custom_ops.library(provider)
    except custom_ops.NoKernelError as error:
        reason = str(error)
    return f"function ({reason})" if reason else "fused kernels"


def _plan(manifest: PlanManifest) -> Iterator[list[str]]:
    yield ["built from", f"{manifest.bundle.get('name')} (lfx.json {str(manifest.bundle.get('sha256'))[:12]}…)"]
    yield ["TensorRT", f"{manifest.flavor} {manifest.tensorrt_version}"]
    yield ["target", manifest.target]
    if manifest.has_host_code:
        yield ["host code", "in the plan (--version-compatible): it runs as a program when the plan is opened"]
    for profile in manifest.profiles:
        yield ["profile", str(profile)]
    decoder = manifest.decoder_plan
    for decoder_profile in decoder.profiles if decoder is not None else ():
        yield ["decoder's profile", str(decoder_profile)]
    plugin = f", plugin version {manifest.plugin_version}" if manifest.plugin_version else ""
    yield ["attention", f"{manifest.plugin_layers} of {manifest.attention_nodes} nodes are plugin layers{plugin}"]
    yield from _model(manifest.signature)
    converted = manifest.conversion.get("outputs", {})
    for name, group in grouped(converted).items():
        difference = max(converted[output]["max_abs_difference"] for output in group)
        limit = min(converted[output]["limit"] for output in group)
        yield ["converted", f"{name}: {difference:.2g} from the bundle's, at most {limit:.2g} allowed"]
    yield ["size", f"{manifest.plan.get('bytes', 0):,} bytes"]
    if decoder is not None:
        yield ["decoder's size", f"{decoder.plan['bytes']:,} bytes"]
    yield ["made with", _versions(manifest.versions)]


def _model(signature: Signature) -> Iterator[list[str]]:
    sides = 1 if signature.causal else 2
    windows = sorted({sides * window for window in signature.attention_windows})
    yield ["architecture", f"{signature.architecture}, {len(signature.attention_windows)} layers"]
    yield ["task", signature.task]
    yield ["precision", signature.precision]
    yield [
        "attention window",
        f"{', '.join(map(str, windows))} tokens {'back (causal)' if signature.causal else 'in all'}",
    ]
    yield ["longest sequence", str(signature.max_seqlen or "no limit")]
    yield ["vocabulary", str(signature.vocab_size or "not checked")]
    yield ["global attention", _global_text(signature)]
    if not signature.ignores_padding:
        yield ["padding", "changes the outputs, so only sequences of one length run together"]
    yield from _tensors("", signature.inputs, signature.outputs)
    if (decoder := signature.decoder) is not None:
        yield ["longest text", f"{decoder.max_tokens} tokens, from id {decoder.decoder_start_token_id} on"]
        yield from _tensors("decoder's ", decoder.inputs, decoder.outputs)


def _tensors(owner: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Iterator[list[str]]:
    """Yield a row for each input and output; the cached keys or values of all layers are one row."""
    for label, tensors in (("input", inputs), ("output", outputs)):
        specs = {tensor.name: tensor for tensor in tensors}
        for name, group in grouped(specs).items():
            spec = specs[group[0]]
            yield [f"{owner}{label}", f"{name} ({', '.join(map(str, spec.shape))}) {spec.dtype}"]


def _global_text(signature: Signature) -> str:
    if signature.global_attention == "none":
        return "none, fixed"
    if signature.global_attention == "first":
        return "the first token, fixed"
    limit = "" if signature.max_global is None else f", at most {signature.max_global} a row"
    return f"an input{limit}; without it: {signature.default_global.replace('_', ' ')}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
