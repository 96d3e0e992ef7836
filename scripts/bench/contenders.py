"""The contenders of the CPU benchmarks: functions run(ids, globals_=0), whose first `globals_` tokens are global."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lfx.runtime import Engine

Array = NDArray[Any]
Run = Callable[..., Array]


def engine_run(engine: Engine) -> Run:
    """Return a function that runs an Engine, and returns last_hidden_state."""

    def run(ids: Array, globals_: int = 0) -> Array:
        return np.asarray(engine.run(ids, global_attention_mask=_first_tokens(ids, globals_))["last_hidden_state"])

    return run


def huggingface_run(checkpoint: Path, threads: int, dtype: str = "float32") -> Run:
    """Load a LongformerModel; returns a function that runs it, and returns last_hidden_state as float32."""
    import torch
    from transformers import LongformerModel, logging

    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = LongformerModel.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    def run(ids: Array, globals_: int = 0) -> Array:
        global_mask = torch.from_numpy(_first_tokens(ids, globals_))
        with torch.inference_mode():
            outputs = model(torch.from_numpy(ids), global_attention_mask=global_mask)
        return np.asarray(outputs.last_hidden_state.float())

    return run


def random_ids(seqlen: int) -> Array:
    """Draw the ids of one sequence, (1, seqlen), of the base model's vocabulary."""
    return np.random.default_rng(seqlen).integers(3, 50000, (1, seqlen))


def differences(runs: Mapping[str, Run], seqlen: int) -> dict[str, float]:
    """Run each contender once, as the warm-up; returns its largest difference from the first."""
    outputs = {name: run(random_ids(seqlen)) for name, run in runs.items()}
    first = next(iter(outputs.values()))
    return {name: float(np.abs(array - first).max()) for name, array in outputs.items()}


def _first_tokens(ids: Array, count: int) -> Array:
    return np.broadcast_to(np.arange(ids.shape[1]) < count, ids.shape).astype(np.int64)
