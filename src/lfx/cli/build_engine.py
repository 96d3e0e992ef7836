"""`lfx build-engine`: a bundle in, a TensorRT plan out."""

from __future__ import annotations

from pathlib import Path

import click

from lfx.cli.options import Command, FilePath, OutputPath
from lfx.cli.terminal import echo, echo_json, progress
from lfx.errors import InputError
from lfx.manifest import MANIFEST


@click.command("build-engine", cls=Command)
@click.argument("bundle", type=FilePath("a bundle"), required=False)
@click.option("--fp16", "precision", flag_value="fp16", help="Convert a float32 bundle to float16, strongly typed.")
@click.option("--bf16", "precision", flag_value="bf16", help="The same to bfloat16.")
@click.option("--batch", multiple=True, default=["1:1:8"], show_default=True, help="MIN:OPT:MAX, or one number.")
@click.option("--seqlen", multiple=True, help="The same, in tokens.  [default: all that the model takes]")
@click.option("--max-global", help="Global slots of a row.  [default: the bundle's, or 64]")
@click.option("--flavor", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="[default: what is installed]")
@click.option("--target", help="Compute capability to build for without a GPU, such as sm89; TensorRT-RTX only.")
@click.option("--plugin/--no-plugin", default=True, show_default=True, help="Attention by the lfx plugin.")
@click.option("--timing-cache", type=OutputPath(), help="Read, and written after the build.")
@click.option("--workspace", type=click.IntRange(1, 10_000_000), metavar="MB", help="Most scratch memory of a layer.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="[default: TensorRT's]")
@click.option("--version-compatible", is_flag=True, help="The plan runs with later TensorRT versions too.")
@click.option("--refit", is_flag=True, help="Weights can be exchanged in the plan.")
@click.option("--output", type=OutputPath(), help="The plan.  [default: the bundle's name with .plan]")
@click.option("--json", "as_json", is_flag=True, help="Print the plan's JSON instead of a summary.")
def command(
    bundle: Path | None,
    precision: str | None,
    batch: tuple[str, ...],
    seqlen: tuple[str, ...],
    max_global: str | None,
    flavor: str | None,
    target: str | None,
    plugin: bool,
    timing_cache: Path | None,
    workspace: int | None,
    optimization_level: int | None,
    version_compatible: bool,
    refit: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Build a TensorRT plan from a bundle; without BUNDLE, from the only one in this folder.

    Give --batch and --seqlen several times for several optimization profiles.
    """
    from lfx.runtime.build import Options, build_engine
    from lfx.runtime.plan import PlanManifest

    options = Options(
        timing_cache=timing_cache,
        workspace_bytes=workspace * 1_000_000 if workspace is not None else None,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        refit=refit,
    )
    with progress() as step:
        plan = build_engine(
            bundle if bundle is not None else _only_bundle(),
            output,
            precision=precision,
            batch=batch,
            seqlen=seqlen or None,
            max_global=max_global,
            flavor=flavor,
            target=target,
            plugin=plugin,
            options=options,
            progress=step,
            log=lambda line: echo(line, err=True),
        )
    manifest = PlanManifest.read(plan)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    signature = manifest.signature
    echo(
        f"{plan}: {manifest.flavor} {manifest.tensorrt_version}, {manifest.target}, {signature.precision}, "
        f"{' and '.join(map(str, manifest.profiles))}, {manifest.plan['bytes']:,} bytes"
    )
    echo(f"{manifest.plugin_layers} of {manifest.attention_nodes} attention nodes are plugin layers")


def _only_bundle() -> Path:
    found = sorted(path.parent for path in Path().glob(f"*/{MANIFEST}"))
    if Path(MANIFEST).is_file():
        return Path()
    if len(found) != 1:
        names = f"{len(found)} bundles ({', '.join(map(str, found))})" if found else "no bundle"
        raise InputError(f"this folder holds {names}; name the one to build: lfx build-engine BUNDLE")
    return found[0]
