"""Bundles of tiny LEDs, exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfx.export import export
from tests.conftest import MakeOnce
from tests.models import VOCAB_SIZE, tiny_tokenizer
from tests.runtime.generation.led import tiny_led

MakeLed = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="session")
def led_bundle(made_once: MakeOnce) -> MakeLed:
    """led_bundle(seed, **export options) -> Hugging Face's model, and the folder of its bundle, only read."""
    models: dict[int, Any] = {}

    def make(seed: int = 7, **options: Any) -> tuple[Any, Path]:
        model = models.setdefault(seed, tiny_led(seed, vocab_size=VOCAB_SIZE))
        name = ",".join(["led", str(seed), *(f"{key}={value}" for key, value in options.items())])

        def fill(folder: Path) -> None:
            tokenizer = tiny_tokenizer()
            tokenizer.add_tokens([f"w{i}" for i in range(VOCAB_SIZE - len(tokenizer))])  # the model writes any id
            export(model, folder / "led", tokenizer=tokenizer, **options)

        return model, made_once(name, fill) / "led"

    return make
