"""`Engine.generate` on exported bundles gives Hugging Face's tokens, in every backend."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import GenerationConfig

from lfx.errors import ArtifactError, InputError, LengthError, LfxError
from lfx.manifest import Manifest
from lfx.runtime import Engine
from lfx.runtime.generation.graphs import GraphGenerator
from lfx.signature import TASKS
from tests.conftest import MakeBundle, MakeLed
from tests.marks import fast_if
from tests.models import VOCAB_SIZE
from tests.runtime.generation.led import random_inputs, torch_generate
from tests.runtime.generation.ties import check_same

BACKENDS = ("onnxruntime", "openvino")
SEEDS = (7, 11)
LENGTHS = (1, 7, 8, 9, 15, 16, 17, 33, 100, 255, 257, 1025, 1500)
PATTERNS = ("first", "none", "scattered")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 24},
    {"max_new_tokens": 24, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    {"max_new_tokens": 16, "num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
    {"max_new_tokens": 16, "num_beams": 4, "num_return_sequences": 2},
    {"max_new_tokens": 12, "num_beams": 4, "forced_bos_token_id": 0, "bad_words_ids": [[5], [6, 7]]},
)
CASES = list(itertools.product(BACKENDS, SEEDS, OPTIONS))
INPUTS = 5  # of each case


@pytest.fixture(scope="module")
def engine(led_bundle: MakeLed) -> Iterator[Engine]:
    with Engine(led_bundle()[1], threads=1) as engine:
        yield engine


def test_at_least_100_inputs_are_compared() -> None:
    assert len(CASES) * INPUTS >= 100


@fast_if(lambda case: CASES[case][1] == SEEDS[0] and (CASES[case][0], case % 2) == ("onnxruntime", 0))
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-model{CASES[i][1]}-options{i % 5}")
def test_tokens_are_hugging_faces(case: int, led_bundle: MakeLed) -> None:
    backend, seed, options = CASES[case]
    model, bundle = led_bundle(seed)
    equal = []
    with Engine(bundle, backend, threads=1) as engine:
        settings = engine.generation_settings(**options)
        for i in range(INPUTS):
            number = case * INPUTS + i
            rng = np.random.default_rng(number)
            feeds = random_inputs(rng, 1 + i % 4, LENGTHS[number % len(LENGTHS)], PATTERNS[number // 2 % 3])
            ours = engine.generate(
                feeds["input_ids"], feeds["attention_mask"], feeds["global_attention_mask"], **options
            )
            theirs = torch_generate(model, feeds, **options)
            equal.append(check_same(ours, theirs, model, feeds, settings))
    assert sum(equal) >= INPUTS - 1


def test_the_reference_backend_generates(led_bundle: MakeLed, tmp_path: Path) -> None:
    model, source = led_bundle()
    bundle = Path(shutil.copytree(source, tmp_path / "led"))
    feeds = random_inputs(np.random.default_rng(0), 2, 20, "first")
    with Engine(bundle, "reference") as engine:
        tokens = engine.generate(feeds["input_ids"], feeds["attention_mask"], max_new_tokens=8, num_beams=2)
    assert (tokens == torch_generate(model, feeds, max_new_tokens=8, num_beams=2)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "backend"), [("fp16", "onnxruntime"), ("fp16", "openvino"), ("bf16", "openvino")]
)
def test_half_precision_bundles_generate(precision: str, backend: str, led_bundle: MakeLed) -> None:
    model, bundle = led_bundle(7, precision=precision)
    feeds = random_inputs(np.random.default_rng(0), 3, 40, "first")
    with Engine(bundle, backend) as engine:
        for options in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "num_beams": 3}):
            tokens = engine.generate(feeds["input_ids"], feeds["attention_mask"], **options)
            theirs = torch_generate(model, feeds, **options)
            width = min(tokens.shape[1], theirs.shape[1])
            # rounding to 11 or 8 bits may change a token, and with it those after it
            assert (tokens[:, :width] == theirs[:, :width]).mean() > 0.5


def test_the_first_token_is_global_by_default(engine: Engine, led_bundle: MakeLed) -> None:
    feeds = random_inputs(np.random.default_rng(1), 1, 60, "first")
    default = engine.generate(feeds["input_ids"], max_new_tokens=20)
    assert (default == torch_generate(led_bundle()[0], feeds, max_new_tokens=20)).all()
    none = {**feeds, "global_attention_mask": np.zeros_like(feeds["input_ids"])}
    assert not np.array_equal(default, torch_generate(led_bundle()[0], none, max_new_tokens=20))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "num_return_sequences": 2}])
def test_sequences_of_different_lengths_give_what_each_gives_alone(options: dict[str, Any], engine: Engine) -> None:
    rng = np.random.default_rng(2)
    sequences = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in (40, 3, 300, 17, 3)]
    together = engine.generate(sequences, max_new_tokens=10, **options)
    copies = options.get("num_return_sequences", 1)
    assert together.shape[0] == len(sequences) * copies
    assert together.dtype == np.int64
    if "seed" in options:  # the random numbers of a row belong to its index
        return
    for i, ids in enumerate(sequences):
        alone = engine.generate(ids, max_new_tokens=10, **options)
        assert (together[i, : alone.shape[1]] == alone[0]).all()
        assert (together[i, alone.shape[1] :] == 1).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_rows_of_several_batches_have_hugging_faces_fill(options: dict[str, Any], led_bundle: MakeLed) -> None:
    """With the pad token 0, which Hugging Face's beam search replaces by the end token."""
    rng = np.random.default_rng(2)
    sequences = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in (40, 3, 300, 17)]
    ids = np.array([sequence + [1] * (300 - len(sequence)) for sequence in sequences])
    mask = (np.arange(300) < np.array([[len(sequence)] for sequence in sequences])).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": np.eye(1, 300, dtype=np.int64) * mask}
    with Engine(led_bundle()[1], threads=1, token_budget=1) as engine:
        written = engine.generate(sequences, max_new_tokens=20, eos_token_id=None, **options)[:, 1:].tolist()
        lengths = {
            end: {row.index(end) if end in row else 20 for row in written} for end in {*itertools.chain(*written)}
        }
        end = max(lengths, key=lambda end: len(lengths[end]))  # texts that end with it have the most different lengths
        chosen = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": end, **options}
        tokens = engine.generate(sequences, **chosen)
        widths = {engine.generate(sequence, **chosen).shape[1] for sequence in sequences}
    assert len(widths) > 1
    assert (tokens == torch_generate(led_bundle()[0], feeds, **chosen)).all()


def test_texts_give_what_their_ids_give(engine: Engine) -> None:
    texts = ["the quick brown fox", "jumps over the lazy dog the quick brown"]
    tokens = engine.generate(texts, max_new_tokens=8)
    ids = [engine._open_tokenizer(None).encode(text).ids for text in texts]
    assert (tokens == engine.generate(ids, max_new_tokens=8)).all()
    assert (engine.generate(texts[0], max_new_tokens=8) == engine.generate(ids[0], max_new_tokens=8)).all()


def test_a_stream_has_the_columns_of_the_result(engine: Engine) -> None:
    rng = np.random.default_rng(5)
    sequences = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in (40, 3)]
    columns = list(engine.generate(sequences, max_new_tokens=10, stream=True))
    assert (np.stack(columns, axis=1) == engine.generate(sequences, max_new_tokens=10)[:, 1:]).all()


def test_errors_are_returned_for_the_sequences_that_have_them(engine: Engine) -> None:
    good = [5, 6, 7, 2]
    rows = engine.generate([good, [VOCAB_SIZE], good * 500, good], on_error="return", max_new_tokens=5)
    assert isinstance(rows[1], InputError)
    assert isinstance(rows[2], LengthError)
    expected = engine.generate([good], max_new_tokens=5)
    assert all(np.array_equal(rows[i], expected) for i in (0, 3))
    rows = engine.generate(["the fox", "", "the " * 2000], on_error="return", max_new_tokens=5)
    assert isinstance(rows[0], np.ndarray)
    assert str(rows[2]).startswith("text 2: the text has ")


def test_keys_and_values_are_passed_without_copies(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, steps = [], []
    assert engine._graphs is not None
    encoder, decoder = engine._graphs
    for graph, calls in ((encoder, encoded), (decoder, steps)):

        def record(tensors: Any, graph: Any = graph, calls: Any = calls, infer: Any = graph.infer_tensors) -> Any:
            outputs = infer(tensors)
            calls.append((dict(tensors), outputs))
            return outputs

        monkeypatch.setattr(graph, "infer_tensors", record)
    engine.generate([[5, 6, 7, 2] * 10], max_new_tokens=4, min_new_tokens=4, num_beams=1)
    assert len(steps) == 4
    for (inputs, _), (_, before) in zip(steps, [(None, None), *steps], strict=False):
        for name, tensor in inputs.items():
            if ".encoder." in name:
                assert tensor is encoded[0][1][name.replace("past_key_values", "present")]
            elif ".decoder." in name and before is not None:
                assert tensor is before[name.replace("past_key_values", "present")]


def test_beams_of_one_sequence_share_its_keys_and_values(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._graphs is not None
    shapes = []
    decoder = engine._graphs[1]
    infer = decoder.infer_tensors

    def record(tensors: Any) -> Any:
        shapes.append(
            [decoder.array(tensors[f"past_key_values.0.{part}.key"]).shape[0] for part in ("encoder", "decoder")]
        )
        return infer(tensors)

    monkeypatch.setattr(decoder, "infer_tensors", record)
    engine.generate([[5, 6, 7, 2] * 10], max_new_tokens=4, num_beams=4)
    assert set(map(tuple, shapes)) == {(1, 4)}


def test_run_gives_the_outputs_of_the_encoder(engine: Engine, led_bundle: MakeLed) -> None:
    import torch

    feeds = random_inputs(np.random.default_rng(1), 2, 40, "first")
    outputs = engine.run(feeds["input_ids"], feeds["attention_mask"])
    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
        expected = led_bundle()[0].get_encoder()(**inputs).last_hidden_state.numpy()
    real = feeds["attention_mask"].astype(bool)
    hidden = outputs["last_hidden_state"]
    assert np.abs(hidden[real] - expected[real]).max() < 1e-4  # type: ignore[call-overload]
    assert outputs["present.1.encoder.value"].shape == (2, 2, 40, 8)  # type: ignore[union-attr]


def test_defaults_come_from_the_checkpoint(led_bundle: MakeLed, tmp_path: Path) -> None:
    model, source = led_bundle()
    bundle = Path(shutil.copytree(source, tmp_path / "led"))
    config = json.loads((bundle / "generation_config.json").read_text())
    config |= {"num_beams": 3, "max_length": 9, "length_penalty": 2.0, "early_stopping": True, "typical_p": 1.0}
    _rewrite(bundle, "generation_config.json", json.dumps(config))
    feeds = random_inputs(np.random.default_rng(1), 2, 40, "first")
    options = {"num_beams": 3, "max_length": 9, "length_penalty": 2.0, "early_stopping": True}
    with Engine(bundle) as engine:
        tokens = engine.generate(feeds["input_ids"], feeds["attention_mask"])
        greedy = engine.generate(feeds["input_ids"], feeds["attention_mask"], num_beams=1)
    assert (tokens == torch_generate(model, feeds, **options)).all()
    assert (greedy == torch_generate(model, feeds, max_length=9)).all()


def test_old_checkpoints_have_their_defaults_in_config_json(led_bundle: MakeLed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(led_bundle()[1], tmp_path / "led"))
    config = json.loads((bundle / "config.json").read_text()) | {
        "num_beams": 2,
        "max_length": 8,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 5,
        "force_bos_token_to_be_generated": True,
    }
    expected = GenerationConfig.from_model_config(config).forced_bos_token_id
    (bundle / "generation_config.json").unlink()
    _rewrite(bundle, "config.json", json.dumps(config))
    with Engine(bundle) as engine:
        settings = engine.generation_settings()
    assert (settings.num_beams, settings.max_length, settings.no_repeat_ngram_size) == (2, 8, 3)
    assert (settings.eos_token_ids, settings.pad_token_id, settings.decoder_start_token_id) == ((2,), 1, 2)
    assert settings.forced_bos_token_id == expected == 0


def _rewrite(bundle: Path, name: str, text: str) -> None:
    """Change a file of a bundle, and list its new digest."""
    (bundle / name).write_text(text)
    Manifest.read(bundle).write(bundle)


@pytest.mark.parametrize(
    "name", ["decoder_model.onnx", "encoder_model.onnx", "model.onnx.data", "generation_config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_bundle_with_a_damaged_file_is_refused(name: str, damage: str, led_bundle: MakeLed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(led_bundle()[1], tmp_path / "led"))
    path = bundle / name
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} (is missing|was changed after the export)"):
        Engine(bundle)


def test_graphs_of_two_bundles_are_refused(led_bundle: MakeLed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(led_bundle()[1], tmp_path / "led"))
    other = led_bundle(7, precision="fp16")[1]
    _rewrite_bytes(bundle, "decoder_model.onnx", (other / "decoder_model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"says precision 'fp32' where decoder_model.onnx says 'fp16'"):
        Engine(bundle)


def _rewrite_bytes(bundle: Path, name: str, data: bytes) -> None:
    (bundle / name).write_bytes(data)
    Manifest.read(bundle).write(bundle)


def test_the_encoders_file_alone_needs_the_decoders_beside_it(led_bundle: MakeLed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(led_bundle()[1], tmp_path / "led"))
    (bundle / "lfx.json").unlink()
    ids = [[5, 6, 7, 2] * 5]
    with Engine(bundle / "encoder_model.onnx") as engine:
        tokens = engine.generate(ids, max_new_tokens=5)
    with Engine(led_bundle()[1]) as engine:
        assert (engine.generate(ids, max_new_tokens=5) == tokens).all()
    (bundle / "decoder_model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"needs the decoder's graph .*decoder_model.onnx, which is no file"):
        Engine(bundle / "encoder_model.onnx")
    content = onnx.load(bundle / "encoder_model.onnx", load_external_data=False)
    (entry,) = (entry for entry in content.metadata_props if entry.key == "lfx")
    entry.value = entry.value.replace("decoder_model.onnx", "x" * 300)  # no file can have that name
    onnx.save(content, bundle / "encoder_model.onnx")
    with pytest.raises(ArtifactError, match=r"the path of the decoder's graph .* cannot be opened: File name too"):
        Engine(bundle / "encoder_model.onnx")


def test_the_encoders_file_in_a_bundle_names_the_bundle(led_bundle: MakeLed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(led_bundle()[1], tmp_path / "led"))
    with Engine(bundle / "encoder_model.onnx") as engine:
        assert engine.manifest is not None
    with pytest.raises(ArtifactError, match="is a decoder's graph, which needs the encoder's; open the bundle"):
        Engine(bundle / "decoder_model.onnx")
    (bundle / "model.onnx.data").write_bytes(b"\0" * (bundle / "model.onnx.data").stat().st_size)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data was changed after the export"):
        Engine(bundle / "encoder_model.onnx")


@pytest.mark.parametrize("name", ["../decoder_model.onnx", "/etc/passwd", "..", "", "a/b.onnx", "a\0b"])
def test_a_decoder_outside_the_bundle_is_refused(name: str, led_bundle: MakeLed, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(led_bundle()[1], tmp_path / "led"))
    manifest = Manifest.read(bundle)
    assert manifest.signature.decoder is not None
    decoder = dataclasses.replace(manifest.signature.decoder, model_file=name)
    signature = dataclasses.replace(manifest.signature, decoder=decoder)
    dataclasses.replace(manifest, signature=signature).write(bundle)
    with pytest.raises(ArtifactError, match="which is no file name; export it again"):
        Engine(bundle)


def test_a_pickled_engine_generates(engine: Engine) -> None:
    ids = [[5, 6, 7, 2] * 5]
    with pickle.loads(pickle.dumps(engine)) as copy:
        assert (copy.generate(ids, max_new_tokens=5) == engine.generate(ids, max_new_tokens=5)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, "input_ids is empty"),
        ({"inputs": [[]]}, "input_ids is an empty sequence"),
        ({"inputs": [[VOCAB_SIZE]]}, f"has id {VOCAB_SIZE}, outside the vocabulary"),
        ({"inputs": [[5] * 1601]}, "has 1601 tokens, above the model's maximum 1600"),
        ({"inputs": "the " * 3000}, "text 0: the text has .* above the model's maximum"),
        ({"inputs": ["the", "fox"], "attention_mask": [[1], [1]]}, "masks are given with texts"),
        ({"inputs": [[5, 6]], "attention_mask": [[1]]}, "attention_mask has shape"),
        ({"inputs": [[5, 6]], "stream": True, "num_beams": 2}, "num_beams 2 cannot be streamed"),
        ({"inputs": [[5], []], "stream": True, "on_error": "return"}, "on_error 'return' is not for stream=True"),
        ({"inputs": [[5, 6]], "stream": 1}, "stream is 1; give True or False"),
        ({"inputs": [[5, 6]], "on_error": "ignore"}, "on_error 'ignore' is not known"),
        ({"inputs": [[5, 6]], "beams": 2}, "beams is no option of generate; choose from: bad_words_ids, "),
        ({"inputs": ["the"], "tokenizer": "folder"}, "tokenizer is str; give a Tokenizer"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str, engine: Engine) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(**arguments)


def test_other_tasks_generate_nothing(bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine, pytest.raises(InputError, match="generate needs a model of the task text2text"):
        engine.generate([[5, 6]])


def test_a_closed_engine_generates_nothing(led_bundle: MakeLed) -> None:
    engine = Engine(led_bundle()[1])
    engine.close()
    with pytest.raises(InputError, match="this Engine is closed"):
        engine.generate([[5, 6]])


def test_logits_of_another_shape_are_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._graphs is not None
    decoder = engine._graphs[1]
    infer = decoder.infer_tensors
    monkeypatch.setattr(
        decoder, "infer_tensors", lambda t: {**infer(t), "logits": decoder.tensor(np.zeros((1, 2), "f"))}
    )
    with pytest.raises(ArtifactError, match=r"output logits of 1 rows of 1 tokens has shape \(1, 2\)"):
        engine.generate([[5, 6]])


def test_a_failure_of_the_decoder_is_an_error_of_its_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = GraphGenerator.encode

    def fail(self: Any, sequences: Any, copies: int) -> Any:
        if len(sequences[0]["input_ids"][0]) > 100:
            raise LfxError("out of memory")
        return encode(self, sequences, copies)

    monkeypatch.setattr(GraphGenerator, "encode", fail)
    rows = engine.generate([[5] * 10, [5] * 1200], on_error="return", max_new_tokens=3)
    assert isinstance(rows[0], np.ndarray)
    assert str(rows[1]) == "out of memory"


def test_the_task_is_known() -> None:
    assert TASKS["text2text-generation"].default_global == "first"
