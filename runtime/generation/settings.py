"""The options of `Engine.generate`: Hugging Face's names, meanings and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lfx.checks import LARGEST, flag, real_number, shown, whole_number
from lfx.errors import InputError, LengthError

CONFIG_FILE = "generation_config.json"
MAX_BEAMS = 1000  # of num_beams and num_return_sequences
DEFAULT_NEW_TOKENS = 20  # Hugging Face's, if neither max_length nor max_new_tokens is set

# Hugging Face's defaults of the supported options.
_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": None,
    "max_length": None,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "seed": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "bad_words_ids": None,
    "decoder_start_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# The values of options for which None is not the default, but turns the option off.
_OFF: dict[str, Any] = {"top_k": 0}
# Options of Hugging Face's that are not supported, with the values that change nothing. None changes nothing either.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "low_memory": (False,),
    "max_time": (),
    "min_p": (0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "use_mtp": (False,),
    "watermarking_config": (),
}
# Entries of generation_config.json that do not change which tokens are generated.
_WITHOUT_EFFECT = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
    }
)
# Names that old checkpoints have in config.json, where there is no generation_config.json.
CONFIG_OPTIONS = frozenset(_DEFAULTS) - {"seed"} | frozenset(_UNSUPPORTED)


def changes_nothing(name: str, value: Any) -> bool:
    """Whether a value of one of Hugging Face's options is the default, or does not decide tokens."""
    plain = type(value) in (bool, int, float, list)  # an array's comparison is no bool
    known = _UNSUPPORTED[name] if name in _UNSUPPORTED else (_DEFAULTS.get(name),)
    return value is None or name in _WITHOUT_EFFECT or (plain and value in known)


@dataclass(frozen=True)
class GenerationSettings:
    """Checked options of `Engine.generate`.

    Attributes:
        max_length: number of tokens of the longest row, the start token included, 2 or more.
        min_length: number of tokens, the start token included, before which no row ends.
        eos_token_ids: a row ends after one of these; empty = only at max_length.
        pad_token_id: fills the rows that end before others; None only if no row does.
        seed: of the random numbers of do_sample; None = a new one at each call.
    The others are Hugging Face's.
    """

    max_length: int
    decoder_start_token_id: int
    min_length: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def fill_token_id(self) -> int:
        """The token after the end of a row: the pad token; for beams, if that is 0, the first end token."""
        if self.num_beams > 1 and self.eos_token_ids:
            return self.pad_token_id or self.eos_token_ids[0]
        return self.pad_token_id or 0


def resolve(
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    vocab_size: int,
    max_tokens: int | None,
    decoder_start_token_id: int | None = None,
) -> GenerationSettings:
    """Check the options of a call.

    Args:
        options: what the caller gives. None turns an option off.
        defaults: entries of the checkpoint's generation_config.json.
        vocab_size: number of ids that the decoder knows.
        max_tokens: largest number of tokens that the decoder takes; None = no limit.
        decoder_start_token_id: of the model, where neither options nor defaults have one.
    Raises:
        InputError: an option is not known or not supported, or has another type or range; two options contradict each
            other.
    """
    _check_names(options, defaults)
    values = _Values(options, defaults, vocab_size)
    eos = values.ids("eos_token_id")
    pad = values.id("pad_token_id")
    start = values.id("decoder_start_token_id")
    start = values.id("bos_token_id") if start is None else start
    start = decoder_start_token_id if start is None else start
    if start is None:
        raise InputError("the checkpoint has no decoder_start_token_id; give one")
    max_length = _max_length(values, options, max_tokens)
    min_new_tokens = values.count("min_new_tokens")
    do_sample = values.flag("do_sample")
    # Without sampling the checkpoint's values are not looked at, as in Hugging Face's: some have a temperature of 0.
    sampling = values if do_sample else _Values(options, {}, vocab_size)
    settings = GenerationSettings(
        max_length=max_length,
        decoder_start_token_id=start,
        min_length=values.count("min_length") or 0 if min_new_tokens is None else min_new_tokens + 1,
        num_beams=values.count("num_beams", 1, MAX_BEAMS) or 1,
        num_return_sequences=values.count("num_return_sequences", 1, MAX_BEAMS) or 1,
        length_penalty=values.real("length_penalty", -100, 100),
        early_stopping=_early_stopping(values),
        no_repeat_ngram_size=values.count("no_repeat_ngram_size") or 0,
        encoder_no_repeat_ngram_size=values.count("encoder_no_repeat_ngram_size") or 0,
        repetition_penalty=values.real("repetition_penalty", 1e-6, 1e6),
        do_sample=do_sample,
        temperature=sampling.real("temperature", 1e-6, 1e6),
        top_k=sampling.count("top_k") or 0,
        top_p=sampling.real("top_p", 0, 1),
        seed=values.count("seed"),
        forced_bos_token_id=values.id("forced_bos_token_id"),
        forced_eos_token_ids=values.ids("forced_eos_token_id"),
        bad_words_ids=_bad_words(values),
        eos_token_ids=eos,
        pad_token_id=eos[0] if pad is None and eos else pad,
    )
    _check_combination(settings, vocab_size)
    return settings


def _check_names(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse each name that is not supported, unless it has a value that changes nothing."""
    for name, value in {**defaults, **options}.items():
        if name in _DEFAULTS:
            continue
        label = name if name.isprintable() and len(name) <= 80 else shown(name)
        source = "" if name in options else f" of {CONFIG_FILE}"
        if name in _UNSUPPORTED:
            if not changes_nothing(name, value):
                raise InputError(
                    f"{name} {shown(value)}{source} is not supported; "
                    f"{'leave it out' if name in options else f'give {name}=None to generate without it'}"
                )
        elif name in options and name not in defaults:
            raise InputError(f"{label} is no option of generate; choose from: {', '.join(sorted(_DEFAULTS))}")
        elif name not in _WITHOUT_EFFECT and value is not None:
            raise InputError(f"{label}{source} is not known; give {label}=None to generate without it")


class _Values:
    """Reads options by name: the caller's, or the checkpoint's, or Hugging Face's default."""

    def __init__(self, options: Mapping[str, Any], defaults: Mapping[str, Any], vocab_size: int) -> None:
        self._options, self._defaults, self._vocab_size = options, defaults, vocab_size

    def get(self, name: str) -> Any:
        if name in self._options:
            value = self._options[name]
            return _OFF.get(name, _DEFAULTS[name]) if value is None else value
        value = self._defaults.get(name)
        return _DEFAULTS[name] if value is None else value

    def label(self, name: str) -> str:
        """The name, and for a value of the checkpoint's its file, for messages."""
        return f"{name} of {CONFIG_FILE}" if name not in self._options and name in self._defaults else name

    def count(self, name: str, low: int = 0, high: int = LARGEST) -> int | None:
        value = self.get(name)
        return None if value is None else whole_number(value, self.label(name), low, high)

    def real(self, name: str, low: float, high: float) -> float:
        return real_number(self.get(name), self.label(name), low, high)

    def flag(self, name: str) -> bool:
        return flag(self.get(name), self.label(name))

    def id(self, name: str) -> int | None:
        return self.count(name, 0, self._vocab_size - 1)

    def ids(self, name: str) -> tuple[int, ...]:
        """One id, or a list of several."""
        value = self.get(name)
        if value is None:
            return ()
        items = value if _is_list(value) else [value]
        if len(items) == 0:
            raise InputError(f"{self.label(name)} is empty; give one id, several, or None")
        return tuple(whole_number(item, self.label(name), 0, self._vocab_size - 1) for item in items)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _max_length(values: _Values, options: Mapping[str, Any], max_tokens: int | None) -> int:
    """Number of tokens of the longest row; max_new_tokens comes before max_length, as in Hugging Face's."""
    new_tokens, length = values.count("max_new_tokens", 1), values.count("max_length", 2)
    if new_tokens is not None:
        name, length = values.label("max_new_tokens"), new_tokens + 1
    elif length is not None:
        name = values.label("max_length")
    else:
        name, length = "max_new_tokens", DEFAULT_NEW_TOKENS + 1
        if max_tokens is not None:
            length = min(length, max_tokens + 1)
    if max_tokens is not None and length > max_tokens + 1:  # the last token is not decoded
        allowed = max_tokens + 1 if name.startswith("max_length") else max_tokens
        raise LengthError(
            f"{name} {length if name.startswith('max_length') else length - 1} is above what the decoder has positions "
            f"for; give at most {allowed}"
        )
    return length


def _early_stopping(values: _Values) -> bool | Literal["never"]:
    value = values.get("early_stopping")
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "never":
        return "never"
    raise InputError(f"{values.label('early_stopping')} is {shown(value)}; give True, False or 'never'")


def _bad_words(values: _Values) -> tuple[tuple[int, ...], ...]:
    words = values.get("bad_words_ids")
    if words is None:
        return ()
    name = values.label("bad_words_ids")
    if not _is_list(words) or len(words) == 0 or not all(_is_list(word) and len(word) > 0 for word in words):
        raise InputError(f"{name} is {shown(words)}; give a list of lists of ids, none of them empty")
    return tuple(
        tuple(whole_number(item, f"an id in {name}", 0, values._vocab_size - 1) for item in word) for word in words
    )


def _check_combination(settings: GenerationSettings, vocab_size: int) -> None:
    beams, copies = settings.num_beams, settings.num_return_sequences
    if copies > beams and (beams > 1 or not settings.do_sample):
        raise InputError(
            f"num_return_sequences {copies} is above num_beams {beams}; give at least that number of beams, or "
            "do_sample=True with num_beams=1"
        )
    candidates = max(2, 1 + len(settings.eos_token_ids))
    if beams > 1 and candidates > vocab_size:
        raise InputError(f"num_beams {beams} needs {candidates} candidates a beam, and the vocabulary has {vocab_size}")
