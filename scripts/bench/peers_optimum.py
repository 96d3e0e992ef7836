"""The optimum-onnx part of peers.py, in a separate environment: optimum-onnx pins another transformers version.

python -m venv V && V/bin/pip install torch==2.13.0 optimum-onnx==0.1.0 transformers==4.57.6
python -m scripts.bench.peers --optimum-python V/bin/python
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(checkpoint: str, cases: str) -> None:
    """Export the checkpoint, run each stored case, and print differences and versions as one line of JSON."""
    warnings.simplefilter("ignore")
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory() as folder:
        main_export(checkpoint, output=folder, task="feature-extraction", do_validation=False)
        session = ort.InferenceSession(str(Path(folder) / "model.onnx"))
        names = [item.name for item in session.get_inputs()]
        stored = np.load(cases)
        differences: list[float | None] = []
        for i in range(len(stored.files) // 3):
            ids, global_mask, expected = (stored[f"{name}_{i}"] for name in ("ids", "global_mask", "expected"))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "global_attention_mask": global_mask}
            feeds["token_type_ids"] = np.zeros_like(ids)
            try:
                actual = session.run(["last_hidden_state"], {k: v for k, v in feeds.items() if k in names})[0]
                differences.append(float(np.abs(actual - expected).max()))
            except Exception:
                differences.append(None)
    versions = {name: version(name) for name in ("optimum-onnx", "transformers", "torch", "onnxruntime")}
    print(json.dumps({"differences": differences, "versions": versions}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("cases", help="the .npz file that peers.py writes")
    main(**vars(parser.parse_args()))
