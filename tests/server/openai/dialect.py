"""The door over an engine that also gives log-probabilities, spoken to with openai-python, aiohttp and bare sockets."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import openai

from streamkv.engine.api import StepOutput
from streamkv.engine.fake import Reply, fake_info
from streamkv.sampling_params import PromptLogprobs, TokenLogprobs
from streamkv.server.openai.door import OpenAIDoor
from tests.server.serving import CONTEXT, DEADLINE_S, VOCAB, HeldEngine, Serving, serving

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]
VECTOR = (3.0, 0.0, -4.0)


def known(token: int, top: int) -> TokenLogprobs:
    """What this engine thinks of a token: some are impossible, and the best are bytes in a row."""
    chosen = float("-inf") if token == ord("!") else -(token % 7) / 2
    return TokenLogprobs(chosen, tuple(((token + other) % 256, -other / 4) for other in range(top)), 1 + token % 7)


class KnowingEngine(HeldEngine):
    """A fake that says how probable tokens are, and gives every prompt the same vector."""

    fail_after: int | None = None
    """Requests end with an error after so many tokens."""

    def __init__(self, reply: Reply | None = None, *, context: int = CONTEXT) -> None:
        info = fake_info(vocab_size=VOCAB, max_model_len=context, embedding_dim=len(VECTOR))
        super().__init__(**({} if reply is None else {"reply": reply}), info=info)

    def _step(self) -> list[StepOutput]:
        live = dict(self._live)
        return [self._known(output, live[output.id]) if output.id in live else output for output in super()._step()]

    def _known(self, output: StepOutput, live: Any) -> StepOutput:
        top = live.request.sampling.logprobs
        if output.token_ids and top is not None:
            output = msgspec.structs.replace(output, logprobs=tuple(known(token, top) for token in output.token_ids))
        if output.embedding is not None:
            output = msgspec.structs.replace(output, embedding=struct.pack("<3f", *VECTOR))
        if self.fail_after is not None and output.token_ids and live.num_tokens >= self.fail_after:
            self._live.pop(output.id, None)
            error = ("numerical_error", "the model produced NaN for this request")
            output = msgspec.structs.replace(output, finish_reason="error", error=error)
        return output

    @staticmethod
    def _of_prompt(live: Any) -> PromptLogprobs | None:
        top = live.request.sampling.prompt_logprobs
        if top is None or live.branch:
            return None
        return PromptLogprobs(1, tuple(known(token, top) for token in live.request.prompt[1:]))


@asynccontextmanager
async def door(reply: Reply | None = None, *, context: int = CONTEXT, **options: Any) -> AsyncIterator[Serving]:
    """A server on a free port, over a `KnowingEngine`."""
    async with serving(engine=KnowingEngine(reply, context=context), context=context, **options) as served:
        yield served
        await served.quiet()
        await asyncio.wait_for(_idle(door_of(served)), DEADLINE_S)
        served.server.admission.check()
        assert served.server.admission.leases == 0


def door_of(served: Serving) -> OpenAIDoor:
    (found,) = (each for each in served.server.doors if isinstance(each, OpenAIDoor))
    return found


async def _idle(opened: OpenAIDoor) -> None:
    while not opened.closed:
        await asyncio.sleep(0.001)


@asynccontextmanager
async def sdk(served: Serving, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client."""
    settings = {"base_url": f"{served.base}/v1", "api_key": "none", "max_retries": 0, "timeout": DEADLINE_S} | options
    async with openai.AsyncOpenAI(**settings) as client:
        yield client


async def post(served: Serving, path: str, body: Any, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
    """(status, JSON, headers)."""
    async with served.http.post(served.base + path, json=body, headers=headers) as response:
        return response.status, json.loads(await response.read()), response.headers


async def get(served: Serving, path: str, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
    async with served.http.get(served.base + path, headers=headers) as response:
        return response.status, json.loads(await response.read()), response.headers


async def stream(served: Serving, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed answer, without [DONE], which must be the last."""
    async with served.http.post(served.base + path, json=body | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        return parsed(await response.read())


def parsed(data: bytes) -> list[dict[str, Any]]:
    *events, done, rest = data.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), data[-200:]
    return [json.loads(event.removeprefix("data: ")) for event in events if event != ": hb"]


@asynccontextmanager
async def bare(
    served: Serving, path: str, body: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request on a socket of its own, which the test can treat as badly as it likes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    try:
        yield reader, writer
    finally:
        await torn(writer)


async def torn(writer: asyncio.StreamWriter) -> None:
    """Reset the connection."""
    writer.transport.abort()
    with suppress(ConnectionError):
        await writer.wait_closed()
