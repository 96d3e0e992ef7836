"""ONNX Runtime's own test vectors for its CUDA LongformerAttention, two of which it disables: lfx passes all four.

Source: microsoft/onnxruntime, onnxruntime/test/contrib_ops/longformer_attention_op_test.cc, MIT license. The vectors
are printed with four decimals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.test_functions import _run

VECTORS = json.loads((Path(__file__).parent / "data" / "onnxruntime_longformer_attention.json").read_text())
HALF_A_DIGIT = 0.5e-4


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_vectors_of_onnxruntime(case: dict[str, Any]) -> None:
    hidden, heads = VECTORS["hidden"], VECTORS["heads"]
    rows = case.get("rows", range(len(case["glob"])))
    tokens = np.float32(VECTORS["input"]).reshape(-1, hidden)[list(rows)]
    local, of_global = (
        (tokens @ np.float32(VECTORS[name]).reshape(hidden, 3 * hidden)).reshape(-1, 3, hidden).swapaxes(0, 1)
        for name in ("weights", "global_weights")
    )
    # (3, seqlen, hidden) -> query, key and value of (1, seqlen, hidden)
    query, key, value = (part[None] for part in local)
    mask = np.ones((1, len(tokens)), np.int32)
    mask[0, -1] = 0
    positions = np.flatnonzero(case["glob"])
    index = np.int32([positions if len(positions) else [-1]])
    global_query, global_key, global_value = (part[None] for part in of_global)
    context = _run(
        "GlobalAttention",
        {"q": global_query[:, index[0]], "k": global_key, "v": global_value, "mask": mask},
        num_heads=heads,
    )
    inputs = {"q": query, "k": key, "v": value, "mask": mask, "index": index, "rows": context}
    actual = _run("BandedAttention", inputs, num_heads=heads, window=VECTORS["one_sided_window"])
    expected = np.float32(case["out"]).reshape(-1, hidden)
    real = mask[0] == 1
    np.testing.assert_allclose(actual[0][real], expected[real], rtol=0, atol=1.01 * HALF_A_DIGIT)
