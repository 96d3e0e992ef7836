"""What a comparison needs of an Engine: the inputs of each case, and the Engine as a function of them."""

from __future__ import annotations

import numpy as np

from lfx.parity import Arrays, Case, Runner, inputs_of
from lfx.runtime.engine import Engine
from lfx.signature import Signature

# Ids of a model without a word embedding of Hugging Face's are drawn below this.
_UNKNOWN_VOCABULARY = 8


def model_inputs(case: Case, signature: Signature) -> Arrays:
    """The inputs of a case, with the global tokens that the model can have."""
    if signature.global_attention != "mask":
        pattern = "first" if signature.global_attention == "first" else "none"
        case = Case(case.batch, case.seqlen, pattern, case.padding)
    return inputs_of(
        case,
        vocab_size=signature.vocab_size or _UNKNOWN_VOCABULARY,
        pad_token_id=signature.pad_token_id,
        max_global=signature.max_global,
        choices=2 if signature.task == "multiple-choice" else None,
    )


def engine_runner(engine: Engine) -> Runner:
    """An Engine as a function from graph inputs to outputs; inputs that its graph does not have are left out."""
    names = {spec.name for spec in engine.signature.inputs}

    def run(inputs: Arrays) -> Arrays:
        masks = {name: inputs[name] for name in inputs if name in names and name != "input_ids"}
        return {name: np.asarray(value) for name, value in engine.run(inputs["input_ids"], **masks).items()}

    return run
