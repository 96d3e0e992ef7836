"""Adapts an Engine to `lfx.parity.compare`: the inputs of each case, and the Engine as a function of inputs."""

from __future__ import annotations

import numpy as np

from lfx.parity import Arrays, Case, Runner, inputs_of
from lfx.runtime.engine import Engine
from lfx.runtime.generation.graphs import GraphCache
from lfx.signature import GRAPH_INPUTS, Signature

# Ids are below this for a model of unknown vocabulary, one without Hugging Face's word embedding.
_DEFAULT_VOCAB_SIZE = 8
# Names of a decoder's logits of the first token and of the others, as in the errors that the export measures.
FIRST_LOGITS, LATER_LOGITS = "first_logits", "logits"
_DECODER_IDS = "decoder_input_ids"
_TEXT_TOKENS = 9  # of a text that a decoder gets


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


def with_text(case: Case, inputs: Arrays, signature: Signature) -> Arrays:
    """Add the tokens that a decoder gets, if the model has one: random after the start token."""
    decoder = signature.decoder
    if decoder is None:
        return inputs
    random = np.random.default_rng([case.seqlen, case.batch])
    shape = (case.batch, min(_TEXT_TOKENS, decoder.max_tokens))
    ids = random.integers(0, signature.vocab_size or _DEFAULT_VOCAB_SIZE, shape)
    ids[:, 0] = decoder.decoder_start_token_id
    return {**inputs, _DECODER_IDS: ids}


def outputs_runner(engine: Engine) -> Runner:
    """`engine_runner`; of a model that writes texts, with the logits of a given text, decoded token by token.

    Its inputs are those of `with_text`.
    """
    signature, decoder, graphs = engine.signature, engine.signature.decoder, engine.graphs
    if graphs is None or decoder is None:
        return engine_runner(engine)

    def run(inputs: Arrays) -> Arrays:
        feeds = {spec.name: graphs[0].tensor(inputs[spec.name]) for spec in signature.inputs}
        encoded, ids = graphs[0].infer_tensors(feeds), inputs[_DECODER_IDS]
        outputs = {name: np.array(graphs[0].array(tensor)) for name, tensor in encoded.items()}
        cache = GraphCache(graphs[1], decoder, encoded, inputs["attention_mask"], copies=1)
        logits = [np.array(cache.step(ids[:, i : i + 1])) for i in range(ids.shape[1])]
        later = {LATER_LOGITS: np.stack(logits[1:], axis=1)} if len(logits) > 1 else {}
        return {**outputs, FIRST_LOGITS: logits[0], **later}

    return run
