"""`Postprocessor`: the answers of each task, without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lfx.errors import InputError
from lfx.runtime import Engine
from lfx.runtime.postprocess import Postprocessor, answer_outputs
from lfx.runtime.tokenizer import Encoded, Tokenizer
from lfx.signature import TASKS
from tests.conftest import MakeBundle
from tests.models import tiny_tokenizer
from tests.runtime.conftest import LABELS
from tests.runtime.test_tokenizer import signature


def answers(folder: Path, task: str, text: str = "the fox", **outputs: Any) -> list[dict[str, Any]]:
    """The answers for outputs that are given without the batch axis."""
    tokenizer = Tokenizer(folder, signature(task))
    arrays = {name: np.asarray([value], dtype=np.float32) for name, value in outputs.items()}
    return Postprocessor(tokenizer).answers(tokenizer.encode(text), arrays)


def softmax(values: Any) -> Any:
    """Softmax in float64 over the last axis."""
    shifted = np.exp(np.asarray(values, dtype=np.float64) - np.max(values, axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def test_labels_come_from_the_config_or_are_those_of_transformers(folder: Path) -> None:
    postprocessor = Postprocessor(Tokenizer(folder, signature("text-classification")))
    assert [postprocessor.label(i) for i in (0, 2, 3)] == ["bad", "so-so", "LABEL_3"]
    (folder / "config.json").unlink()
    assert Postprocessor(Tokenizer(folder, signature("text-classification"))).label(0) == "LABEL_0"


def test_the_bare_model_has_no_answers(folder: Path) -> None:
    assert answers(folder, "feature-extraction", last_hidden_state=np.zeros((4, 8))) == []


def test_text_classification_gives_all_labels_best_first(folder: Path) -> None:
    results = answers(folder, "text-classification", logits=[1.0, 3.0, -2.0])
    assert [list(answer) for answer in results] == [["label", "score"]] * 3
    assert [answer["label"] for answer in results] == ["good", "bad", "so-so"]
    assert [answer["score"] for answer in results] == pytest.approx(softmax([3.0, 1.0, -2.0]), rel=1e-5)


def test_scores_of_extreme_logits_are_finite(folder: Path) -> None:
    results = answers(folder, "text-classification", logits=[-1e30, 1e4, 1e4])
    assert [answer["score"] for answer in results] == [0.5, 0.5, 0.0]


def test_a_single_class_is_a_regression_with_the_raw_value(folder: Path) -> None:
    assert answers(folder, "text-classification", logits=[-2.5]) == [{"label": "bad", "score": -2.5}]


@pytest.mark.filterwarnings("error")
def test_a_multi_label_model_has_independent_scores(folder: Path) -> None:
    config = {"id2label": LABELS, "problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(config))
    results = answers(folder, "text-classification", logits=[2.0, -100.0, 2.5])
    assert [answer["label"] for answer in results] == ["so-so", "bad", "good"]
    expected = [1 / (1 + np.exp(-2.5)), 1 / (1 + np.exp(-2.0)), 0.0]
    assert [answer["score"] for answer in results] == pytest.approx(expected, abs=1e-6)


def test_a_multi_label_model_of_one_class_has_a_probability(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"problem_type": "multi_label_classification"}))
    (result,) = answers(folder, "text-classification", logits=[-0.5])
    assert result["score"] == pytest.approx(1 / (1 + np.exp(0.5)))


def test_token_classification_labels_all_tokens_in_order(folder: Path) -> None:
    logits = [[0, 1, 0], [2, 0, 0], [0, 0, 5], [0, 3, 0]]
    results = answers(folder, "token-classification", logits=logits)
    assert [list(answer) for answer in results] == [["token", "label", "score"]] * 4
    assert [answer["token"] for answer in results] == ["<s>", "the", "fox", "</s>"]
    assert [answer["label"] for answer in results] == ["good", "bad", "so-so", "good"]
    assert [answer["score"] for answer in results] == pytest.approx(softmax(logits).max(axis=-1), rel=1e-5)


def test_fill_mask_gives_the_five_best_tokens_of_each_mask(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    logits = np.random.default_rng(0).normal(size=(6, len(tokenizer)))
    results = answers(folder, "fill-mask", "the <mask> <mask> fox", logits=logits)
    assert [list(answer) for answer in results] == [["position", "token", "score"]] * 10
    assert [answer["position"] for answer in results] == [2] * 5 + [3] * 5
    for position, filled in ((2, results[:5]), (3, results[5:])):
        scores = softmax(logits[position])
        best = np.argsort(-scores)[:5]
        assert [answer["score"] for answer in filled] == pytest.approx(scores[best], rel=1e-5)
        assert [answer["token"] for answer in filled] == [
            tokenizer.decode([i], skip_special_tokens=True).strip() for i in best
        ]


def test_fill_mask_without_a_mask_has_no_answers(folder: Path) -> None:
    assert answers(folder, "fill-mask", "the fox", logits=np.zeros((4, 55))) == []


def test_multiple_choice_gives_all_choices_best_first(folder: Path) -> None:
    results = answers(folder, "multiple-choice", logits=[0.5, -1.0, 2.0, 0.0])
    assert [list(answer) for answer in results] == [["choice", "score"]] * 4
    assert [answer["choice"] for answer in results] == [2, 0, 3, 1]
    assert [answer["score"] for answer in results] == pytest.approx(softmax([2.0, 0.5, 0.0, -1.0]), rel=1e-5)


def ask(folder: Path, start: Any, end: Any) -> tuple[Encoded, dict[str, Any]]:
    """The answer to the question "the fox" from "quick brown lazy dog", tokens 5 to 8 of 10."""
    tokenizer = Tokenizer(folder, signature("question-answering"))
    encoded = tokenizer.encode("the fox", "quick brown lazy dog")
    outputs = {"start_logits": np.float32([start]), "end_logits": np.float32([end])}
    results = Postprocessor(tokenizer).answers(encoded, outputs)
    assert len(results) == 1
    return encoded, results[0]


def peak(*positions: int, of: int = 10) -> Any:
    """Logits that are high at these positions, highest at the first."""
    logits = np.zeros(of)
    for rank, position in enumerate(positions):
        logits[position] = 20.0 - 3 * rank
    return logits


def test_question_answering_gives_the_text_between_start_and_end(folder: Path) -> None:
    encoded, answer = ask(folder, peak(6), peak(7))
    assert encoded.pieces[5:9] == ["quick", "brown", "lazy", "dog"]
    assert list(answer) == ["answer", "score"]
    assert answer["answer"] == "brown lazy"
    assert answer["score"] == pytest.approx(1.0, abs=1e-6)


def test_a_pair_in_the_format_of_bert_has_one_separator_after_the_question(folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(path)
    encoded, answer = ask(folder, peak(1, 5, of=9), peak(2, 6, of=9))
    assert encoded.pieces[4:8] == ["quick", "brown", "lazy", "dog"]
    assert answer["answer"] == "brown lazy"
    assert ask(folder, peak(4, of=9), peak(4, of=9))[1]["answer"] == "quick"
    assert ask(folder, peak(7, of=9), peak(7, of=9))[1]["answer"] == "dog"


def test_an_answer_is_cut_from_the_text_between_its_characters(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))  # a token is one byte
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    reader = Tokenizer(folder, replace(signature("question-answering"), max_seqlen=None))
    encoded = reader.encode("?", "a\u65e5\u672cb")
    assert len(encoded.ids) == 9
    outputs = {"start_logits": peak(3, of=9)[None], "end_logits": peak(5, of=9)[None]}  # within both characters
    assert Postprocessor(reader).answers(encoded, outputs)[0]["answer"] == "\u65e5\u672c"


def test_an_answer_of_white_space_has_an_empty_range(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"?": 0, " ": 1, "fox": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    reader = Tokenizer(folder, signature("question-answering"))
    encoded = reader.encode("?", "fox  fox")
    assert encoded.pieces == ["?", "fox", " ", " ", "fox"]
    for first, last, answer in ((2, 3, ("", 5, 5)), (1, 2, ("fox", 0, 3)), (3, 4, ("fox", 5, 8))):
        outputs = {"start_logits": peak(first, of=5)[None], "end_logits": peak(last, of=5)[None]}
        (found,) = Postprocessor(reader).answers_of_request(encoded, outputs)
        assert (found["answer"], found["start"], found["end"]) == answer


def byte_vocabulary() -> dict[str, int]:
    return {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.mark.parametrize(
    ("ids", "found"), [([0, 5, 2, 2, 6, 7, 2], "7"), ([0, 5, 2, 6, 7, 2], "7"), ([0, 5, 6, 7, 2], None)]
)
def test_ids_without_their_text_have_an_answer_after_the_question(ids: Any, found: Any, folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("question-answering"))
    logits = peak(len(ids) - 2, of=len(ids))[None]
    outputs = {"start_logits": logits, "end_logits": logits}
    results = Postprocessor(tokenizer).answers(Encoded(ids, [str(i) for i in ids]), outputs)
    assert [answer["answer"] for answer in results] == ([tokenizer.decode([7])] if found else [])


def test_an_answer_may_be_one_token_at_either_end(folder: Path) -> None:
    assert ask(folder, peak(5), peak(5))[1]["answer"] == "quick"
    assert ask(folder, peak(8), peak(8))[1]["answer"] == "dog"


def test_the_answer_is_not_in_the_question(folder: Path) -> None:
    assert ask(folder, peak(1, 7), peak(2, 8))[1]["answer"] == "lazy dog"


def test_the_answer_is_not_the_final_separator(folder: Path) -> None:
    assert ask(folder, peak(9, 7), peak(9, 8))[1]["answer"] == "lazy dog"


def test_an_answer_does_not_end_before_it_starts(folder: Path) -> None:
    assert ask(folder, peak(8, 5), peak(6))[1]["answer"] == "quick brown"


def test_the_best_span_is_the_best_of_all_pairs_of_start_and_end(folder: Path) -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        start, end = random.normal(size=(2, 10)) * 2
        start[9] = end[9] = -30.0
        encoded, answer = ask(folder, start, end)
        begins, ends = softmax(start[5:]), softmax(end[5:])
        scores = {(i, j): begins[i] * ends[j] for i in range(5) for j in range(i, 5)}
        first, last = max(scores, key=lambda span: scores[span])
        assert answer["answer"] == " ".join(encoded.pieces[5 + first : 5 + last + 1])
        assert answer["score"] == pytest.approx(scores[first, last], rel=1e-4)


def test_the_best_span_need_not_start_at_one_of_the_best_starts(folder: Path) -> None:
    tokenizer = Tokenizer(folder, replace(signature("question-answering"), max_seqlen=None))
    encoded = tokenizer.encode("the fox", "quick brown lazy dog " * 100)
    first, count = 5, 400
    start, end = np.random.default_rng(1).normal(size=(2, first + count + 1)).astype(np.float32)
    start[first : first + 50] = 6.0  # likelier than the best span's start, with unlikely ends
    start[first + 399], end[first + 399] = 5.5, 9.0
    starts, ends = softmax(start[first:-1]), softmax(end[first:-1])
    scores = {(i, j): starts[i] * ends[j] for i in range(count) for j in range(i, min(i + 30, count))}
    i, j = max(scores, key=lambda span: scores[span])
    assert (i, j) == (399, 399)
    [answer] = Postprocessor(tokenizer).answers(encoded, {"start_logits": start[None], "end_logits": end[None]})
    assert answer == {"answer": "dog", "score": pytest.approx(scores[i, j], rel=1e-4)}


def test_outputs_in_float16_have_the_answers_of_the_same_numbers_in_float32(folder: Path) -> None:
    random = np.random.default_rng(0)
    tokenizer = Tokenizer(folder, replace(signature("question-answering"), max_seqlen=None))
    encoded, postprocessor = tokenizer.encode("fox", "the lazy dog " * 1000), Postprocessor(tokenizer)
    for _ in range(20):  # a span's score is below 1e-6
        start, end = random.normal(0, 0.3, (2, 1, len(encoded.ids))).astype(np.float16)
        half, single = (
            postprocessor.answers(encoded, {"start_logits": start.astype(dtype), "end_logits": end.astype(dtype)})
            for dtype in (np.float16, np.float32)
        )
        assert half == single


def test_outputs_of_another_text_or_model_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="needs the output logits; the outputs are other"):
        answers(folder, "text-classification", other=[1.0])
    for task in ("token-classification", "fill-mask"):
        with pytest.raises(InputError, match="logits has 9 tokens and the text 4"):
            answers(folder, task, logits=np.zeros((9, 55)))


@pytest.mark.parametrize("logits", [[1.0, np.inf], [np.inf, np.inf]])
def test_an_overflow_has_no_answer(folder: Path, logits: list[float]) -> None:
    assert answers(folder, "text-classification", logits=logits) == []
    assert answers(folder, "token-classification", logits=np.array([logits] * 4)) == []


def test_an_output_of_one_number_a_sequence_has_no_answers(folder: Path) -> None:
    tokenizer = Tokenizer(folder, signature("feature-extraction"))
    assert Postprocessor(tokenizer).answers(tokenizer.encode("the fox"), {"score": np.float32([0.5])}) == []


@pytest.mark.parametrize("task", ["question-answering", "text-classification", "token-classification"])
def test_outputs_with_nan_have_no_answer(task: str, bundle: MakeBundle) -> None:
    with Engine(bundle(task)) as engine:
        tokenizer = Tokenizer(bundle(task), engine.signature)
        encoded = tokenizer.encode("the quick <mask>", "brown fox" if task == "question-answering" else None)
        outputs = {name: np.asarray(value) for name, value in engine.run(encoded.ids).items()}
    assert Postprocessor(tokenizer).answers(encoded, outputs)
    for array in outputs.values():
        array[..., -1] = np.nan
    assert Postprocessor(tokenizer).answers(encoded, outputs) == []


def test_an_id_that_the_tokenizer_does_not_have_is_refused(folder: Path) -> None:
    logits = np.zeros((3, 99))
    logits[1, 98] = 9.0
    with pytest.raises(InputError, match="id 98 is not in the tokenizer's vocabulary"):
        answers(folder, "fill-mask", "<mask>", logits=logits)


def test_ids_past_the_tokenizers_do_not_fill_a_mask(folder: Path) -> None:
    size = len(tiny_tokenizer())
    logits = np.zeros((3, size + 9))
    logits[1, [7, size + 1, 8, size + 2, 9, 10, 11]] = [9, 8, 7, 6, 5, 4, 3]
    results = answers(folder, "fill-mask", "<mask>", logits=logits)
    assert [answer["score"] for answer in results] == pytest.approx(softmax(logits[1])[[7, 8, 9, 10, 11]], rel=1e-5)


@pytest.mark.parametrize(
    "task", ["text-classification", "multiple-choice", "token-classification", "question-answering"]
)
def test_logits_of_other_axes_have_no_answers(task: str, folder: Path) -> None:
    logits = np.zeros((4, 4, 4))
    names = ("start_logits", "end_logits") if task == "question-answering" else ("logits",)
    assert answers(folder, task, **dict.fromkeys(names, logits)) == []
    if task in ("text-classification", "multiple-choice"):
        assert answers(folder, task, logits=0.5) == []


@pytest.mark.parametrize("task", [task for task in TASKS if answer_outputs(signature(task))])
def test_a_model_without_the_outputs_of_its_task_has_no_answers(task: str, folder: Path) -> None:
    known = signature(task)
    tokenizer = Tokenizer(folder, known)
    assert answer_outputs(known)
    for changes in ({"name": "scores"}, {"shape": ("batch",)}, {"shape": ("batch", "sequence", 3, 3)}):
        own = replace(known, outputs=tuple(replace(spec, **changes) for spec in known.outputs))
        tokenizer.signature = own
        assert answer_outputs(own) == ()
        outputs = {spec.name: np.zeros((1, *[4] * (len(spec.shape) - 1)), np.float32) for spec in own.outputs}
        assert Postprocessor(tokenizer).answers(tokenizer.encode("the fox"), outputs) == []
