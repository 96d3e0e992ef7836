"""`Tokenizer` of a bundle, without a model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tokenizers
import transformers

from lfx.cli.run import run_text
from lfx.errors import ArtifactError, InputError
from lfx.manifest import MANIFEST, sealed
from lfx.runtime import Engine
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.text_files import MAX_FILE_BYTES, TOKENIZER, read_file
from lfx.runtime.tokenizer import MAX_CHARACTERS, Encoded, Tokenizer
from lfx.signature import GRAPH_INPUTS, Signature, TensorSpec
from tests.conftest import MakeBundle
from tests.models import tiny_tokenizer

START, END, MASK = 0, 2, 4
LONGEST = 12


def signature(task: str) -> Signature:
    """The signature of a model that takes at most 12 tokens, with the outputs of its task."""
    axes: dict[str, tuple[int | str, ...]] = {
        "text-classification": ("batch", 3),
        "multiple-choice": ("batch", "choices"),
        "question-answering": ("batch", "sequence"),
    }
    names = ("start_logits", "end_logits") if task == "question-answering" else ("logits",)
    return Signature(
        architecture="Longformer",
        task=task,
        precision="fp32",
        inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in GRAPH_INPUTS),
        outputs=tuple(TensorSpec(name, "float32", axes.get(task, ("batch", "sequence", 3))) for name in names),
        attention_windows=(4,),
        max_seqlen=LONGEST,
        sep_token_id=END,
    )


def test_the_piece_of_an_added_token_has_no_spaces_from_beside_it(tmp_path: Path) -> None:
    theirs = tiny_tokenizer()
    sides = {"lstrip": True, "rstrip": True}
    theirs.add_tokens([tokenizers.AddedToken("<mask>", special=True, **sides), tokenizers.AddedToken("§", **sides)])
    theirs.save_pretrained(tmp_path)
    encoded = Tokenizer(tmp_path, signature("token-classification")).encode("the  <mask> fox  § a§")
    assert encoded.pieces == theirs.convert_ids_to_tokens(encoded.ids)
    assert {"<mask>", "§"} <= set(encoded.pieces)


@pytest.mark.parametrize("lets_threads_run", [False, True])
def test_encode_gives_the_ids_of_transformers_special_tokens_included(lets_threads_run: bool, folder: Path) -> None:
    tokenizer, theirs = Tokenizer(folder, signature("feature-extraction")), tiny_tokenizer()
    tokenizer.lets_threads_run = lets_threads_run
    for text, pair in (("the quick fox", None), ("the fox", "lazy dog"), ("", None), ("a <mask> b", None)):
        encoded = tokenizer.encode(text, pair)
        assert encoded.ids == theirs(text, pair).input_ids
        assert encoded.pieces == theirs.convert_ids_to_tokens(encoded.ids)
    assert tokenizer.encode("the fox").ids[0] == START
    assert tokenizer.encode("the fox", "dog").ids.count(END) == 3


def test_the_texts_of_the_tokens_are_the_parts_of_the_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("question-answering"))
    for text, pair in (("  the\n\nquick", None), ("the fox", " lazy  dog"), ("é the é", "<mask>")):
        texts = tokenizer.token_texts(text, pair)
        encoded = tokenizer.encode(text, pair)
        assert len(texts) == len(encoded.ids)
        assert [part.text for part in texts if part.special] == ["<s>", "</s>"] + ["</s>"] * 2 * (pair is not None)
        parts = "".join(part.before + part.text for part in texts if not part.special)
        assert parts == text + (pair or "")
    with pytest.raises(InputError, match="13 tokens"):
        tokenizer.token_texts("the " * (LONGEST - 1))


def test_a_character_of_several_tokens_is_the_first_ones(tmp_path: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the"], vocab_size=300)
    tokenizer.save(str(tmp_path / TOKENIZER))
    texts = Tokenizer(tmp_path, signature("fill-mask")).token_texts("a 🦊 b")
    assert len(texts) > 5
    assert "".join(part.before + part.text for part in texts) == "a 🦊 b"
    assert [part.text for part in texts].count("") >= 2


def test_encode_takes_the_longest_text_and_refuses_one_token_more(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    assert len(tokenizer.encode("the " * (LONGEST - 2)).ids) == LONGEST
    with pytest.raises(InputError, match=r"13 tokens, above the model's maximum 12; shorten or split it"):
        tokenizer.encode("the " * (LONGEST - 1))
    with pytest.raises(InputError, match="13 tokens"):
        tokenizer.encode("the " * 4, "fox " * 5)


def test_encode_without_a_limit_takes_any_length(folder: Path) -> None:
    tokenizer = Tokenizer(folder, replace(signature("feature-extraction"), max_seqlen=None))
    assert len(tokenizer.encode("the " * 5000).ids) == 5002


def test_encode_ignores_truncation_and_padding_of_the_tokenizer_file(folder: Path) -> None:
    settings = json.loads((folder / TOKENIZER).read_text())
    settings["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    settings["padding"] = {
        "strategy": {"Fixed": 11},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (folder / TOKENIZER).write_text(json.dumps(settings))
    assert len(Tokenizer(folder, signature("feature-extraction")).encode("the quick brown fox jumps").ids) == 7


def test_encode_ignores_the_dropout_of_the_tokenizer_file(folder: Path) -> None:
    expected = Tokenizer(folder, signature("feature-extraction")).encode("the quick fox")
    model = json.loads((folder / TOKENIZER).read_text())["model"]
    change_tokenizer(folder, model={**model, "dropout": 0.9})
    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    assert [tokenizer.encode("the quick fox") for _ in range(10)] == [expected] * 10


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_in_a_text_are_split_as_by_transformers(split: bool, folder: Path) -> None:
    path, text = folder / "tokenizer_config.json", "the fox <mask> </s>"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": split}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(folder, replace(signature("feature-extraction"), max_seqlen=None))
    for made in (tokenizer, deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert made.encode(text).ids == theirs(text)["input_ids"]
    assert (MASK in tokenizer.encode(text).ids) != split


@pytest.mark.parametrize("name", [TOKENIZER, "config.json", "tokenizer_config.json"])
def test_a_file_that_was_changed_after_the_export_is_refused(name: str, bundle: MakeBundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle("text-classification"), tmp_path / "bundle")
    (copy / name).write_text((copy / name).read_text() + " ")
    with pytest.raises(ArtifactError, match=rf"{name} was changed after the export \(sha256 differs\)"):
        Tokenizer(copy, signature("text-classification"))
    Tokenizer(copy, signature("text-classification"), unlisted=True)


def test_the_labels_of_a_bundle_are_checked_with_another_tokenizer_too(
    folder: Path, bundle: MakeBundle, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle("text-classification"), tmp_path / "bundle")
    Tokenizer(folder, signature("text-classification"), unlisted=True, config_folder=copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(ArtifactError, match=r"config\.json was changed after the export"):
        Tokenizer(folder, signature("text-classification"), unlisted=True, config_folder=copy)


def test_decode_leaves_special_tokens_out(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    assert tokenizer.decode(tokenizer.encode("quick fox").ids) == "quick fox"


@pytest.mark.parametrize("kind", ["WordLevel", "BPE", "forced BPE"])
@pytest.mark.parametrize("clean_up", [True, 1, False])
def test_decode_removes_the_spaces_that_transformers_removes(kind: str, clean_up: int, folder: Path) -> None:
    words = ["<s>", "we", "do", "n't", "'s", ",", ".", "fox", "'", "'ve", "?", "!", "'re", "'m"]
    vocabulary = {word: i for i, word in enumerate(words)}
    if kind == "WordLevel":
        change_tokenizer(folder, model={"type": kind, "vocab": vocabulary, "unk_token": "<s>"})
    else:
        change_tokenizer(folder, model={"type": "BPE", "vocab": vocabulary, "merges": []})
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    path = folder / "tokenizer_config.json"
    settings = {"clean_up_tokenization_spaces": clean_up, forced: kind == "forced BPE"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    # transformers 5.3 removed them from the texts of any BPE tokenizer
    options = {"clean_up_tokenization_spaces": False} if kind == "BPE" else {}
    spaced = 0
    for ids in np.random.default_rng(0).integers(1, len(words), (50, 8)).tolist():
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True, **options).strip()
        spaced += tokenizer.decode(ids) == tokenizer.decode(ids, clean_up=False)
    assert (spaced == 50) == (kind == "BPE" or not clean_up)


def test_a_bundle_without_tokenizer_is_an_artifact_error(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    with pytest.raises(ArtifactError, match=rf"has no {TOKENIZER}.*give ids to Engine.run"):
        Tokenizer(folder, signature("fill-mask"))


def test_a_file_in_place_of_a_folder_is_an_artifact_error(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is a file; give the folder that has its tokenizer\.json"):
        Tokenizer(folder / TOKENIZER, signature("feature-extraction"), unlisted=True)


def test_files_that_the_manifest_does_not_list_are_read_on_request(bundle: MakeBundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle("text-classification"), tmp_path / "bundle")
    Tokenizer(copy, signature("text-classification"))
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["files"]["config.json"]
    (copy / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ArtifactError, match=r"config\.json is not listed in lfx\.json.*--tokenizer"):
        Tokenizer(copy, signature("text-classification"))
    with Engine(copy, threads=1) as engine, pytest.raises(ArtifactError, match="is not listed"):
        run_text(engine, copy, "the fox", (), None, None, tokenizer=None, as_json=True)
    with Engine(copy, threads=1) as engine:
        run_text(engine, copy, "the fox", (), None, None, tokenizer=copy, as_json=True)
    (copy / MANIFEST).unlink()  # a folder without a manifest is a lone tokenizer
    Tokenizer(copy, signature("text-classification"))


@pytest.mark.parametrize("text", ["", "{", "fox", "{}", "[1]"])
def test_a_broken_tokenizer_is_an_artifact_error(folder: Path, text: str) -> None:
    (folder / TOKENIZER).write_text(text)
    with pytest.raises(ArtifactError, match=rf"{TOKENIZER} cannot be read"):
        Tokenizer(folder, signature("fill-mask"))


@pytest.mark.parametrize("text", ["", "{", "fox", "[1]"])
def test_a_broken_config_is_an_artifact_error(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        Postprocessor(Tokenizer(folder, signature("text-classification"))).label(0)


POST_PROCESSORS: dict[str, dict[str, Any] | None] = {
    "template": None,  # the post-processor of the tiny tokenizer
    "roberta": {
        "type": "RobertaProcessing",
        "sep": ["</s>", END],
        "cls": ["<s>", START],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
    "bert": {"type": "BertProcessing", "sep": ["</s>", END], "cls": ["<s>", START]},
}


def change_tokenizer(folder: Path, **changes: Any) -> None:
    """Replace parts of tokenizer.json."""
    data = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize("stride", [1, 3, 5])
@pytest.mark.parametrize("pair", [False, True], ids=["one text", "a pair"])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_windows_equal_the_truncation_of_the_tokenizers_library(
    folder: Path, name: str, pair: bool, stride: int
) -> None:
    if POST_PROCESSORS[name]:
        change_tokenizer(folder, post_processor=POST_PROCESSORS[name])
    tokenizer = Tokenizer(folder, signature("question-answering" if pair else "feature-extraction"))
    theirs = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    question = "fox </s>"  # a special token in the text is one of its tokens
    for document in ("the <mask> dog </s> </s> lazy <s> " * 5, "the quick " * 40, "fox " * 12, "fox " * 13):
        texts = (question, document) if pair else (document, None)
        theirs.no_truncation()
        fixed = theirs.num_special_tokens_to_add(pair) + (2 if pair else 0)
        strategy = "only_second" if pair else "only_first"
        theirs.enable_truncation(LONGEST, stride=LONGEST - fixed - stride, strategy=strategy)
        first = theirs.encode(*texts)
        expected = []
        for encoding in (first, *first.overflowing):
            positions = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == int(pair)]
            offsets = [encoding.offsets[i] for i in positions if pair]
            positions_range = range(positions[0], positions[-1] + 1)
            expected.append(Encoded(list(encoding.ids), list(encoding.tokens), positions_range, document, offsets))
        windows = tokenizer.windows(*texts, stride)
        assert len(windows) == len(expected) > 1
        assert list(windows) == expected
        assert (windows[-1], windows[1:3]) == (expected[-1], expected[1:3])


def test_of_a_choice_that_is_too_long_the_text_is_cut_and_the_choice_kept(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("multiple-choice"))
    theirs = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    theirs.enable_truncation(LONGEST, strategy="only_first")
    for choice in ("fox", "the lazy dog"):
        expected = theirs.encode("the quick fox " * 9, choice)
        assert tokenizer.truncate("the quick fox " * 9, choice).ids == list(expected.ids)
    with pytest.raises(
        InputError, match=r"the choice and .* leave no room for the text before it .*; shorten the choice"
    ):
        tokenizer.truncate("fox", "the dog " * 9)


def test_windows_are_slices_of_one_encoding_and_do_not_change_the_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("feature-extraction"))

    class Counted:
        calls: ClassVar[list[str]] = []

        def __getattr__(self, name: str) -> Any:
            self.calls.append(name)
            return getattr(inner, name)

    inner, tokenizer._tokenizer = tokenizer._tokenizer, Counted()  # type: ignore[assignment]
    windows = tokenizer.windows("the " * 5000, None, 1)
    assert len(windows) == 4991
    assert not isinstance(windows, list)
    assert Counted.calls.count("encode") == 1
    assert not {"enable_truncation", "no_truncation", "enable_padding", "no_padding"} & set(Counted.calls)


@pytest.mark.parametrize("stride", [True, "x", 1.5, -1, 2**70])
def test_windows_with_a_bad_stride_are_refused(folder: Path, stride: Any) -> None:
    with pytest.raises(InputError, match="stride"):
        Tokenizer(folder, signature("feature-extraction")).windows("the " * 50, None, stride)


def test_a_question_that_leaves_no_room_is_refused(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"13 tokens, which leave no room for the document .* 12; shorten the question"
    ):
        Tokenizer(folder, signature("feature-extraction")).windows("fox " * 9, "the dog", 1)


def test_a_post_processor_that_repeats_the_text_is_refused(folder: Path) -> None:
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [sequence, sequence], "pair": [sequence], "special_tokens": {}}
    change_tokenizer(folder, post_processor=template)
    with pytest.raises(InputError, match="repeats the text"):
        Tokenizer(folder, signature("feature-extraction")).windows("fox " * 50, None, 1)


def test_a_text_that_takes_gigabytes_is_refused_before_it_is_tokenized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(folder, replace(signature("feature-extraction"), max_seqlen=None))
    assert tokenizer.encode("a" * 10, "b" * 10)
    monkeypatch.setattr(tokenizer, "_tokenizer", None)
    for text, pair in (("a" * (MAX_CHARACTERS + 1), None), ("a", "b" * MAX_CHARACTERS)):
        for call in (tokenizer.encode, lambda t, p: tokenizer.windows(t, p, 1)):
            with pytest.raises(InputError, match=r"the text has 5,000,001 characters, above the 5,000,000 "):
                call(text, pair)


def test_a_text_without_tokens_is_refused(folder: Path) -> None:
    change_tokenizer(folder, post_processor=None)
    with pytest.raises(InputError, match="no tokens for this text"):
        Tokenizer(folder, signature("feature-extraction")).encode("  ")


def panicking_template() -> dict[str, Any]:
    """A post-processor with an undefined special token: the library's Rust code panics."""
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [special], "pair": [special], "special_tokens": {}}


def test_an_exception_of_the_tokenizer_is_an_input_error(folder: Path) -> None:
    without_unknown = {"type": "WordLevel", "vocab": {"fox": 5}, "unk_token": "<none>"}
    change_tokenizer(folder, model=without_unknown)
    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    assert tokenizer.encode("fox").ids == [START, 5, END]
    with pytest.raises(InputError, match=r"the tokenizer fails on this text: WordLevel error: Missing"):
        tokenizer.encode("zebra")


def test_a_panic_of_the_tokenizer_is_an_input_error(folder: Path) -> None:
    change_tokenizer(folder, post_processor=panicking_template())
    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    for read in (lambda: tokenizer.encode("fox"), lambda: tokenizer.windows("fox", None, 1)):
        with pytest.raises(InputError, match="the tokenizer fails on this text"):
            read()


def test_a_panic_while_a_tokenizer_is_loaded_is_an_artifact_error(folder: Path) -> None:
    change_tokenizer(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(ArtifactError, match=rf"{TOKENIZER} cannot be read"):
        Tokenizer(folder, signature("feature-extraction"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_interrupts_and_memory_errors_pass_through(folder: Path, error: type[BaseException]) -> None:
    class Stopped:
        def __getattr__(self, name: str) -> Any:
            raise error

    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    tokenizer._tokenizer = Stopped()  # type: ignore[assignment]
    for call in (lambda: tokenizer.encode("fox"), lambda: tokenizer.decode([5])):
        with pytest.raises(error):
            call()


ODD_CONFIGS: dict[str, tuple[str, str, str]] = {
    "labels null": ("config.json", '{"id2label": null}', "id2label must be an object of index and name"),
    "labels a list": ("config.json", '{"id2label": ["bad"]}', "id2label must be an object"),
    "a label no string": ("config.json", '{"id2label": {"0": 5}}', "id2label must be an object"),
    "a label no text": ("config.json", r'{"id2label": {"0": "\ud800"}}', "id2label must be an object"),
    "problem type": ("config.json", '{"problem_type": ["regression"]}', "problem_type must be a string or null"),
    "NaN": ("config.json", '{"dropout": NaN}', "NaN is not JSON"),
    "a key twice": ("config.json", '{"id2label": {}, "id2label": {}}', "the key 'id2label' appears twice"),
    "deep": ("config.json", '{"a": ' + "[" * 100_000, "is not JSON"),
    "split a number": ("tokenizer_config.json", '{"split_special_tokens": 1}', "split_special_tokens must be true"),
    "truncation up": ("tokenizer_config.json", '{"truncation_side": "up"}', "truncation_side must be left or right"),
    "mask a number": ("tokenizer_config.json", '{"mask_token": 5}', "mask_token must be a string"),
    "mask a list": ("tokenizer_config.json", '{"mask_token": ["<mask>"]}', "mask_token must be a string"),
    "mask no content": ("tokenizer_config.json", '{"mask_token": {"lstrip": true}}', "mask_token must be a string"),
    "mask a surrogate": ("tokenizer_config.json", r'{"mask_token": "\ud800"}', "broken mask_token"),
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_odd_configs_are_artifact_errors(folder: Path, name: str) -> None:
    file, content, reason = ODD_CONFIGS[name]
    (folder / file).write_text(content)
    with pytest.raises(ArtifactError, match=reason):
        Postprocessor(Tokenizer(folder, signature("fill-mask")))


@pytest.mark.parametrize("file", [TOKENIZER, "config.json", "tokenizer_config.json"])
def test_files_that_cannot_be_read_are_artifact_errors(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ArtifactError, match=file):
        Postprocessor(Tokenizer(folder, signature("fill-mask")))
    with path.open("wb") as sparse:
        sparse.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ArtifactError, match=rf"{file} has .* bytes, above"):
        Postprocessor(Tokenizer(folder, signature("fill-mask")))
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match=rf"{file} cannot be read: it is no file"):
        Postprocessor(Tokenizer(folder, signature("fill-mask")))
    path.rmdir()
    os.mkfifo(path)  # opening it would block until there is a writer
    with pytest.raises(ArtifactError, match=rf"{file} cannot be read: it is no file"):
        Postprocessor(Tokenizer(folder, signature("fill-mask")))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_no_more_of_a_tokenizer_is_read_than_its_size(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    (folder / TOKENIZER).symlink_to("/proc/self/status")  # a regular file of size 0, with content
    assert read_file(folder / TOKENIZER) == b""
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(folder, signature("fill-mask"))


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", 5])
def test_a_path_that_cannot_exist_is_an_artifact_error(path: Any) -> None:
    with pytest.raises(ArtifactError, match="the tokenizer's folder"):
        Tokenizer(path, signature("fill-mask"))


def test_an_id_outside_the_vocabulary_is_named(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("fill-mask"))
    for wrong in (99, 2**40, -1):
        with pytest.raises(InputError, match=f"{wrong}"):
            tokenizer.decode([5, wrong])


def test_arguments_of_another_type_are_refused(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("text-classification"))
    outputs = {"logits": np.float32([[1.0, 2.0, 3.0]])}
    for encoded, given in (
        (None, outputs),
        (tokenizer.encode("the fox"), None),
        (tokenizer.encode("the fox"), {"logits": [[1.0, 2.0, 3.0]]}),
        (tokenizer.encode("the fox"), {"logits": np.float32([1.0, 2.0, 3.0])}),
        (tokenizer.encode("the fox"), {"logits": np.array([["a", "b", "c"]])}),
    ):
        with pytest.raises(InputError, match="give what"):
            Postprocessor(tokenizer).answers(encoded, given)  # type: ignore[arg-type]
    for call in (
        lambda: Tokenizer(folder, None),  # type: ignore[arg-type]
        lambda: Postprocessor(folder),  # type: ignore[arg-type]
        lambda: Postprocessor(tokenizer).label(10**5000),
        lambda: Postprocessor(tokenizer).label(None),  # type: ignore[arg-type]
        lambda: tokenizer.windows("the fox", None, 10**5000),
        lambda: tokenizer.decode(None),  # type: ignore[arg-type]
        lambda: tokenizer.piece("fox"),  # type: ignore[arg-type]
        lambda: tokenizer.is_special([]),  # type: ignore[arg-type]
        lambda: tokenizer.has_id(-1),
        lambda: tokenizer.encode("the fox", prompt=["lazy "]),  # type: ignore[arg-type]
        lambda: tokenizer.encode("the fox", prompt=np.array(["lazy ", "quick "])),  # type: ignore[arg-type]
        lambda: tokenizer.windows("the fox", None, 1, prompt=True),  # type: ignore[arg-type]
        lambda: tokenizer.truncate("the fox", prompt=b""),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError):
            call()


def test_ids_are_read_once(folder: Path) -> None:
    assert Tokenizer(folder, signature("fill-mask")).decode(iter([5, 6]))


def test_the_digest_covers_all_files_that_decide_an_answer(folder: Path) -> None:
    digests = {Tokenizer(folder, signature("fill-mask")).sha256}
    for file, content in (("config.json", "{}"), ("tokenizer_config.json", "{}"), (TOKENIZER, None)):
        (folder / file).write_text(content or (folder / TOKENIZER).read_text() + " ")
        digests.add(Tokenizer(folder, signature("fill-mask")).sha256)
    assert len(digests) == 4
