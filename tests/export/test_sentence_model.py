"""Folders of sentence-transformers export as sentence embeddings, and keep their settings in every bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from lfx.errors import ExportError
from lfx.export import export
from lfx.export.load import load, load_tokenizer
from lfx.export.pooling import LongformerForSentenceEmbedding, Normalize
from lfx.export.probe import is_hugging_face, is_unchanged
from lfx.export.sentence_model import add_lower_case
from lfx.manifest import Manifest
from lfx.runtime import Engine
from lfx.signature import POOLINGS
from tests.export.test_pooling import pooled
from tests.marks import fast_if
from tests.models import make_sentence_folder, save_tiny_checkpoint, tiny_model, tiny_tokenizer

OUTPUT = "sentence_embedding"
KEPT = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
ALL_OFF = dict.fromkeys(FLAGS.values(), False)
LONG = 4098  # positions, for 4,096 tokens
WORDS = "the quick brown fox jumps over the lazy dog"


def sentences(folder: Path, pooling: dict[str, Any] | None = None, **modules: dict[str, Any]) -> Path:
    """A folder of sentence-transformers with a tokenizer."""
    return add_sentences(save_tiny_checkpoint(folder), pooling, **modules)


def add_sentences(folder: Path, pooling: dict[str, Any] | None = None, **modules: dict[str, Any]) -> Path:
    """Make a checkpoint a folder of sentence-transformers, with a tokenizer."""
    tiny_tokenizer().save_pretrained(folder)
    return make_sentence_folder(folder, {"pooling_mode": "mean"} if pooling is None else pooling, **modules)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        load(str(folder), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def padded(rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the mask of sequences, padded on a side."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 1), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@pytest.fixture(scope="module")
def all_modes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose vectors are those of all modes, one after the other, and its bundle."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("all") / "c", max_position_embeddings=LONG)
    add_sentences(folder, {"pooling_mode": POOLINGS}, Normalize={})
    return folder, export(folder, folder.parent / "b")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_bundle_is_the_pooled_hidden_states_of_torch(side: str, all_modes: tuple[Path, Path]) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(3, 99, size).tolist() for size in (3, 4000, 17, 1, 40)]
    model, expected = tiny_model(max_position_embeddings=LONG), []
    for row in rows:
        with torch.no_grad():
            hidden = model(torch.tensor([row])).last_hidden_state[0].double().numpy()
        vector = np.concatenate([pooled(mode, hidden, [1] * len(row)) for mode in POOLINGS])
        expected.append(vector / np.linalg.norm(vector))
    with Engine(all_modes[1]) as engine:
        assert engine.signature.task == "sentence-embedding"
        assert engine.signature.default_global == "none"
        assert [(spec.name, spec.shape) for spec in engine.signature.outputs] == [(OUTPUT, ("batch", 6 * 32))]
        np.testing.assert_allclose(engine.run(*padded(rows, side))[OUTPUT], expected, atol=2e-6)
        np.testing.assert_allclose(engine.run(rows)[OUTPUT], expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_vectors_have_norm_1_in_every_precision(precision: str, tmp_path: Path) -> None:
    folder = sentences(tmp_path / "c", {"pooling_mode": ["cls", "weightedmean"]}, Normalize={})
    with Engine(export(folder, tmp_path / "b", precision=precision), "reference") as engine:
        embedding = engine.run([[5, 6, 7], [8, 9, 10]])[OUTPUT]
    assert embedding.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        *(({**ALL_OFF, flag: True}, (mode,)) for mode, flag in FLAGS.items()),
        ({"pooling_mode_mean_tokens": True}, ("mean",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({}, ("mean",)),
        ({"pooling_mode": "max"}, ("max",)),
        ({"pooling_mode": ["max", "cls"], "include_prompt": True}, ("max", "cls")),
        ({"pooling_mode": "max", "pooling_mode_cls_token": True}, ("max",)),
    ],
)
def test_every_form_of_a_pooling_is_read(settings: dict[str, Any], modes: tuple[str, ...], tmp_path: Path) -> None:
    folder = sentences(tmp_path / "c", settings)
    edit(folder / "1_Pooling" / "config.json", word_embedding_dimension=32)
    model, task = load(str(folder))
    assert isinstance(model, LongformerForSentenceEmbedding)
    assert (task, model.pooling.modes, model.module_names) == ("sentence-embedding", modes, [])


@fast_if(lambda suffix: suffix == "safetensors")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_modules_after_a_pooling_are_computed(suffix: str, tmp_path: Path) -> None:
    dense = {"in_features": 32, "out_features": 6, "activation_function": "torch.nn.modules.activation.ReLU"}
    folder = sentences(tmp_path / "c", None, LayerNorm={"dimension": 32}, Dropout={"dropout": 0.5}, Dense=dense)
    random = torch.Generator().manual_seed(0)
    weight, bias, scale, shift = (torch.randn(shape, generator=random) for shape in ((6, 32), (6,), (32,), (32,)))
    for path, tensors in (
        (folder / "2_LayerNorm", {"norm.weight": scale, "norm.bias": shift}),
        (folder / "4_Dense", {"linear.weight": weight, "linear.bias": bias}),
    ):
        if suffix == "bin":
            torch.save(tensors, path / "pytorch_model.bin")
        else:
            safetensors.torch.save_file(tensors, path / "model.safetensors")
    edit(folder / "config_sentence_transformers.json", truncate_dim=4)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        mean = tiny_model()(ids).last_hidden_state.mean(dim=1)
        expected = nn.functional.layer_norm(mean, (32,), scale, shift) @ weight.T + bias
    with Engine(export(folder, tmp_path / "b")) as engine:
        actual = engine.run(ids.numpy())[OUTPUT]
    np.testing.assert_allclose(actual, expected.relu()[:, :4], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_pooling_embeds_a_bare_model_without_a_norm(mode: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c", "fill-mask")
    bundle = export(folder, tmp_path / "b", pooling=mode)
    assert Manifest.read(bundle).source["pooling"] == mode
    expected, task = load(str(folder), pooling=mode)
    assert task == "sentence-embedding"
    with Engine(bundle) as engine, torch.no_grad():
        ids = torch.arange(3, 30)[None]
        hidden = expected.longformer(ids).last_hidden_state[0].double().numpy()
        np.testing.assert_allclose(engine.run(ids.numpy())[OUTPUT][0], pooled(mode, hidden, [1] * 27), atol=1e-5)


@pytest.mark.slow
def test_pooling_embeds_a_module_in_memory_and_leaves_it(tmp_path: Path) -> None:
    model = tiny_model().train()
    bundle = export(model, tmp_path / "b", pooling="cls")
    assert model.training
    assert Manifest.read(bundle).signature.architecture == "LongformerForSentenceEmbedding"
    with pytest.raises(ExportError, match="pooling 'cls' needs a LongformerModel, and this is a LongformerForMaskedLM"):
        export(tiny_model("fill-mask"), tmp_path / "c", pooling="cls")


@pytest.mark.slow
def test_the_task_of_the_bare_model_is_kept_and_so_are_the_settings(tmp_path: Path) -> None:
    folder = sentences(tmp_path / "c", None, Dense={"in_features": 32, "out_features": 4})
    bundle = export(folder, tmp_path / "b", task="feature-extraction")
    manifest = Manifest.read(bundle)
    assert manifest.signature.task == "feature-extraction"
    for name in [*KEPT, "2_Dense/config.json"]:
        assert json.loads((bundle / name).read_text()) == json.loads((folder / name).read_text())
        assert name in manifest.files
    Engine(bundle).close()


@pytest.mark.slow
def test_the_settings_of_other_modules_are_kept_for_the_bare_model(tmp_path: Path) -> None:
    """Whatever class a module has; no code and no weights."""
    folder = sentences(tmp_path / "c", {"auto_map": {"a": "b"}, "own": 5})
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "modeling.OwnPooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "modeling.py").write_text("raise SystemExit")
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 5}')
    bundle = export(folder, tmp_path / "b")
    assert Manifest.read(bundle).signature.task == "feature-extraction"
    assert json.loads((bundle / "modules.json").read_text()) == modules
    assert json.loads((bundle / "1_Pooling" / "config.json").read_text()) == {"embedding_dimension": 32, "own": 5}
    assert (bundle / "sentence_roberta_config.json").exists()
    assert not list(bundle.rglob("*.py"))


@pytest.mark.parametrize("path", ["../x", "/tmp", "..", "a/b", 5, None])
@pytest.mark.parametrize("task", ["auto", "feature-extraction"])
def test_a_module_of_another_folder_is_refused(path: Any, task: str, tmp_path: Path) -> None:
    folder = sentences(tmp_path / "c")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ExportError, match="module 1 has the path"):
        export(folder, tmp_path / "b", task=task)
    assert not (tmp_path / "b").exists()


def set_modules(*names: str) -> Any:
    def change(folder: Path) -> None:
        entries = [
            {"path": f"{i}_{name}", "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)
        ]
        entries[0]["path"] = ""
        (folder / "modules.json").write_text(json.dumps(entries))

    return change


def set_pooling(**changes: Any) -> Any:
    return lambda folder: edit(folder / "1_Pooling" / "config.json", **changes)


def set_encoder(**changes: Any) -> Any:
    return lambda folder: edit(folder / "sentence_bert_config.json", **changes)


def set_dense(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        set_modules("Transformer", "Pooling", "Dense")(folder)
        (folder / "2_Dense").mkdir()
        weights = changes.pop("weights", {"linear.weight": torch.ones(4, 32)})
        if weights:
            safetensors.torch.save_file(weights, folder / "2_Dense" / "model.safetensors")
        edit(folder / "2_Dense" / "config.json", **{"in_features": 32, "bias": False, **changes})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            set_modules("Transformer", "WordWeights", "Pooling"),
            "module 1 is 'sentence_transformers.models.WordWeights'",
        ),
        (set_modules("Transformer", "Pooling", "Pooling"), "a Pooling must follow the Transformer"),
        (set_modules("Transformer", "Normalize", "Pooling"), "a Pooling must follow the Transformer"),
        (set_modules("Transformer", "Pooling", *["Normalize"] * 99), "has 101 modules; at most 100 are read"),
        (set_pooling(pooling_mode="median"), "pooling 'median' is not known"),
        (set_pooling(pooling_mode=5), "pooling_mode is no name, and no list of up to 6"),
        (set_pooling(pooling_mode=["mean"] * 7), "pooling_mode is no name, and no list of up to 6"),
        (set_pooling(include_prompt=False), "include_prompt is false"),
        (set_pooling(embedding_dimension=64), "embedding_dimension is 64, and the Longformer's is 32"),
        (lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "1_Pooling has no config.json"),
        (set_encoder(transformer_task="fill-mask"), "lfx knows no transformer_task but 'feature-extraction'"),
        (set_encoder(tokenizer_args={"truncation_side": "left"}), "lfx knows no tokenizer_args"),
        (
            set_encoder(modality_config={"text": {"method": "forward", "method_output_name": "logits"}}),
            "modality_config",
        ),
        (set_encoder(max_seq_length="x"), "max_seq_length"),
        (set_encoder(do_lower_case="x"), "do_lower_case"),
        (set_dense(activation_function="torch.nn.modules.activation.Softmax"), "activation_function 'Softmax' is none"),
        (set_dense(activation_function="os.system"), "is no class of torch.nn"),
        (set_dense(module_input_name="token_embeddings"), "module_input_name is 'token_embeddings'"),
        (set_dense(bias=True), "2_Dense has the weights linear.weight (4, 32), and its config describes"),
        (set_dense(weights={"linear.weight": torch.ones(4, 5)}), "a linear.weight (4, 5), and gets 32 values"),
        (set_dense(weights={}), "2_Dense has no weights"),
        (lambda folder: edit(folder / "config_sentence_transformers.json", truncate_dim=0), "truncate_dim"),
    ],
)
def test_what_lfx_does_not_know_is_refused_and_never_dropped(change: Any, reason: str, tmp_path: Path) -> None:
    folder = sentences(tmp_path / "c")
    change(folder)
    with pytest.raises(ExportError) as caught:
        export(folder, tmp_path / "b")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load(str(folder), "feature-extraction")[1] == "feature-extraction"


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bare, folder = save_tiny_checkpoint(tmp_path / "bare"), sentences(tmp_path / "c")
    assert "has no pooling of sentence-transformers; choose one" in refusal(bare, task="sentence-embedding")
    assert "has a pooling of its own, in modules.json" in refusal(folder, pooling="cls")
    assert "not fill-mask; leave one of them out" in refusal(bare, task="fill-mask", pooling="cls")
    assert "pooling 'median' is not known" in refusal(bare, pooling="median")


@fast_if(lambda longest: longest == 40)
@pytest.mark.parametrize(
    ("max_seq_length", "of_tokenizer", "asked", "longest"),
    [(40, 20, None, 40), (None, 20, None, 20), (5000, None, None, 128), (40, 20, 100, 100)],
)
def test_the_longest_sequence_is_that_of_sentence_transformers(
    max_seq_length: int | None, of_tokenizer: int | None, asked: int | None, longest: int, tmp_path: Path
) -> None:
    folder = sentences(tmp_path / "c")
    edit(folder / "sentence_bert_config.json", max_seq_length=max_seq_length)
    if of_tokenizer is not None:
        edit(folder / "tokenizer_config.json", model_max_length=of_tokenizer)
    assert Manifest.read(export(folder, tmp_path / "b", max_seqlen=asked)).signature.max_seqlen == longest


@pytest.mark.slow
def test_texts_become_lower_case_if_sentence_transformers_converts_them(tmp_path: Path) -> None:
    folder = sentences(tmp_path / "c")
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    with Engine(export(folder, tmp_path / "b")) as engine:
        assert np.array_equal(engine.embed(WORDS.upper()), engine.embed(WORDS))
    tokenizer = load_tokenizer(str(folder))
    before = tokenizer.backend_tokenizer.to_str()
    export(folder, tmp_path / "given", tokenizer=tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    add_lower_case(tokenizer)
    once = tokenizer.backend_tokenizer.to_str()
    add_lower_case(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == once


@pytest.mark.slow
def test_a_model_of_the_hub_brings_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = sentences(tmp_path / "hub" / "c0ffee", None, Normalize={})

    def cached_file(model: str, name: str, *, revision: str, **_: Any) -> str | None:
        assert revision in ("main", "c0ffee")
        return str(snapshot / name) if (snapshot / name).exists() else None

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    monkeypatch.chdir(tmp_path)
    bundle = export("me/model")
    assert Manifest.read(bundle).signature.task == "sentence-embedding"
    assert {*KEPT, "2_Normalize/config.json"} <= Manifest.read(bundle).files.keys()


def test_a_pooled_longformer_is_known_and_a_subclass_is_not() -> None:
    assert is_unchanged(LongformerForSentenceEmbedding(tiny_model(), ["max"], [nn.LayerNorm(32), Normalize()]))
    subclass = type("Own", (type(tiny_model()),), {})
    model = tiny_model()
    model.__class__ = subclass
    assert not is_hugging_face(LongformerForSentenceEmbedding(model, ["max"]))


@pytest.mark.slow
@pytest.mark.parametrize("new", [False, True])
def test_the_vectors_are_those_of_sentence_transformers(
    new: bool, all_modes: tuple[Path, Path], tmp_path: Path
) -> None:
    reason = "sentence-transformers is not installed: the modes are compared with their definition alone"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    folder, bundle = all_modes
    if not new:
        folder = save_tiny_checkpoint(tmp_path / "c", max_position_embeddings=LONG)
        add_sentences(folder, dict.fromkeys(FLAGS.values(), True), Normalize={})
        bundle = export(folder, tmp_path / "b")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    texts = [" ".join((WORDS.split() * 500)[:size]) for size in (1, 3, 9, 20, 600, 3998)]
    with Engine(bundle) as engine:
        np.testing.assert_allclose(engine.embed(texts), theirs.encode(texts), atol=2e-6)
        for side in ("left", "right"):
            theirs.tokenizer.padding_side = side
            encoded = theirs.tokenizer(texts, padding=True, return_tensors="pt")
            features = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                expected = theirs(dict(features))[OUTPUT]
            actual = engine.run(*(tensor.numpy() for tensor in features.values()))[OUTPUT]
            np.testing.assert_allclose(actual, expected, atol=2e-6)
