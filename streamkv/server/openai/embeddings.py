"""`/v1/embeddings`: every input is a request of its own in the engine, a few at a time; to the quota they are one."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from typing import Final

from streamkv.errors import InvalidRequestError
from streamkv.protocol.bodies import ParsedEmbedding, check_body
from streamkv.server.admission import Share
from streamkv.server.openai.generation import Workload
from streamkv.server.openai.requests import EmbeddingRequest, check_priority
from streamkv.server.openai.shapes import Embedding, EmbeddingList, EmbeddingUsage
from streamkv.server.principal import Principal
from streamkv.text.events import Finished
from streamkv.text.streams import PreparedPrompt

__all__ = ["embed"]

MAX_INPUTS: Final = 2048
_AT_ONCE: Final = 8
"""Inputs of one request in the engine: enough to fill a step with short ones, and others are not kept waiting."""


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
    prompts = [await _prepared(work, body, index) for index in range(len(body.inputs))]
    with work.admission.several(principal, prompts, at_once=min(_AT_ONCE, len(prompts))) as share:
        places = asyncio.Semaphore(share.places)

        async def one(index: int, prepared: PreparedPrompt) -> Finished:
            async with places:
                return await _embed_one(work, f"{rid}-{index}", prepared, principal, priority, share)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, prepared)) for index, prepared in enumerate(prompts)]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
    ends = [task.result() for task in tasks]
    vectors = [Embedding(index, _written(end.vector(), given)) for index, end in enumerate(ends)]
    tokens = sum(end.prompt_tokens for end in ends)
    return EmbeddingList(vectors, info.model, EmbeddingUsage(tokens, tokens))


async def _prepared(work: Workload, body: ParsedEmbedding, index: int) -> PreparedPrompt:
    try:
        return await work.streams.prepare_embedding(body.inputs[index], body.pooling)
    except InvalidRequestError as error:
        if len(body.inputs) == 1 or error.param != "input":
            raise
        raise type(error)(error.message, param=f"input[{index}]") from error


async def _embed_one(
    work: Workload, rid: str, prepared: PreparedPrompt, principal: Principal, priority: int, share: Share
) -> Finished:
    with work.generation(rid, 1, limit=0, overflowed=lambda _: None) as generation:
        await generation.open(prepared, principal, priority=priority, salt=principal.salt, share=share)
        await generation.ended.wait()
        (piece,) = generation.take()
        assert piece.finished is not None
        return piece.finished


def _written(vector: list[float], given: EmbeddingRequest) -> list[float] | str:
    if given.normalize is not False:
        length = math.sqrt(math.fsum(value * value for value in vector))
        vector = [value / length for value in vector] if length > 0 else vector
    if given.encoding_format != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
