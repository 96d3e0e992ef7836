"""The options of generate: Hugging Face's defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfx.errors import InputError, LengthError
from lfx.runtime.generation import GenerationSettings, resolve
from lfx.runtime.generation.settings import _DEFAULTS, _UNSUPPORTED, _WITHOUT_EFFECT

CONFIG = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 2}


def settings(defaults: dict[str, Any] | None = None, /, **options: Any) -> GenerationSettings:
    return resolve(options, {**CONFIG, **(defaults or {})}, vocab_size=60, max_tokens=64)


def test_defaults_are_hugging_faces() -> None:
    expected = GenerationSettings(max_length=21, decoder_start_token_id=2, top_k=50, eos_token_ids=(2,), pad_token_id=1)
    assert settings() == expected


def test_the_callers_options_come_before_the_checkpoints() -> None:
    assert settings({"num_beams": 4}).num_beams == 4
    assert settings({"num_beams": 4}, num_beams=2).num_beams == 2
    assert settings({"num_beams": 4}, num_beams=None).num_beams == 1
    assert settings({"num_beams": None}).num_beams == 1


def test_none_turns_an_option_off() -> None:
    off = settings(top_k=None, eos_token_id=None, pad_token_id=None, temperature=None, forced_eos_token_id=None)
    assert (off.top_k, off.eos_token_ids, off.pad_token_id, off.temperature) == (0, (), None, 1.0)


def test_max_new_tokens_comes_before_max_length() -> None:
    assert settings(max_length=30).max_length == 30
    assert settings(max_length=30, max_new_tokens=5).max_length == 6
    assert settings({"max_new_tokens": 5}, max_length=30).max_length == 6  # as in Hugging Face's
    assert settings({"max_new_tokens": 5}, max_length=30, max_new_tokens=None).max_length == 30
    assert settings({"max_length": 30}).max_length == 30


def test_the_default_length_fits_the_decoder() -> None:
    assert resolve({}, CONFIG, vocab_size=60, max_tokens=8).max_length == 9
    assert resolve({}, CONFIG, vocab_size=60, max_tokens=None).max_length == 21


def test_min_new_tokens_does_not_count_the_start_token() -> None:
    assert settings(min_length=5).min_length == 5
    assert settings(min_length=5, min_new_tokens=5).min_length == 6


def test_the_pad_token_is_the_first_end_token_if_there_is_none() -> None:
    assert settings({"pad_token_id": None, "eos_token_id": [7, 8]}).pad_token_id == 7


def test_the_start_token_falls_back() -> None:
    assert (
        resolve({}, {"bos_token_id": 5}, vocab_size=60, max_tokens=9, decoder_start_token_id=3).decoder_start_token_id
        == 5
    )
    assert resolve({}, {}, vocab_size=60, max_tokens=9, decoder_start_token_id=3).decoder_start_token_id == 3
    with pytest.raises(InputError, match="has no decoder_start_token_id; give one"):
        resolve({}, {}, vocab_size=60, max_tokens=9)


@pytest.mark.parametrize(
    "config",
    [
        {"transformers_version": "5.23.0", "use_cache": False, "return_dict_in_generate": True, "output_scores": True},
        {"typical_p": 1.0, "epsilon_cutoff": 0.0, "num_beam_groups": 1, "diversity_penalty": 0.0},
        {"suppress_tokens": [], "guidance_scale": None, "renormalize_logits": False, "made_up": None},
        {"encoder_repetition_penalty": 1, "cache_implementation": "static", "_from_model_config": True},
    ],
)
def test_entries_that_change_nothing_pass(config: dict[str, Any]) -> None:
    assert settings(config) == settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0.9),
        ("suppress_tokens", [3]),
        ("guidance_scale", 2),
        ("num_beam_groups", 2),
        ("renormalize_logits", True),
        ("stop_strings", ["the"]),
        ("min_p", 0.1),
        ("top_h", 0.4),
        ("diversity_penalty", 0.5),
        ("epsilon_cutoff", 3e-4),
        ("eta_cutoff", 3e-4),
        ("begin_suppress_tokens", [3]),
        ("encoder_repetition_penalty", 1.5),
        ("exponential_decay_length_penalty", (5, 1.1)),
        ("sequence_bias", [[[3], 2.0]]),
        ("force_words_ids", [[3]]),
        ("prompt_lookup_num_tokens", 2),
        ("max_time", 3.0),
        ("typical_p", np.array([1, 2])),
        ("suppress_tokens", np.float64(3)),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} .* is not supported; leave it out"):
        settings(**{name: value})
    with pytest.raises(InputError, match=f"{name} .* of generation_config.json is not supported; give {name}=None"):
        settings({name: value})
    assert settings({name: value}, **{name: None}) == settings()


def test_each_field_of_hugging_faces_generation_config_is_an_option_refused_or_without_effect() -> None:
    from transformers import GenerationConfig

    fields = set(vars(GenerationConfig()))
    groups = (set(_DEFAULTS) - {"seed"}, set(_UNSUPPORTED), set(_WITHOUT_EFFECT))
    assert fields == {name for group in groups for name in group & fields}
    assert sum(map(len, groups)) == len(set().union(*groups))  # each name is in one of them
    assert groups[0] <= fields
    assert settings({**GenerationConfig().to_dict(), **CONFIG}) == settings()
    for name in sorted(set(_UNSUPPORTED)):
        refused = "a value of no meaning"
        with pytest.raises(InputError, match=f"^{name} '{refused}' is not supported; leave it out"):
            settings(**{name: refused})
        assert all(settings({name: value}) == settings() for value in (None, *_UNSUPPORTED[name]))
    for name in _WITHOUT_EFFECT:
        assert settings({name: "any"}) == settings()


def test_a_name_that_is_not_known_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"no_repeat_ngrams is no option of generate; choose from: .*no_repeat_ngram_size"
    ):
        settings(no_repeat_ngrams=2)
    with pytest.raises(InputError, match=r"made_up of generation_config.json is not known; give made_up=None"):
        settings({"made_up": 2})
    assert settings({"made_up": 2}, made_up=None) == settings()
    for name in ("\ud800", "a\nb", "x" * 1_000_000):
        with pytest.raises(InputError) as caught:
            settings({name: 2})
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams 0 is out of range; give a whole number from 1 to 1000"),
        ({"num_beams": 2.0}, "num_beams is 2.0; give a whole number"),
        ({"num_beams": True}, "num_beams is True"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 is out of range"),
        ({"max_length": 1}, "max_length 1 is out of range; give a whole number, 2 or more"),
        ({"min_length": -1}, "min_length -1 is out of range"),
        ({"temperature": 0}, "temperature 0 is out of range"),
        ({"temperature": float("nan")}, "temperature nan is out of range"),
        ({"top_p": 1.5}, "top_p 1.5 is out of range; give a number from 0 to 1"),
        ({"top_k": -1}, "top_k -1 is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is out of range"),
        ({"early_stopping": "always"}, "early_stopping is 'always'; give True, False or 'never'"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"early_stopping": np.array([1, 2])}, "early_stopping is "),
        ({"do_sample": 1}, "do_sample is 1; give True or False"),
        ({"do_sample": True, "seed": -1}, "seed -1 is out of range"),
        ({"eos_token_id": 60}, "eos_token_id 60 is out of range; give a whole number from 0 to 59"),
        ({"eos_token_id": []}, "eos_token_id is empty; give one id, several, or None"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"bad_words_ids": []}, "bad_words_ids is .*; give a list of lists of ids"),
        ({"bad_words_ids": [3]}, "bad_words_ids is .*; give a list of lists of ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is .*; give a list of lists of ids"),
        ({"bad_words_ids": [[60]]}, "an id in bad_words_ids 60 is out of range"),
        ({"num_return_sequences": 2}, "num_return_sequences 2 is above num_beams 1"),
        (
            {"num_return_sequences": 3, "do_sample": True, "num_beams": 2},
            "num_return_sequences 3 is above num_beams 2; give at least that number of beams, or do_sample=True with",
        ),
        ({"num_beams": 2, "eos_token_id": list(range(60))}, "needs 61 candidates a beam, and the vocabulary has 60"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**options)


def test_the_checkpoints_options_of_sampling_do_not_stop_a_search() -> None:
    """Nor do they stop Hugging Face's."""
    config = {"temperature": 0.0, "top_k": -1, "top_p": None, "min_p": 0.0}
    assert settings(config) == settings()
    with pytest.raises(InputError, match=r"temperature of generation_config.json 0.0 is out of range"):
        settings(config, do_sample=True)
    assert settings({"temperature": 0.5}, do_sample=True).temperature == 0.5


def test_an_option_of_the_checkpoint_is_named_with_its_file() -> None:
    with pytest.raises(InputError, match=r"num_beams of generation_config.json is 'four'"):
        settings({"num_beams": "four"})


def test_more_tokens_than_the_decoder_takes_are_refused() -> None:
    assert settings(max_new_tokens=64).max_length == 65
    with pytest.raises(
        LengthError, match="max_new_tokens 65 is above what the decoder has positions for; give at most 64"
    ):
        settings(max_new_tokens=65)
    with pytest.raises(LengthError, match="max_length 66 is above what the decoder has positions for; give at most 65"):
        settings(max_length=66)
