"""Each part of tokenizer.json and each setting of the files beside it, changed one at a time.

The bundle's tokenizer gives the ids and the texts of AutoTokenizer, or the checkpoint is refused with an LfxError.
Enumerated: the normalizers, pre-tokenizers, post-processors and decoders of the tokenizers library, the flags of added
tokens, truncation and padding, and the settings of tokenizer_config.json, special_tokens_map.json and added_tokens.json
with values of any type.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import decoders, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from lfx.errors import LfxError
from lfx.export.companions import write_tokenizer
from lfx.export.load import load_tokenizer
from lfx.runtime.tokenizer import Tokenizer
from lfx.signature import GRAPH_INPUTS, Signature, TensorSpec
from tests.models import tiny_tokenizer

Files = dict[str, Any]  # name -> content
TEXTS = [
    "",
    " the  FOX ",
    "the<mask>fox dog",
    "a <mask> b </s>",
    "XYZ fooXYZ xyz",
    "Ünï e\u0301 日本 ﬁ 😀",
    "▁the Ġa\x00",
]
LONG = "the quick <mask> fox XYZ " * 5
LONGEST, NEW_ID = 12, 99
TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SIGNATURE = Signature(
    architecture="Longformer",
    task="feature-extraction",
    precision="fp32",
    inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in GRAPH_INPUTS),
    outputs=(TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 3)),),
    attention_windows=(4,),
    max_seqlen=LONGEST,
)
ENDS = [("<s>", 0), ("</s>", 2)]
NORMALIZERS = ("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents")
PRE_TOKENIZERS = (
    "BertPreTokenizer",
    "ByteLevel",
    "Digits",
    "FixedLength",
    "Metaspace",
    "Punctuation",
    "WhitespaceSplit",
)
DECODERS = ("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "WordPiece")
PARTS: dict[str, list[Any]] = {
    "normalizer": [
        *(getattr(normalizers, name)() for name in NORMALIZERS),
        normalizers.Prepend("▁"),
        normalizers.Replace("x", "the "),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    ],
    "pre_tokenizer": [
        *(getattr(pre_tokenizers, name)() for name in PRE_TOKENIZERS),
        pre_tokenizers.CharDelimiterSplit("o"),
        pre_tokenizers.Split(" ", "merged_with_next"),
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.UnicodeScripts()]),
    ],
    "post_processor": [
        processors.ByteLevel(),
        processors.BertProcessing(ENDS[1], ENDS[0]),
        processors.RobertaProcessing(ENDS[1], ENDS[0]),
        processors.TemplateProcessing(single="$A </s>", pair="$B </s> $A </s>", special_tokens=ENDS),
        processors.Sequence([processors.ByteLevel(), processors.BertProcessing(ENDS[1], ENDS[0])]),
    ],
    "decoder": [
        *(getattr(decoders, name)() for name in DECODERS),
        decoders.Replace("e", " n't"),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ],
}
TRUNCATION = {"max_length": 4, "strategy": "OnlySecond", "stride": 1}
PADDING = {"direction": "Left", "pad_to_multiple_of": 8, "pad_id": 1, "pad_type_id": 0, "pad_token": "x"}
SECTIONS: list[Files] = [
    *({"truncation": {**TRUNCATION, "direction": side}} for side in ("Left", "Right")),
    *({"padding": {**PADDING, "strategy": strategy}} for strategy in ("BatchLongest", {"Fixed": 20})),
]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
ADDED = [
    {"content": "XYZ", **dict(zip(FLAGS, flags, strict=True))} for flags in itertools.product([False, True], repeat=5)
]
OBJECT = {"__type": "AddedToken", **ADDED[21]}
VALUES: list[Any] = [None, True, False, 1, -1, 1e30, "", "left", "the", "XYZ", ["XYZ"], {}, OBJECT]
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = (
    *(*TOKENS, "additional_special_tokens", "extra_special_tokens", "model_max_length", "truncation_side"),
    *("padding_side", "do_lower_case", "add_prefix_space", "add_bos_token", "add_eos_token", "strip_accents"),
    *("clean_up_tokenization_spaces", "split_special_tokens", "chat_template", "tokenizer_class"),
)


def cases() -> Iterator[tuple[Files, Files]]:
    """Changes of tokenizer.json, and files beside it; those of tokenizer_config.json and added tokens are additions."""
    for part, values in PARTS.items():
        yield from (({part: json.loads(value.__getstate__())}, {}) for value in values)
        yield {part: None}, {}
    yield from ((section, {}) for section in SECTIONS)
    for token in ADDED:
        yield {"added_tokens": [{"id": NEW_ID, **token}]}, {}
        yield {}, {CONFIG: {"added_tokens_decoder": {str(NEW_ID): token}}}
    yield from (({}, {CONFIG: {name: value}}) for name, value in itertools.product(SETTINGS, VALUES))
    yield from (({}, {"special_tokens_map.json": {name: value}}) for name, value in itertools.product(TOKENS, VALUES))
    for value in ({"XYZ": NEW_ID}, {"XYZ": 5}, {"XYZ": "x"}, [], {" ": NEW_ID}):
        yield {}, {"added_tokens.json": value}


def difference(checkpoint: Path, output: Path) -> str | None:
    """How the bundle's tokenizer differs from AutoTokenizer's; None if it does not, or if either cannot be loaded."""
    try:
        theirs = AutoTokenizer.from_pretrained(checkpoint)
    except Exception:  # of any type
        return None
    try:
        write_tokenizer(load_tokenizer(str(checkpoint)), output)
        tokenizer = Tokenizer(output, SIGNATURE)
    except LfxError:
        return None
    for text, pair in [*((text, None) for text in TEXTS), *itertools.pairwise(TEXTS)]:
        expected = theirs([text], None if pair is None else [pair], padding=False, truncation=False)["input_ids"][0]
        if len(expected) > LONGEST:
            continue
        ids = tokenizer.encode(text, pair).ids if expected else []
        if ids != expected:
            return f"{text!r} {pair!r}: {ids} and {expected}"
        if tokenizer.decode(ids) != theirs.decode(ids, skip_special_tokens=True).strip():
            return f"the text of {ids}"
    expected = theirs(LONG, padding=False, truncation=True, max_length=LONGEST)["input_ids"]
    return None if tokenizer.truncate(LONG).ids == expected else "truncation"


def test_the_bundles_tokenizer_is_that_of_transformers_whatever_the_files_say(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    saved, settings = (json.loads((tmp_path / name).read_text()) for name in (TOKENIZER, CONFIG))
    differences = []
    for i, (parts, files) in enumerate(cases()):
        checkpoint, output = tmp_path / f"{i}", tmp_path / f"{i}-bundle"
        checkpoint.mkdir()
        output.mkdir()
        added = saved["added_tokens"] + parts.get("added_tokens", [])
        written = {TOKENIZER: {**saved, **parts, "added_tokens": added}, "config.json": {"model_type": "longformer"}}
        for name, content in {**written, **files, CONFIG: {**settings, **files.get(CONFIG, {})}}.items():
            (checkpoint / name).write_text(json.dumps(content))
        if found := difference(checkpoint, output):
            differences.append((parts, files, found))
    assert differences == []
    assert len(list(tmp_path.glob(f"*-bundle/{TOKENIZER}"))) > 250  # the others are refused
