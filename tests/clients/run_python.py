"""Runs models in the Python clients: python run_python.py reads jobs from stdin, one line of JSON each.

A job has client, model, options and inputs. Prints a line for each: result, and {output: [numbers]} or {"error": text}.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import numpy as np


def main(client: str, model: str, options: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs as flat lists."""
    if client == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        loaded = SentenceTransformer(model, device="cpu", backend="onnx", local_files_only=True, **options)
        return {"sentence_embedding": loaded.encode(inputs["texts"]).ravel().tolist()}
    import torch
    from optimum import onnxruntime

    cls = getattr(onnxruntime, options.pop("class"))
    loaded = cls.from_pretrained(model, **options)
    feeds = {"input_ids": torch.tensor(inputs["ids"]), "attention_mask": torch.tensor(inputs["mask"])}
    if cls.__name__ == "ORTModelForSeq2SeqLM":
        return {"tokens": loaded.generate(**feeds, **inputs["search"]).ravel().tolist()}
    if "global" in inputs:
        feeds["global_attention_mask"] = torch.tensor(inputs["global"])
    return {name: np.asarray(value).ravel().tolist() for name, value in loaded(**feeds).items() if value is not None}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        try:
            result = main(**json.loads(line))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(f"\nresult {json.dumps(result)}", flush=True)
