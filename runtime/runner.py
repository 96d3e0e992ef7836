"""Adapts an Engine to `lfx.parity.compare`: the inputs of each case, and the Engine as a function of inputs."""

from __future__ import annotations

import numpy as np

from lfx.parity import Arrays, Case, Runner, inputs_of
from lfx.runtime.engine import Engine
from lfx.signature import GRAPH_INPUTS, Signature

# Ids are below this for a model of unknown vocabulary, one without Hugging Face's word embedding.
_DEFAULT_VOCAB_SIZE = 8


def model_inputs(case: Case, signature: Signature) -> Arrays:
    """The inputs of a case; if the model's global attention is fixed, with that pattern in place of the case's."""
    if signature.global_attention != "mask":
        pattern = "first" if signature.global_attention == "first" else "none"
        case = Case(case.batch, case.seqlen, pattern, case.padding)
    return inputs_of(
        case,
        vocab_size=signature.vocab_size or _DEFAULT_VOCAB_SIZE,
        pad_token_id=signature.pad_token_id,
        max_global=signature.max_global,
        choices=2 if signature.has_choices else None,
    )


def engine_runner(engine: Engine) -> Runner:
    """Wrap an Engine as a function from inputs to outputs. Inputs that its graph does not have are dropped."""
    names = {spec.name for spec in engine.signature.inputs}

    def run(inputs: Arrays) -> Arrays:
        ids, *masks = (inputs.get(name) if name in names else None for name in GRAPH_INPUTS)
        return {name: np.asarray(value) for name, value in engine.run(ids, *masks).items()}

    return run
