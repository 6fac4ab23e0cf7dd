"""`/v1/embeddings`: every input is a request of its own in the engine, a few at a time; to the quota they are one."""

from __future__ import annotations

import base64
import math
import struct
from functools import partial
from typing import Final

from streamkv.errors import InvalidRequestError
from streamkv.protocol.bodies import ParsedEmbedding, check_body
from streamkv.server.openai.generation import Workload
from streamkv.server.openai.prompts import prepare_each
from streamkv.server.openai.requests import EmbeddingRequest, check_priority
from streamkv.server.openai.shapes import Embedding, EmbeddingList, EmbeddingUsage
from streamkv.server.principal import Principal

__all__ = ["embed"]

MAX_INPUTS: Final = 2048


async def embed(work: Workload, rid: str, given: EmbeddingRequest, principal: Principal) -> EmbeddingList:
    """Vectors of all inputs.

    Raises:
        StreamKVError: an input cannot be read, or the engine refuses one; then nothing of the others is kept.
    """
    info = work.streams.info
    body = check_body(given, models=(info.model,), num_ids=None, max_model_len=info.max_model_len)
    assert isinstance(body, ParsedEmbedding)
    if len(body.inputs) > MAX_INPUTS:
        raise InvalidRequestError(f"there are {len(body.inputs)} inputs; send at most {MAX_INPUTS}", param="input")
    if given.dimensions is not None and given.dimensions != info.embedding_dim:
        raise InvalidRequestError(f"this model's vectors have {info.embedding_dim} dimensions; leave it out", param="dimensions")
    priority = check_priority(given.priority)
    prompts = await prepare_each("input", body.inputs, partial(work.streams.prepare_embedding, pooling=body.pooling))
    with work.generation(rid, prompts, 1, limit=0) as generation:
        await generation.open(principal, priority=priority, salt=principal.salt)
        await generation.ended.wait()
        pieces = sorted(generation.take(), key=lambda piece: piece.index)
        if generation.failure is not None:
            raise generation.failure
    ends = [piece.finished for piece in pieces if piece.finished is not None]
    vectors = [Embedding(index, _written(end.vector(), given)) for index, end in enumerate(ends)]
    tokens = sum(len(prepared.token_ids) for prepared in prompts)
    return EmbeddingList(vectors, info.model, EmbeddingUsage(tokens, tokens))


def _written(vector: list[float], given: EmbeddingRequest) -> list[float] | str:
    if given.normalize is not False:
        length = math.sqrt(math.fsum(value * value for value in vector))
        vector = [value / length for value in vector] if length > 0 else vector
    if given.encoding_format != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
