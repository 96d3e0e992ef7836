"""Sentence embeddings of the inputs of a request, for the APIs of OpenAI and text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from fastapi import Response
from numpy.typing import NDArray

from lfx.errors import InputError
from lfx.runtime.batch_runner import Outputs
from lfx.runtime.embedding import SENTENCE_OUTPUT, check_task
from lfx.runtime.serve.limits import ReplySize, Share
from lfx.runtime.serve.model import Input, Prepared, ServedModel
from lfx.runtime.serve.replies import RefusalError
from lfx.runtime.serve.service import Service

Rows = list[NDArray[np.float32]]


async def embed(
    service: Service,
    model: ServedModel,
    items: Sequence[Input],
    reply: Callable[[Rows, int], Response],
    encoding: str = "float",
    field: str | None = None,
) -> Response:
    """Answer with the embedding of each input.

    Args:
        reply: makes the reply from the embeddings and the number of tokens.
        encoding, field: of the reply; see `ReplySize`.
    Raises:
        RefusalError: the model has another task than sentence embedding, or the request is refused.
        LfxError: the model cannot take an input, or failed.
    """
    try:
        check_task(model.signature)
    except InputError as error:
        reason = f"the model {model.name} gives no sentence embeddings: its task is {model.signature.task}"
        raise RefusalError(424, reason, "Backend", "model_not_supported") from error
    with Share(service.reply_memory) as share:
        size = ReplySize(share, encoding, field)

        def read(_: Prepared, outputs: Outputs) -> NDArray[np.float32]:
            row: NDArray[np.float32] = np.asarray(outputs[SENTENCE_OUTPUT])[0].astype(np.float32, copy=False)
            size.add(row)
            return row

        return await service.answer(model, items, read, reply)
