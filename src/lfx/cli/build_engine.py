"""`lfx build-engine`: build a TensorRT plan from a bundle."""

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
@click.option("--bf16", "precision", flag_value="bf16", help="Convert a float32 bundle to bfloat16, strongly typed.")
@click.option(
    "--batch",
    multiple=True,
    default=["1:1:8"],
    show_default=True,
    help="Set the batch sizes of the profile: MIN:OPT:MAX, or one number.",
)
@click.option(
    "--seqlen",
    multiple=True,
    help="Set the sequence lengths of the profile, in tokens: MIN:OPT:MAX.  [default: up to the model's maximum]",
)
@click.option(
    "--max-global", help="Set the number of slots for global tokens in a row.  [default: the bundle's, or 64]"
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Let texts have at most this number of tokens after the first; for a model that writes texts.  "
    "[default: what its decoder has positions for]",
)
@click.option(
    "--num-beams",
    type=click.IntRange(1),
    help="Decode at most this number of beams for each sequence; for a model that writes texts.  "
    "[default: the checkpoint's, or 1]",
)
@click.option(
    "--flavor",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="Choose the TensorRT flavor.  [default: the one that is installed]",
)
@click.option("--target", help="Build for a compute capability, such as sm89, without its GPU; TensorRT-RTX only.")
@click.option("--plugin/--no-plugin", default=True, show_default=True, help="Run attention in the lfx plugin.")
@click.option("--timing-cache", type=OutputPath(), help="Read this timing cache, and update it after the build.")
@click.option(
    "--workspace", type=click.IntRange(1, 10_000_000), metavar="MB", help="Limit the workspace of each layer."
)
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), help="Set the builder optimization level.  [default: TensorRT's]"
)
@click.option("--version-compatible", is_flag=True, help="Build a plan that later TensorRT versions can run too.")
@click.option("--refit", is_flag=True, help="Build a plan whose weights can be refitted.")
@click.option("--float16-outputs", is_flag=True, help="Output float16 in place of float32; for plans in fp16.")
@click.option(
    "--output", type=OutputPath(), help="Write the plan to this file.  [default: the bundle's name with .plan]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan's manifest instead of a summary.")
def command(
    bundle: Path | None,
    precision: str | None,
    batch: tuple[str, ...],
    seqlen: tuple[str, ...],
    max_global: str | None,
    max_new_tokens: int | None,
    num_beams: int | None,
    flavor: str | None,
    target: str | None,
    plugin: bool,
    timing_cache: Path | None,
    workspace: int | None,
    optimization_level: int | None,
    version_compatible: bool,
    refit: bool,
    float16_outputs: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Build a TensorRT plan from a bundle.

    Without BUNDLE, the only bundle in this folder is taken.

    Give --batch and --seqlen several times for several optimization profiles. A model that writes texts gets two plans:
    NAME.plan of its encoder, and NAME.plan.decoder.
    """
    from lfx.runtime.build import Options, build_engine
    from lfx.runtime.plan import PlanManifest, decoder_path

    options = Options(
        timing_cache=timing_cache,
        workspace_bytes=workspace * 1_000_000 if workspace is not None else None,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        refit=refit,
        float16_outputs=float16_outputs,
    )
    with progress() as step:
        plan = build_engine(
            bundle if bundle is not None else _only_bundle(),
            output,
            precision=precision,
            batch=batch,
            seqlen=seqlen or None,
            max_global=max_global,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
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
    if (decoder := manifest.decoder_plan) is not None:
        profiles = " and ".join(map(str, decoder.profiles))
        echo(f"{decoder_path(plan)}: {profiles}, {decoder.plan['bytes']:,} bytes")


def _only_bundle() -> Path:
    if Path(MANIFEST).is_file():
        return Path()
    bundles = sorted(path.parent for path in Path().glob(f"*/{MANIFEST}"))
    if len(bundles) != 1:
        names = f"{len(bundles)} bundles ({', '.join(map(str, bundles))})" if bundles else "no bundle"
        raise InputError(f"this folder holds {names}; name the one to build: lfx build-engine BUNDLE")
    return bundles[0]
