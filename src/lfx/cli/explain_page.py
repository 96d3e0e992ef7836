"""The page of `lfx explain`: one HTML file that holds the document and the strongest attention weights of each token.

A weight w is stored as the byte round(255·√w), which is more precise for small weights. The start of a span is stored
as its distance from the query, which compresses better than a position. All bytes are compressed with gzip, in base64.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError
from lfx.files import replacing, why_unwritten
from lfx.inline_hashes import inline_hashes

if TYPE_CHECKING:
    from lfx.runtime.strongest import Spans, Strongest
    from lfx.runtime.tokenizer import TokenText

MAX_BYTES = 4_900_000  # of a page; it is exceeded only if the parts that every page has are larger
LONGEST = 65_536  # number of tokens; a distance has two bytes
# Largest number of spans of a token: of a head, of a layer's mean, and of the mean over all layers and heads.
TOP = (4, 6, 12)
_LEVEL = 6  # of the compression
_LONGEST_TEXT = 400  # number of characters that are shown of a token, or of the text between two tokens


def write(
    path: Path,
    title: str,
    facts: str,
    tokens: Sequence[TokenText],
    weights: Strongest,
    answers: Sequence[Mapping[str, Any]],
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        title, facts: the heading, and the line below it, in plain text.
        tokens: the tokens of the sequence.
        weights: the strongest weights of each token, with at most TOP spans.
        answers: those of `lfx.runtime.postprocess.Postprocessor`.
    Raises:
        InputError: the file cannot be written, or the sequence is longer than LONGEST.
    """
    text = page(title, facts, tokens, weights, answers)
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(why_unwritten(path, error, "choose another --output")) from error


def page(
    title: str, facts: str, tokens: Sequence[TokenText], weights: Strongest, answers: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page, with as many spans as fit in MAX_BYTES; the arguments are those of `write`."""
    if len(tokens) > LONGEST:
        raise InputError(f"the text has {len(tokens):,} tokens, above the {LONGEST:,} of a page; shorten or split it")
    template = resources.files("lfx.cli").joinpath("explain.html").read_text(encoding="utf-8")
    layers, heads, _ = weights.to_anchor.shape
    meta = {
        "facts": _utf8(facts),
        "tokens": [_token(token) for token in tokens],
        "layers": layers,
        "heads": heads,
        "anchor": weights.anchor,
        "is_global": weights.global_tokens.tolist(),
        "answers": [_answer(answer) for answer in answers],
    }
    room = MAX_BYTES - len(template) - len(script_json(meta)) - 2000  # a margin for the names of the sections
    data, sections = _packed(weights, room * 3 // 4)
    values: dict[str, Callable[[], str]] = {
        "title": lambda: html.escape(_utf8(title)),
        "meta": lambda: script_json({**meta, "sections": sections}),
        "data": lambda: base64.b64encode(data).decode(),
        "script_hash": lambda: inline_hashes(template, "script"),
        "style_hash": lambda: inline_hashes(template, "style"),
    }
    # All placeholders are replaced in one pass, so that text of the document is not taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]](), template)


def script_json(value: Any) -> str:
    """Return a value as ASCII JSON that can neither end the script element that contains it nor begin a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(weights: Strongest, max_bytes: int) -> tuple[bytes, list[tuple[str, int]]]:
    """Compress the weights, and as many spans of each token as fit.

    Returns:
        A gzip stream, and the name and size of each section in it, in order.
    """
    compressor = zlib.compressobj(_LEVEL, wbits=31)
    packed, sections = b"", []
    for required, group in _groups(weights):
        attempt = compressor.copy()
        content = b"".join(attempt.compress(part) for part in group.values()) + attempt.flush(zlib.Z_SYNC_FLUSH)
        if not required and len(packed) + len(content) > max_bytes:
            break
        compressor, packed = attempt, packed + content
        sections += [(name, len(part)) for name, part in group.items()]
    return packed + compressor.flush(), sections


def _groups(weights: Strongest) -> Iterator[tuple[bool, dict[str, bytes]]]:
    """Yield the groups of sections in order of importance: whether the page must have it, and name -> bytes."""
    yield True, {"to_anchor": _codes(weights.to_anchor)}
    if weights.of_anchor is not None:
        yield True, {"of_anchor": _codes(weights.of_anchor)}
    for rank in range(weights.model.start.shape[-1]):
        yield True, _group("model", weights.model, rank)
    # The strongest span of each head comes before the third and weaker spans of the layers' means.
    layers = [_group("layer", weights.layers, rank) for rank in range(weights.layers.start.shape[-1])]
    heads = (_group("head", weights.heads, rank) for rank in range(weights.heads.start.shape[-1]))
    for group in (*layers[:2], next(heads, {}), *layers[2:]):
        yield False, group
    for group in heads:
        yield False, group


def _group(name: str, spans: Spans, rank: int) -> dict[str, bytes]:
    """The sections of the spans of one rank, 0 = the strongest."""
    length = np.minimum(spans.length[..., rank], 255)
    distance = np.where(length > 0, (spans.start[..., rank] - np.arange(spans.start.shape[-2])) % LONGEST, 0)
    codes = {"low": distance % 256, "high": distance // 256, "length": length}
    return {
        **{f"{name}{rank}_{part}": array.astype(np.uint8).tobytes() for part, array in codes.items()},
        f"{name}{rank}_weight": _codes(np.where(length > 0, spans.weight[..., rank], 0.0)),
    }


def _codes(weights: NDArray[Any]) -> bytes:
    codes: NDArray[np.uint8] = np.rint(255 * np.sqrt(np.clip(np.nan_to_num(weights), 0.0, 1.0))).astype(np.uint8)
    return codes.tobytes()


def _token(token: TokenText) -> list[Any]:
    return [_shortened(token.before), _shortened(token.text), *([1] if token.special else [])]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def _answer(answer: Mapping[str, Any]) -> list[str]:
    """The score of an answer, then its other values."""
    score = answer.get("score")
    others = [_shortened(str(value)) for name, value in answer.items() if name != "score"]
    return [f"{score:.3f}" if isinstance(score, float) else "", *others]


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # a file name may be invalid UTF-8
