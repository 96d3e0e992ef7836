"""Longformers that are RoBERTas whose config names a window, as the code at github.com/allenai/longformer writes them.

Their config has model_type "roberta", and their weights have the names of RoBERTa's parts, and those of Hugging Face's
Longformer for the projections of self-attention. The original code counts attention_window on one side. Its notebook
scripts/convert_model_to_long.ipynb puts Hugging Face's self-attention into a RoBERTa, whose window counts both sides.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lfx.checks import whole_number
from lfx.errors import ExportError
from lfx.export.windows import both_sides

# Patterns of the weights' names that are renamed; transformers' `key_mapping`.
RENAMED = {r"^roberta\.": "longformer."}
# Values of attention_mode that compute the window of the paper; "longformer" is an older name of "tvm".
_WINDOWED = ("longformer", "tvm", "sliding_chunks", "sliding_chunks2")
_OTHER = {
    "n2": "lets each token see all tokens; make a Longformer of it with: lfx convert, after removing attention_window",
    "sliding_chunks3": "lets a token see three whole chunks; export the sliding_chunks model that it approximates",
}
_OWN = {"attention_mode", "attention_dilation", "autoregressive"}  # settings that only its config class writes
_LONGEST = 2**30


def is_original(data: dict[str, Any]) -> bool:
    """Return whether a config.json is of the original code or its notebook: a RoBERTa's with a window."""
    of_roberta = data.get("model_type") == "roberta" or (data.get("model_type") is None and bool(_OWN & data.keys()))
    return of_roberta and "attention_window" in data


def from_original(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the config of the original code as one of Hugging Face's Longformer.

    That of the notebook is Hugging Face's already, but for its names. Its RoBERTa marks no global tokens, whatever its
    head: `lfx.export.probe.task_globals` reads `default_global`.

    `autoregressive` stays, although the original self-attention never reads it: the config says what was meant.

    Args:
        path: of the config.json, for messages.
    Raises:
        ExportError: attention_mode or attention_window cannot be used.
    """
    names = data.get("architectures")
    architectures = [_architecture(name) for name in names] if isinstance(names, list) else names
    data = {**data, "model_type": "longformer", "architectures": architectures}
    if not _OWN & data.keys():
        return {**data, "default_global": "none"}
    mode = data.get("attention_mode", "sliding_chunks")
    if mode not in _WINDOWED:
        known = f"one of {', '.join(_WINDOWED)}"
        reason = (
            _OTHER.get(mode, f"is not known; give {known}") if isinstance(mode, str) else f"is no text; give {known}"
        )
        raise ExportError(f"{path}: attention_mode {str(mode)[:80]!r} {reason}")
    window = data["attention_window"]
    return {
        **data,
        "attention_window": [_both_sides(w, path) for w in window]
        if isinstance(window, list)
        else _both_sides(window, path),
    }


def _both_sides(window: Any, path: Path) -> int:
    return both_sides(whole_number(window, f"{path}: attention_window", 1, _LONGEST, ExportError))


def _architecture(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    return "LongformerModel" if name == "Longformer" else re.sub("Roberta(Long)?", "Longformer", name, count=1)
