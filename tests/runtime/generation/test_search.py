"""The searches give Hugging Face's tokens, on random models and inputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from lfx.errors import InputError, LfxError
from lfx.runtime.generation import generate, resolve, stream
from lfx.runtime.generation.rules import choose_different, rules
from tests.marks import fast_if
from tests.runtime.generation.led import VOCAB_SIZE, TorchLed, random_inputs, reseed, split, tiny_led, torch_generate
from tests.runtime.generation.ties import check_same

LENGTHS = (1, 7, 8, 9, 15, 16, 17, 31, 33, 65, 100, 255, 257, 1025, 1500)
PATTERNS = ("first", "none", "scattered")
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 24},
    "greedy-default-length": {},
    "greedy-min-length": {"max_length": 25, "min_length": 8},
    "no-repeat-2-grams": {"max_new_tokens": 24, "no_repeat_ngram_size": 2, "min_new_tokens": 10},
    "no-repeat-1-grams-of-the-input": {"max_new_tokens": 12, "encoder_no_repeat_ngram_size": 1},
    "no-repeat-2-grams-of-the-input": {"max_new_tokens": 24, "encoder_no_repeat_ngram_size": 2, "num_beams": 2},
    "repetition-penalty": {"max_new_tokens": 24, "repetition_penalty": 1.7},
    "repetition-reward-in-beams": {"max_new_tokens": 12, "repetition_penalty": 0.8, "num_beams": 3},
    "bad-words": {"max_new_tokens": 24, "bad_words_ids": [[3], [4, 5], [7, 8, 9], [2]]},
    "forced": {"max_new_tokens": 12, "forced_bos_token_id": 0, "forced_eos_token_id": 2},
    "several-ends": {"max_new_tokens": 24, "eos_token_id": [2, 5, 7, 9], "num_beams": 2},
    "no-end": {"max_new_tokens": 12, "eos_token_id": None, "num_beams": 2},
    "beams-2": {"max_new_tokens": 24, "num_beams": 2},
    "beams-4": {"max_new_tokens": 24, "num_beams": 4},
    "beams-4-early": {"max_new_tokens": 24, "num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    "beams-4-never": {"max_new_tokens": 24, "num_beams": 4, "early_stopping": "never", "length_penalty": 0.7},
    "beams-4-never-short": {"max_new_tokens": 24, "num_beams": 4, "early_stopping": "never", "length_penalty": -1.0},
    "beams-2-no-penalty": {"max_new_tokens": 24, "num_beams": 2, "length_penalty": 0.0, "early_stopping": True},
    "beams-4-return-3": {"max_new_tokens": 16, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    "beams-4-everything": {
        "max_length": 20,
        "min_length": 4,
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": [2],
        "bad_words_ids": [[6, 7], [8]],
    },
}
MODELS = 8  # of each set of options


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_led()


def settings_of(model: Any, options: dict[str, Any]) -> Any:
    return resolve(options, model.generation_config.to_dict(), vocab_size=VOCAB_SIZE, max_tokens=64)


def test_at_least_100_models_are_compared() -> None:
    assert len(OPTIONS) * MODELS >= 100


@fast_if(lambda name: name in ("greedy", "forced", "beams-4-never-short", "beams-4-everything"))
@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_hugging_faces(name: str, model: Any) -> None:
    options, first = OPTIONS[name], MODELS * list(OPTIONS).index(name)
    equal = []
    for seed in range(first, first + MODELS):
        reseed(model, seed, (0.15, 0.2, 0.3)[seed % 3])
        rng = np.random.default_rng(seed)
        seqlen = LENGTHS[seed % len(LENGTHS)]
        feeds = random_inputs(rng, 1 + seed % 4, seqlen, PATTERNS[seed // 2 % 3])
        settings = settings_of(model, options)
        ours = generate(TorchLed(model), split(feeds), settings)
        theirs = torch_generate(model, feeds, **options)
        equal.append(check_same(ours, theirs, model, feeds, settings))
    assert sum(equal) >= MODELS - 1  # ties in float32 are rare


def test_ended_rows_leave_the_batch(model: Any) -> None:
    reseed(model, 7)
    led = TorchLed(model)
    feeds = random_inputs(np.random.default_rng(3), 4, 20, "first")
    settings = settings_of(model, {"max_new_tokens": 30})
    tokens = generate(led, split(feeds), settings)
    lengths = [1 + int(np.flatnonzero(np.append(row[1:], 2) == 2)[0]) for row in tokens]
    assert min(lengths) < max(lengths)
    assert led.rows_decoded == [sum(length > step for length in lengths) for step in range(max(lengths))][:30]


def test_finished_sequences_of_a_beam_search_leave_the_batch(model: Any) -> None:
    reseed(model, 7)
    led = TorchLed(model)
    feeds = random_inputs(np.random.default_rng(3), 4, 20, "first")
    generate(led, split(feeds), settings_of(model, {"max_new_tokens": 30, "num_beams": 2, "early_stopping": True}))
    assert led.rows_decoded[0] == 8
    assert led.rows_decoded[-1] < 8
    assert led.rows_decoded == sorted(led.rows_decoded, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_k": 0},
        {"top_k": 5, "temperature": 1.8},
        {"top_p": 0.7, "top_k": None},
        {"top_k": 20, "top_p": 0.9, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
        {"num_return_sequences": 3},
    ],
    ids=str,
)
def test_sampling_is_that_of_hugging_faces_probabilities(options: dict[str, Any], model: Any) -> None:
    """Replay each row: Hugging Face's processors make the scores, and a generator written here draws."""
    import torch
    from transformers import LogitsProcessorList

    for seed in range(6):
        reseed(model, seed)
        feeds = random_inputs(np.random.default_rng(seed), 1 + seed % 3, 20, "first")
        chosen = {"max_new_tokens": 15, "do_sample": True, "seed": 7 + seed, **options}
        tokens = generate(TorchLed(model), split(feeds), settings_of(model, chosen))
        copies = options.get("num_return_sequences", 1)
        assert len(tokens) == len(feeds["input_ids"]) * copies
        config = model.generation_config.__class__(
            **{**model.generation_config.to_dict(), "top_k": 50, "do_sample": True, **options}
        )
        model._prepare_special_tokens(config)
        processors = LogitsProcessorList(model._get_logits_processor(config, 1, torch.from_numpy(feeds["input_ids"])))
        for row, generated in enumerate(tokens):
            generator = np.random.default_rng([7 + seed, row])
            inputs = {name: torch.from_numpy(array[row // copies][None]) for name, array in feeds.items()}
            for position in range(1, tokens.shape[1]):
                prefix = torch.from_numpy(generated[None, :position])
                with torch.no_grad():
                    logits = model(**inputs, decoder_input_ids=prefix).logits[:, -1].float()
                scores = processors(prefix, logits)[0].double().numpy()
                probabilities = np.exp(scores - scores.max())
                cumulative = np.cumsum(probabilities) / probabilities.sum()
                draw = generator.random()
                expected = int(np.searchsorted(cumulative, draw, side="right"))
                near_tie = np.abs(cumulative - draw).min() < 1e-5
                assert generated[position] == expected or near_tie
                if generated[position] == 2:
                    assert (generated[position + 1 :] == 1).all()
                    break


class Draws:
    """`torch.multinomial` without replacement, with the numbers of a generator of numpy for each sequence."""

    def __init__(self, seed: int, batch: int) -> None:
        self.generators = [np.random.default_rng([seed, row]) for row in range(batch)]
        self.scores: Any = None  # of the candidates, logarithms
        self.has_tie = False

    def watch(self, choose: Any) -> Any:
        """Hugging Face's function that calls multinomial, whose scores are kept."""

        def watched(**arguments: Any) -> Any:
            self.scores = arguments["accumulated_log_probs"].double().numpy()
            return choose(**arguments)

        return watched

    def multinomial(self, probabilities: Any, num_samples: int) -> Any:
        import torch

        assert probabilities.shape == self.scores.shape
        rows = zip(self.scores, self.generators, strict=True)
        return torch.tensor([self._choose(scores, generator.random(num_samples)) for scores, generator in rows])

    def _choose(self, scores: Any, numbers: Any) -> list[int]:
        chosen: list[int] = []
        left = {i: math.exp(score - scores.max()) for i, score in enumerate(scores)}
        for number in numbers:
            if sum(left.values()) == 0:
                picked = max(left, key=lambda i: (scores[i], -i))
            else:
                cumulative = np.cumsum(list(left.values())) / math.fsum(left.values())
                self.has_tie |= bool(np.abs(cumulative - number).min() < 1e-5)
                picked = next(i for i, edge in zip(left, cumulative, strict=True) if edge > number)
            chosen.append(picked)
            del left[picked]
        return chosen


@fast_if(lambda options: "temperature" in options or "min_length" in options)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "temperature": 1.6, "top_k": 5},
        {"num_beams": 2, "top_p": 0.6, "top_k": 0, "length_penalty": -1.0, "early_stopping": "never"},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "top_k": 1, "eos_token_id": [2, 5, 7]},
        {"num_beams": 3, "top_k": 2, "top_p": 0.0, "eos_token_id": None},
        {"num_beams": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_length": 6},
    ],
    ids=str,
)
def test_sampling_with_beams_is_hugging_faces_with_the_same_draws(
    options: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    compared = 0
    for seed in range(4):
        reseed(model, seed)
        feeds = random_inputs(np.random.default_rng(seed), 1 + seed % 3, 20, "first")
        chosen = {"max_new_tokens": 12, "do_sample": True, "top_k": 50, **options}
        ours = generate(TorchLed(model), split(feeds), settings_of(model, {**chosen, "seed": 7 + seed}))
        draws = Draws(7 + seed, len(feeds["input_ids"]))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", draws.multinomial)
            patch.setattr(model, "_get_top_k_continuations", draws.watch(model._get_top_k_continuations))
            theirs = torch_generate(model, feeds, **chosen)
        if not draws.has_tie:
            assert ours.tolist() == theirs.tolist()
            compared += 1
    assert compared >= 3


def test_candidates_are_drawn_without_replacement() -> None:
    probabilities = np.array([0.5, 0.0, 0.2, 0.3])
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities).astype(np.float32)
    count = 200
    numbers = (np.arange(count) + 0.5) / count
    pairs = [tuple(choose_different(scores, np.array([a, b])).tolist()) for a in numbers for b in numbers]
    for first, second in itertools.permutations(range(4), 2):
        expected = probabilities[first] * probabilities[second] / (1 - probabilities[first])
        assert pairs.count((first, second)) / count**2 == pytest.approx(expected, abs=1.5 / count)


def test_candidates_of_probability_0_come_last() -> None:
    scores = np.array([-np.inf, -1e9, 0.0, -np.inf, -2e9, -1.0], np.float32)
    chosen = choose_different(scores, np.array([0.99, 0.1, 0.5, 0.5, 0.5]))
    assert chosen.tolist() == [5, 2, 1, 4, 0]


def test_a_seed_repeats_its_rows_in_any_batch(model: Any) -> None:
    reseed(model, 1)
    feeds = random_inputs(np.random.default_rng(0), 3, 12, "first")
    feeds["attention_mask"][:] = 1
    settings = settings_of(model, {"do_sample": True, "seed": 5, "max_new_tokens": 10, "eos_token_id": None})
    together = generate(TorchLed(model), split(feeds), settings)
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in feeds.items()}
        assert (generate(TorchLed(model), split(alone), settings, [row]) == together[row]).all()
    beams = dataclasses.replace(settings, num_beams=2, num_return_sequences=2)
    together_with_beams = generate(TorchLed(model), split(feeds), beams)
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in feeds.items()}
        rows = together_with_beams[2 * row : 2 * row + 2]
        assert (generate(TorchLed(model), split(alone), beams, [row]) == rows).all()
    assert not (
        generate(TorchLed(model), split(feeds), settings_of(model, {**_sampling(), "seed": 6})) == together
    ).all()


def test_sampling_without_a_seed_differs_between_calls(model: Any) -> None:
    reseed(model, 1)
    feeds = random_inputs(np.random.default_rng(0), 1, 12, "first")
    settings = settings_of(model, _sampling())
    assert len({generate(TorchLed(model), split(feeds), settings).tobytes() for _ in range(4)}) > 1


def _sampling() -> dict[str, Any]:
    return {"do_sample": True, "max_new_tokens": 10, "eos_token_id": None}


def test_stream_yields_the_columns_of_generate(model: Any) -> None:
    reseed(model, 7)
    feeds = random_inputs(np.random.default_rng(3), 4, 20, "first")
    settings = settings_of(model, {"max_new_tokens": 30})
    led = TorchLed(model)
    columns = stream(led, split(feeds), settings)
    first = next(columns)
    assert led.rows_decoded == [4]  # nothing is computed ahead
    tokens = np.stack([first, *columns], axis=1)
    assert (tokens == generate(TorchLed(model), split(feeds), settings)[:, 1:]).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "repetition_penalty": 1.3}], ids=str)
def test_a_bias_of_minus_infinity_bans_a_token(options: dict[str, Any], model: Any) -> None:
    reseed(model, 0)
    feeds = random_inputs(np.random.default_rng(3), 2, 20, "first")
    settings = settings_of(model, {"max_new_tokens": 12, **options})
    banned = int(generate(TorchLed(model), split(feeds), settings)[0, 1])
    model.final_logits_bias[0, banned] = -math.inf
    tokens = generate(TorchLed(model), split(feeds), settings)
    assert banned not in tokens[:, 1:] or banned == settings.fill_token_id
    assert (tokens == torch_generate(model, feeds, max_new_tokens=12, **options)).all()


@pytest.mark.parametrize("beams", [1, 2])
def test_logits_that_are_not_finite_are_an_error(beams: int, model: Any) -> None:
    class Broken(TorchLed):
        def encode(self, sequences: Any, copies: int) -> Any:
            cache = super().encode(sequences, copies)
            steps, step = itertools.count(), cache.step

            def broken(tokens: Any) -> Any:
                logits = step(tokens)
                if next(steps) == 2:
                    logits[0, 4] = np.nan
                return logits

            cache.step = broken  # type: ignore[method-assign]
            return cache

    reseed(model, 0)
    feeds = random_inputs(np.random.default_rng(3), 1, 20, "first")
    settings = settings_of(model, {"max_new_tokens": 5, "min_length": 6, "num_beams": beams})
    with pytest.raises(LfxError, match="logits are not finite at token 3; export the model in fp32"):
        generate(Broken(model), split(feeds), settings)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"num_beams": 2}, {"num_beams": 2, "top_p": 0.5}], ids=str)
def test_sampling_says_when_the_options_leave_no_token(options: dict[str, Any], model: Any) -> None:
    feeds = random_inputs(np.random.default_rng(3), 1, 20, "first")
    words = [[i] for i in range(VOCAB_SIZE) if i != 2]
    settings = settings_of(model, {"do_sample": True, "bad_words_ids": words, "min_length": 5, **options})
    with pytest.raises(InputError, match="leave no token to choose at token 1"):
        generate(TorchLed(model), split(feeds), settings)


def filtered(scores: list[float], **options: Any) -> list[float]:
    """The scores of one row after the rules of sampling."""
    row = np.array([scores], np.float32)
    defaults = {"eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2}
    settings = resolve({"do_sample": True, **options}, defaults, vocab_size=len(scores), max_tokens=9)
    for rule in rules(settings, []):
        rule(row, np.array([[2]]), np.array([0]))
    return [float(score) for score in row[0]]


def test_top_k_and_top_p_at_their_limits() -> None:
    inf = math.inf
    ties = [1.0, 3.0, 3.0, 3.0, 0.0]
    assert filtered(ties, top_k=2) == [-inf, 3.0, 3.0, 3.0, -inf]  # equal scores stay or go together
    assert filtered(ties, top_k=9) == ties
    assert filtered(ties, top_k=None) == ties
    assert filtered(ties, top_k=1, num_beams=2) == [-inf, 3.0, 3.0, 3.0, -inf]
    assert filtered(ties, top_k=None, top_p=1.0) == ties
    assert filtered([1.0, 0.0, 3.0, 2.0], top_k=None, top_p=0.0) == [-inf, -inf, 3.0, -inf]
    assert filtered([1.0, 0.0, 3.0, 2.0], top_k=None, top_p=0.0, num_beams=2) == [-inf, -inf, 3.0, 2.0]
    halves = filtered([0.0, 0.0, 0.0, 0.0], top_k=None, top_p=0.5)
    assert sorted(halves) == [-inf, -inf, 0.0, 0.0]
    assert filtered([-inf, -inf, 1.0, -inf], top_k=3, top_p=0.5) == [-inf, -inf, 1.0, -inf]
    assert filtered([-inf] * 4, top_k=3, top_p=0.5) == [-inf] * 4
