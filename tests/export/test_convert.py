"""`convert`: the Longformer computes what the original does, or the conversion is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lfx.errors import ExportError, LfxError, ParityError
from lfx.export import convert, export
from lfx.export import encoder as encoders
from lfx.export.converter import convert_and_compare
from lfx.export.longformer import make_longformer
from lfx.parity import pair_tolerance
from lfx.runtime import Engine
from lfx.signature import SENTENCE_EMBEDDING, TASKS
from tests.conftest import MakeBundle, SmallDisk
from tests.encoders import COUNTED, FAMILIES, POSITIONS, save_pieces, save_tiny_encoder, save_wordpieces, tiny_encoder
from tests.marks import fast_if
from tests.models import LONGFORMER_TASKS, VOCAB_SIZE, save_tiny_checkpoint, tiny_tokenizer

WINDOW = 16  # both sides together: a sequence of up to 9 tokens is within one side
EQUAL = WINDOW // 2 + 1
LENGTH = 200
ENDINGS = [
    TASKS[name].architecture.removeprefix("Longformer") for name in LONGFORMER_TASKS if name != SENTENCE_EMBEDDING
]
PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits")
REFUSED = {
    ("Electra", "ForSequenceClassification"): "its head applies GELU, and Longformer's applies tanh",
    ("Electra", "ForMultipleChoice"): "its head sums a sequence up with GELU, and Longformer's with tanh",
    ("DistilBert", "ForSequenceClassification"): "its head applies ReLU, and Longformer's applies tanh",
    ("DistilBert", "ForMultipleChoice"): "its head applies ReLU, and Longformer's applies tanh",
}
CARRIED = [(family, ending) for family in FAMILIES for ending in ENDINGS if (family, ending) not in REFUSED]


def ids_of(batch: int, length: int, pad: int, seed: int = 0) -> torch.Tensor:
    """Random ids without the padding id."""
    ids = torch.randint(4, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
    assert pad < 4
    return ids


def outputs_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs: Any) -> dict[str, np.ndarray]:
    """The outputs of a model by name; those of padding are 0. For multiple choice each row becomes two choices."""
    mask = torch.ones_like(ids) if mask is None else mask
    choice = type(model).__name__.endswith("MultipleChoice")
    names = {"input_ids": ids, "attention_mask": mask, **inputs}
    if choice:
        names = {name: torch.stack([tensor, tensor], 1) for name, tensor in names.items()}
        names["input_ids"][:, 1] = torch.where(mask == 1, (ids + 1) % (VOCAB_SIZE - 4) + 4, ids)
    if type(model).__name__.startswith("Longformer") and "global_attention_mask" not in names:
        names["global_attention_mask"] = torch.zeros_like(names["input_ids"])
    with torch.no_grad():
        outputs = {name: output for name, output in model(**names).items() if isinstance(output, torch.Tensor)}
    for name, output in outputs.items():
        if name in PER_TOKEN or (name == "logits" and output.shape[:2] == ids.shape and output.dim() == 3):
            outputs[name] = output * mask.reshape(mask.shape + (1,) * (output.dim() - 2))
    return {name: output.numpy() for name, output in outputs.items()}


def largest_difference(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference of two models' outputs, in tolerances: up to 1 is rounding."""
    assert actual.keys() == expected.keys()
    differences = []
    for name, output in expected.items():
        assert actual[name].shape == output.shape
        tolerance = pair_tolerance("fp32", 2, float(np.abs(output).max()))
        differences.append(float(np.abs(actual[name] - output).max()) / tolerance)
    return max(differences)


def opened(folder: Path) -> Any:
    """The model that transformers opens in a folder, by the architecture in its config."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    pooler = {}
    if name == "LongformerModel":  # transformers would make a random one
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            pooler = {"add_pooling_layer": "pooler.dense.weight" in file.keys()}  # noqa: SIM118
    return getattr(transformers, name).from_pretrained(folder, **pooler).eval()


def needs_pooler(family: str, ending: str) -> None:
    """Skip a class of transformers that is broken in an older version."""
    encoder = tiny_encoder(family, ending).base_model
    if ending == "ForMultipleChoice" and encoder.pooler is None:
        pytest.skip(f"the {family}{ending} of transformers {transformers.__version__} has no pooler")


def refusal(model: Path, output: Path, **options: Any) -> str:
    """The one-line error of a conversion, which leaves nothing behind."""
    with pytest.raises(ExportError) as caught:
        convert(model, output, **{"max_seqlen": LENGTH, "attention_window": WINDOW, **options})
    assert "\n" not in str(caught.value)
    assert not list(output.parent.glob(".lfx*"))
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@fast_if(lambda family, ending: family == "Roberta" or (family, ending) == ("Bert", "Model"))
@pytest.mark.parametrize(("family", "ending"), CARRIED)
def test_every_family_and_head_computes_what_the_original_does(tmp_path: Path, family: str, ending: str) -> None:
    needs_pooler(family, ending)
    original = tiny_encoder(family, ending)
    original.save_pretrained(tmp_path / "original")
    made = convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW)
    longformer = opened(made)
    assert type(longformer).__name__ == f"Longformer{ending}"
    pad = longformer.config.pad_token_id
    for length in (1, 2, EQUAL - 1, EQUAL):
        ids = ids_of(3, length, pad)
        assert largest_difference(outputs_of(longformer, ids), outputs_of(original, ids)) <= 1
        mask = torch.ones_like(ids)
        for row in range(1, 3):
            mask[row, max(1, length - 2 * row) :] = 0
        ids[mask == 0] = pad
        globals_ = torch.zeros_like(ids)
        globals_[:, 0] = 1  # within one side of the window, global attention changes nothing
        expected = outputs_of(original, ids, mask)
        assert largest_difference(outputs_of(longformer, ids, mask), expected) <= 1
        assert largest_difference(outputs_of(longformer, ids, mask, global_attention_mask=globals_), expected) <= 1
    ids = ids_of(1, EQUAL + 9, pad)  # a token does not see all others any more
    assert largest_difference(outputs_of(longformer, ids), outputs_of(original, ids)) > 10
    long = outputs_of(longformer, ids_of(1, LENGTH, pad))
    assert all(np.isfinite(output).all() for output in long.values())


@fast_if(lambda family: family in ("Bert", "Roberta"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_for_the_whole_sequence_is_equal_at_every_position(tmp_path: Path, family: str) -> None:
    original = tiny_encoder(family)
    original.save_pretrained(tmp_path / "original")
    done = convert_and_compare(tmp_path / "original", tmp_path / "made", LENGTH, 2 * POSITIONS, lambda step: None)
    assert done.equal_seqlen == POSITIONS
    ids = ids_of(2, POSITIONS, 1)
    assert largest_difference(outputs_of(opened(done.folder), ids), outputs_of(original, ids)) <= 1


@fast_if(lambda family: family in ("Bert", "Roberta"))
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_repeated_and_the_rows_of_padding_are_not(tmp_path: Path, family: str) -> None:
    original = tiny_encoder(family)
    original.save_pretrained(tmp_path / "original")
    longformer = opened(convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW))
    table = original.get_parameter("embeddings.position_embeddings.weight").detach()
    pad = longformer.config.pad_token_id
    assert pad == (1 if family in COUNTED else 0)
    rows = table[pad + 1 :] if family in COUNTED else table
    made = longformer.embeddings.position_embeddings.weight.detach()
    assert made.shape == (LENGTH + pad + 1, 32)
    for start in range(0, LENGTH, POSITIONS):
        assert torch.equal(made[pad + 1 + start :][: len(rows)], rows[: LENGTH - start])
    if family in COUNTED:
        assert torch.equal(made[: pad + 1], table[: pad + 1])


def test_global_projections_are_copies_of_the_local_ones(tmp_path: Path) -> None:
    longformer = opened(convert(save_tiny_encoder(tmp_path / "b", "Bert"), tmp_path / "made", LENGTH, WINDOW))
    for layer in longformer.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            local, global_ = getattr(attention, name), getattr(attention, f"{name}_global")
            assert torch.equal(local.weight, global_.weight)
            assert torch.equal(local.bias, global_.bias)
            assert local.weight.data_ptr() != global_.weight.data_ptr()


@fast_if(lambda family: family == "Roberta")
@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("pattern", ["left", "inside"])
def test_padding_anywhere_is_equal_where_the_original_counts_tokens(tmp_path: Path, family: str, pattern: str) -> None:
    original = tiny_encoder(family)
    original.save_pretrained(tmp_path / "original")
    longformer = opened(convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW))
    ids = ids_of(2, EQUAL, 1)
    mask = torch.ones_like(ids)
    mask[:, : 3 if pattern == "left" else 0] = 0
    mask[:, 4:6] = 1 if pattern == "left" else 0
    ids[mask == 0] = 1
    expected, actual = outputs_of(original, ids, mask), outputs_of(longformer, ids, mask)
    for name in ("last_hidden_state",):
        assert largest_difference({name: actual[name]}, {name: expected[name]}) <= 1


def test_left_padding_does_not_shift_the_positions_of_a_converted_bert(tmp_path: Path) -> None:
    """BERT gives the first token behind the padding another position; a Longformer does not."""
    original = tiny_encoder("Bert")
    original.save_pretrained(tmp_path / "original")
    longformer = opened(convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW))
    ids = ids_of(1, 6, 0)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (padded != 0).long()
    name = "last_hidden_state"
    expected = {name: outputs_of(original, ids)[name]}
    assert largest_difference({name: outputs_of(longformer, padded, mask)[name][:, 3:]}, expected) <= 1
    assert largest_difference({name: outputs_of(original, padded, mask)[name][:, 3:]}, expected) > 10


@pytest.mark.parametrize("family", ["Bert", "Electra"])
def test_token_types_are_carried(tmp_path: Path, family: str) -> None:
    original = tiny_encoder(family)
    original.save_pretrained(tmp_path / "original")
    longformer = opened(convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW))
    ids = ids_of(2, EQUAL, 0)
    types = torch.zeros_like(ids)
    types[:, 4:] = 1
    expected = outputs_of(original, ids, token_type_ids=types)
    assert largest_difference(outputs_of(longformer, ids, token_type_ids=types), expected) <= 1
    assert largest_difference(outputs_of(longformer, ids), expected) > 10


def test_each_layer_may_have_a_window_of_its_own(tmp_path: Path) -> None:
    model = save_tiny_encoder(tmp_path / "b", "Bert")
    done = convert_and_compare(model, tmp_path / "made", LENGTH, (8, 24), lambda step: None)
    assert opened(done.folder).config.attention_window == [8, 24]
    assert done.equal_seqlen == 5  # by the narrowest


def test_settings_are_carried(tmp_path: Path) -> None:
    labels = {0: "bad", 1: "good", 2: "so-so"}
    settings = {
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "hidden_dropout_prob": 0.25,
        "attention_probs_dropout_prob": 0.125,
        "initializer_range": 0.3,
        "id2label": labels,
        "label2id": {name: i for i, name in labels.items()},
        "problem_type": "multi_label_classification",
    }
    model = save_tiny_encoder(tmp_path / "b", "Bert", "ForSequenceClassification", **settings)
    config = AutoConfig.from_pretrained(convert(model, tmp_path / "made", LENGTH, WINDOW))
    assert {name: getattr(config, name) for name in settings} == settings
    assert (config.model_type, config.attention_window, config.vocab_size) == ("longformer", [WINDOW] * 2, VOCAB_SIZE)
    assert config.max_position_embeddings == LENGTH + 1


@fast_if(lambda family: family == "Bert")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "Electra"])
def test_a_decoder_is_tied_as_the_original_is(tmp_path: Path, family: str, tied: bool) -> None:
    original = tiny_encoder(family, "ForMaskedLM", tie_word_embeddings=tied)
    original.save_pretrained(tmp_path / "original")
    longformer = opened(convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW))
    assert longformer.config.tie_word_embeddings is tied
    decoder, words = longformer.get_output_embeddings().weight, longformer.get_input_embeddings().weight
    assert (decoder.data_ptr() == words.data_ptr()) is tied
    ids = ids_of(1, EQUAL, 1)
    assert largest_difference(outputs_of(longformer, ids), outputs_of(original, ids)) <= 1


@fast_if(lambda family: family == "Roberta")
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("same_weight", [True, False])
def test_a_decoder_that_is_stored_apart_is_carried_apart(tmp_path: Path, family: str, *, same_weight: bool) -> None:
    """The two biases, of which one is added, differ in any case."""
    original = tiny_encoder(family, "ForMaskedLM", tie_word_embeddings=False)
    if same_weight:
        original.get_output_embeddings().weight.data.copy_(original.get_input_embeddings().weight)
    original.save_pretrained(tmp_path / "original")
    edit(tmp_path / "original" / "config.json", tie_word_embeddings=True)
    opens_as = type(original).from_pretrained(tmp_path / "original").eval()
    longformer = opened(convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW))
    ids = ids_of(1, EQUAL, 1)
    assert largest_difference(outputs_of(longformer, ids), outputs_of(opens_as, ids)) <= 1


@pytest.mark.parametrize(
    ("family", "architecture"), [("Bert", "LongformerForMaskedLM"), ("Electra", "LongformerModel")]
)
def test_the_head_of_pretraining_alone_is_left_out(tmp_path: Path, family: str, architecture: str) -> None:
    model = save_tiny_encoder(tmp_path / "p", family, "ForPreTraining")
    assert type(opened(convert(model, tmp_path / "made", LENGTH, WINDOW))).__name__ == architecture


def test_a_checkpoint_without_architecture_or_pooler_is_the_bare_model(tmp_path: Path) -> None:
    from lfx.export.load import load

    folder = save_tiny_encoder(tmp_path / "b", "Roberta", "ForMaskedLM")
    edit(folder / "config.json", architectures=None)
    made = convert(folder, tmp_path / "made", LENGTH, WINDOW)
    model, task = load(str(made))
    assert (task, model.pooler) == ("feature-extraction", None)


def test_plain_torch_weights_and_half_precision_are_converted(tmp_path: Path) -> None:
    original = tiny_encoder("Bert").half()
    original.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").unlink()
    torch.save(original.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    longformer = opened(convert(tmp_path / "b", tmp_path / "made", LENGTH, WINDOW))
    ids = ids_of(1, EQUAL, 0)
    assert largest_difference(outputs_of(longformer, ids), outputs_of(original.float(), ids)) <= 1


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_weights_are_float32_with_another_default_dtype(family: str, tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "checkpoint", family)
    torch.set_default_dtype(torch.float64)
    try:
        made = convert(tmp_path / "checkpoint", tmp_path / "made", LENGTH, WINDOW)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in load_file(made / "model.safetensors").values()} == {torch.float32}


EXPORTED = [
    ("Bert", "ForSequenceClassification"),
    ("Roberta", "ForMaskedLM"),
    ("XLMRoberta", "Model"),
    ("Camembert", "ForTokenClassification"),
    ("Electra", "ForQuestionAnswering"),
    ("DistilBert", "Model"),
]


@fast_if(lambda family: family == "Roberta")
@pytest.mark.parametrize(("family", "ending"), EXPORTED)
def test_the_engine_of_the_converted_checkpoint_computes_what_the_original_does(
    tmp_path: Path, family: str, ending: str
) -> None:
    original = tiny_encoder(family, ending)
    original.save_pretrained(tmp_path / "original")
    made = convert(tmp_path / "original", tmp_path / "made", LENGTH, WINDOW)
    # The question of BERT's format has one separator, and Hugging Face's rule for global tokens wants two.
    options = {"global_attention": "none"} if ending == "ForQuestionAnswering" else {}
    with Engine(export(made, tmp_path / "bundle", **options)) as engine:
        assert engine.signature.max_seqlen == LENGTH
        rows = [ids_of(1, length, 1, seed=length)[0] for length in (1, 5, EQUAL)]
        outputs = engine.run([row.numpy() for row in rows])
        for i, row in enumerate(rows):
            expected = outputs_of(original, row[None])
            assert outputs.keys() == expected.keys()
            actual = {name: np.asarray(output[i])[None] for name, output in outputs.items()}
            assert largest_difference(actual, expected) <= 1
        assert all(np.isfinite(output).all() for output in engine.run(ids_of(1, LENGTH, 1).numpy()).values())


TEXTS = ("the quick Brown fox?", "Die FÜCHSE", "fox " * 150)


@pytest.mark.parametrize(
    ("family", "save"),
    [("Bert", save_wordpieces), ("DistilBert", save_wordpieces), ("XLMRoberta", save_pieces), ("Roberta", None)],
)
def test_the_tokenizer_stays_the_family_s_and_its_limit_is_raised(tmp_path: Path, family: str, save: Any) -> None:
    folder = save_tiny_encoder(tmp_path / "original", family)
    (save or tiny_tokenizer().save_pretrained)(folder)
    before = AutoTokenizer.from_pretrained(folder)
    if save is save_wordpieces:
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": null}')
    made = convert(folder, tmp_path / "made", LENGTH, WINDOW)
    after = AutoTokenizer.from_pretrained(made)
    assert json.loads((made / "tokenizer_config.json").read_text())["tokenizer_class"] == type(before).__name__
    assert after.model_max_length == LENGTH
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids
    pair, pair_before = after(TEXTS[0], "a fox"), before(TEXTS[0], "a fox")
    assert pair.input_ids == pair_before.input_ids
    assert pair.get("token_type_ids") == pair_before.get("token_type_ids")
    assert len(after(TEXTS[2], truncation=True).input_ids) == min(LENGTH, len(after(TEXTS[2]).input_ids))
    config = AutoConfig.from_pretrained(made)
    assert (config.sep_token_id, config.pad_token_id) == (after.sep_token_id, after.pad_token_id)


@pytest.mark.slow
def test_a_text_gives_the_same_outputs_in_the_bundle(tmp_path: Path) -> None:
    from lfx.runtime.tokenizer import Tokenizer

    folder = save_wordpieces(save_tiny_encoder(tmp_path / "original", "Bert"))
    bundle = export(convert(folder, tmp_path / "made", LENGTH, WINDOW), tmp_path / "bundle")
    with Engine(bundle) as engine:
        ids = Tokenizer(bundle, engine.signature).encode("A Fox?").ids
        assert ids == AutoTokenizer.from_pretrained(folder)("A Fox?").input_ids
        assert largest_difference(engine.run(ids), outputs_of(tiny_encoder("Bert"), torch.tensor([ids]))) <= 1


def test_truncation_in_a_tokenizer_s_file_is_raised(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "original", "Roberta")
    tiny_tokenizer().save_pretrained(folder)
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", truncation=truncation)
    made = convert(folder, tmp_path / "made", LENGTH, WINDOW)
    assert json.loads((made / "tokenizer.json").read_text())["truncation"] == {**truncation, "max_length": LENGTH}


def test_the_padding_id_of_the_tokenizer_counts_for_a_bert(tmp_path: Path) -> None:
    """BERT numbers padding too, so that a wrong pad_token_id in its config shows nowhere."""
    folder = save_tiny_encoder(tmp_path / "original", "Bert", pad_token_id=0)
    tiny_tokenizer().save_pretrained(folder)  # with padding 1 and <s> 0
    longformer = opened(convert(folder, tmp_path / "made", LENGTH, WINDOW))
    assert longformer.config.pad_token_id == 1
    ids = torch.tensor([[0, 5, 6, 2]])
    assert largest_difference(outputs_of(longformer, ids), outputs_of(tiny_encoder("Bert"), ids)) <= 1


@pytest.mark.parametrize("token", ["[SEP]", "[UNK]"])
def test_a_bert_whose_padding_id_occurs_in_texts_is_refused(tmp_path: Path, token: str) -> None:
    folder = save_wordpieces(save_tiny_encoder(tmp_path / "original", "Bert"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = token
    tokenizer.save_pretrained(folder)
    with pytest.raises(ExportError, match=rf"pads with the id {tokenizer.pad_token_id}, which is its \w+_token_id too"):
        convert(folder, tmp_path / "made", LENGTH, WINDOW)
    assert not (tmp_path / "made").exists()


def test_windows_that_hugging_face_cannot_run_together_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "original", "Bert")
    with pytest.raises(ExportError, match=r"attention_window 8,10: .* each window must divide it"):
        convert(folder, tmp_path / "made", LENGTH, [8, 10])


@pytest.mark.parametrize(("family", "ending"), REFUSED)
def test_a_head_that_computes_something_else_is_refused(tmp_path: Path, family: str, ending: str) -> None:
    message = refusal(save_tiny_encoder(tmp_path / "e", family, ending), tmp_path / "made")
    assert f"is a {family}{ending}: {REFUSED[family, ending]}; convert its encoder alone" in message


def test_the_encoder_of_a_refused_head_is_converted_alone(tmp_path: Path) -> None:
    """As the message says."""
    folder = save_tiny_encoder(tmp_path / "e", "DistilBert", "ForSequenceClassification")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    original = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    longformer = opened(convert(tmp_path / "encoder", tmp_path / "made", LENGTH, WINDOW))
    ids = ids_of(1, EQUAL, 0)
    assert largest_difference(outputs_of(longformer, ids), outputs_of(original, ids)) <= 1


@pytest.mark.parametrize(("family", "setting"), [("Bert", "hidden_act"), ("DistilBert", "activation")])
def test_a_masked_lm_head_without_gelu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, setting: str
) -> None:
    folder = save_tiny_encoder(tmp_path / "e", family, "ForMaskedLM", **{setting: "relu"})
    assert "applies relu, and Longformer's applies gelu" in refusal(folder, tmp_path / "made")
    monkeypatch.setattr(encoders, "GELU", ("relu",))
    with pytest.raises(ParityError, match="logits: error"):  # the comparison would find it too
        convert(folder, tmp_path / "made", LENGTH, WINDOW)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_the_projection_of_a_small_electra_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "e", "Electra", embedding_size=16)
    assert "of embedding_size 16, and projects the result to hidden_size 32" in refusal(folder, tmp_path / "made")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deberta", "relative positions"),
        ("deberta-v2", "relative positions"),
        ("mpnet", "relative positions"),
        ("t5", "relative positions"),
        ("modernbert", "rotary positions"),
        ("albert", "projected"),
        ("longformer", "use: lfx export"),
        ("gpt2", "is a gpt2, which cannot become a Longformer; give one of: bert, roberta"),
        ("gpt2", "electra, distilbert, bart"),
        (None, "names no model_type"),
    ],
)
def test_other_models_are_refused_with_the_reason(tmp_path: Path, model_type: str | None, reason: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    assert reason in refusal(tmp_path / "m", tmp_path / "made")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_embedding_type": "relative_key"}, "relative positions (position_embedding_type 'relative_key')"),
        ({"is_decoder": True}, "is a decoder"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "has architecture BertForNextSentencePrediction"),
        ({"architectures": ["RobertaModel"]}, "has architecture RobertaModel"),
        ({"architectures": "BertModel"}, "architectures is no list"),
        ({"pad_token_id": None}, "pad_token_id"),
        ({"pad_token_id": VOCAB_SIZE}, "pad_token_id"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"max_position_embeddings": 10**12}, "describes a model of"),
        ({"max_position_embeddings": 41}, "weights of other shapes"),
        ({"num_hidden_layers": 1}, "weights for which its config has no layer"),
        ({"num_hidden_layers": 3}, "has no weights for"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_act": "none"}, "hidden_act"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"quantization_config": {}}, "quantized weights"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    folder = save_tiny_encoder(tmp_path / "b", "Bert")
    edit(folder / "config.json", **changes)
    assert reason in refusal(folder, tmp_path / "made")


def test_a_value_of_another_type_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "b", "Bert")
    edit(folder / "config.json", hidden_dropout_prob="much")
    assert str(folder) in refusal(folder, tmp_path / "made")


def test_positions_that_padding_uses_up_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "r", "Roberta")
    edit(folder / "config.json", max_position_embeddings=2)
    assert "max_position_embeddings 2 is out of range" in refusal(folder, tmp_path / "made")


def test_a_decoder_s_layers_of_a_distilbert_are_missed(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "d", "DistilBert")
    edit(folder / "config.json", n_layers=1)
    assert "weights for which its config has no layer: transformer.layer.1" in refusal(folder, tmp_path / "made")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seqlen": 0}, "max_seqlen 0 is out of range; give a whole number"),
        ({"max_seqlen": 65_537}, "max_seqlen 65537 is out of range; give a whole number from 1 to 65536"),
        ({"max_seqlen": True}, "max_seqlen is True"),
        ({"max_seqlen": 16.0}, "max_seqlen is 16.0"),
        ({"attention_window": 15}, "attention_window 15 is odd"),
        ({"attention_window": 2}, "attention_window 2 is out of range"),
        ({"attention_window": "16"}, "attention_window is '16'"),
        ({"attention_window": 16.0}, "attention_window is 16.0"),
        ({"attention_window": None}, "attention_window is None"),
        ({"attention_window": []}, "attention_window is empty"),
        ({"attention_window": [16]}, "attention_window has 1 entries for 2 layers"),
        ({"attention_window": [16, 16, 16]}, "attention_window has 3 entries for 2 layers"),
        ({"attention_window": [16, 7]}, "attention_window 7 is odd"),
        ({"attention_window": 2_000}, "attention_window 2000 is out of range"),
        ({"attention_window": 30_000, "max_seqlen": 65_536}, "would take 29 GB"),
        ({"progress": 5}, "progress is int"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = save_tiny_encoder(tmp_path / "b", "Bert")
    assert message in refusal(folder, tmp_path / "made", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_short_longformer_may_be_asked_for(tmp_path: Path) -> None:
    model = save_tiny_encoder(tmp_path / "b", "Bert")
    assert convert_and_compare(model, tmp_path / "one", 1, 4, lambda step: None).equal_seqlen == 1
    assert convert_and_compare(model, tmp_path / "five", 5, 512, lambda step: None).equal_seqlen == 5


def test_a_long_longformer_may_be_asked_for(tmp_path: Path) -> None:
    longformer = opened(convert(save_tiny_encoder(tmp_path / "b", "Bert"), tmp_path / "made", 65_536, WINDOW))
    assert longformer.embeddings.position_embeddings.num_embeddings == 65_537


def test_an_output_with_content_is_refused(tmp_path: Path, bundle: MakeBundle) -> None:
    model = save_tiny_encoder(tmp_path / "b", "Bert")
    older = Path(shutil.copytree(bundle(), tmp_path / "bundle"))
    (tmp_path / "file").write_text("mine")
    for output in (model, older, tmp_path / "file"):
        before = sorted(path.name for path in output.parent.rglob("*"))
        assert "exists and is not an empty folder" in refusal(model, output)
        assert sorted(path.name for path in output.parent.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert (convert(model, tmp_path / "empty", LENGTH, WINDOW) / "model.safetensors").exists()
    assert "does not exist" in refusal(model, tmp_path / "nowhere" / "made")


@pytest.mark.parametrize(
    "weight",
    [
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "encoder.layer.1.attention.self.key.weight",
        "encoder.layer.0.attention.self.query_global.weight",
        "encoder.layer.0.attention.self.key_global.weight",
        "encoder.layer.1.attention.self.value_global.bias",
        "pooler.dense.weight",
    ],
)
def test_a_longformer_that_computes_something_else_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    def spoiled(*arguments: Any) -> Any:
        model = make_longformer(*arguments)
        parameter = model.get_parameter(weight)
        parameter.data = parameter.data.flip(0)
        return model

    monkeypatch.setattr("lfx.export.converter.make_longformer", spoiled)
    folder = save_tiny_encoder(tmp_path / "b", "Bert")
    with pytest.raises(ParityError, match="is above the tolerance"):
        convert(folder, tmp_path / "made", LENGTH, WINDOW)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_full_disk_is_one_line(tmp_path: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    model, disk = save_tiny_encoder(tmp_path / "b", "Bert"), small_disk()
    assert "no disk space: the checkpoint takes about" in refusal(model, disk / "made")
    monkeypatch.setattr("lfx.export.converter.check_space", lambda *arguments: None)
    with pytest.raises(LfxError, match="no disk space left"):
        convert(model, disk / "made", 2_000, WINDOW)
    assert not list(disk.iterdir())


def test_export_of_such_an_encoder_names_convert(tmp_path: Path) -> None:
    for family in ("Bert", "Roberta"):
        folder = save_tiny_encoder(tmp_path / family, family)
        with pytest.raises(ExportError, match=f"not a longformer.*lfx convert --model {folder} --output FOLDER"):
            export(folder, tmp_path / "bundle")
    folder = save_tiny_checkpoint(tmp_path / "c")
    edit(folder / "config.json", model_type="bart")
    with pytest.raises(ExportError, match=r"is a bart, not a longformer; .*lfx convert --model"):
        export(folder, tmp_path / "bundle")
    edit(folder / "config.json", model_type="deberta")
    with pytest.raises(
        ExportError, match=r"is a deberta, not a longformer; lfx exports Longformer and LED models only$"
    ):
        export(folder, tmp_path / "bundle")
