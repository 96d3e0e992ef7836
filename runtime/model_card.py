"""The model card that `push` writes: what the model is, how it is used, and what its validation measured."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath

from lfx.manifest import Manifest
from lfx.signature import SENTENCE_EMBEDDING, TEXT_GENERATION, Signature

CARD = "README.md"
# `push` replaces a card with this line, and leaves any other card alone.
MARK = "<!-- written by lfx push -->"


def model_card(manifest: Manifest, repository: str) -> str:
    """Return the text of the card.

    Args:
        repository: ORG/NAME, for the example.
    """
    signature = manifest.signature
    source = str(manifest.source.get("model"))
    from_hub = manifest.source.get("kind") == "hub"
    name = source if from_hub else re.split(r"[/\\]", source)[-1]
    task = "sentence-similarity" if signature.task == SENTENCE_EMBEDDING else signature.task
    head = ["library_name: lfx", f"pipeline_tag: {task}", "tags: [longformer, onnx, lfx]"]
    if from_hub:
        head.append(f"base_model: {json.dumps(source)}")
    parts = [
        "\n".join(["---", *head, "---"]),
        MARK,
        f"# {repository}",
        _facts(manifest, name),
        _use(manifest, repository),
        _validation(manifest),
        "`lfx.json` has the versions, the limits, and the sha256 of each file, against which lfx checks them.",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(manifest: Manifest, name: str) -> str:
    signature = manifest.signature
    limit = f"up to {signature.max_seqlen:,} tokens" if signature.max_seqlen else "any length"
    return (
        f"{_plain(name)} as an ONNX model: {_plain(signature.architecture)}, {signature.task}, "
        f"{signature.precision}, opset {manifest.opset}, sequences of {limit}, {_globals(signature)}."
    )


def _globals(signature: Signature) -> str:
    if signature.global_attention == "mask":
        return f"global tokens by an input (default: {signature.default_global.replace('_', ' ')})"
    return {"first": "the first token is global", "none": "no global tokens"}[signature.global_attention]


def _use(manifest: Manifest, repository: str) -> str:
    run = {
        SENTENCE_EMBEDDING: 'engine.embed(["A long document …"])',
        TEXT_GENERATION: 'engine.generate("A long document …")',
    }.get(manifest.signature.task, "engine.run(ids)")
    lines = [
        "```python",
        "from lfx import runtime  # pip install 'longformer-lfx[cpu]'",
        "",
        f"engine = runtime.Engine({json.dumps(repository)})",
        run,
        "```",
    ]
    if PurePosixPath(manifest.model_file).parent.name == "onnx":  # the layout of the hub
        clients = "transformers.js, optimum-onnx and sentence-transformers open it too: "
        if manifest.signature.task == TEXT_GENERATION:
            clients = "Other runtimes can open its graphs: "
        lines += ["", f"{clients}`{manifest.model_file}` has standard operators alone."]
    return "\n".join(lines)


def _validation(manifest: Manifest) -> str:
    """The tables of the errors, measured at the export and, for int8, by `lfx quantize`."""
    validation, quantization = manifest.validation, manifest.quantization
    of = "The float32 model was compared" if quantization else "The model was compared"
    lines = ["## Validation", "", f"{of} with {_plain(validation.get('reference', 'PyTorch'))}, and PyTorch too:", ""]
    rows = [
        [
            name,
            *(f"{result[key]:.2g}" for key in ("max_abs_error", "torch_max_abs_error", "tolerance")),
            str(result.get("worst_case", "")),
        ]
        for name, result in validation.get("outputs", {}).items()
    ]
    lines += _table(["output", "largest error", "PyTorch's error", "tolerance", "worst case"], rows)
    if (accuracy := quantization.get("accuracy")) is not None:
        lines += ["", f"The int8 model was compared with {_plain(accuracy['reference'])}:", ""]
        rows = [
            [
                name,
                *(f"{result[key]:.2g}" if key in result else "" for key in ("max_abs_error", "max_abs_value")),
                f"{result['cosine']:.5f}",
                f"{result['label_agreement']:.1%}" if "label_agreement" in result else "",
            ]
            for name, result in accuracy["outputs"].items()
        ]
        lines += _table(["output", "largest error", "largest value", "cosine", "labels that agree"], rows)
        if (texts := accuracy.get("texts")) is not None:
            lines += [
                "",
                f"Of {texts['texts']:,} texts of greedy search {texts['text_agreement']:.1%} are equal to those of the "
                f"float32 model, and {texts['token_agreement']:.1%} of their {texts['tokens']:,} tokens come before "
                "the first difference.",
            ]
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain(text: str) -> str:
    """Escape the characters of a name that Markdown or HTML would interpret, and join its lines."""
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", " ".join(str(text).split()))
