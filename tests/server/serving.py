"""A real `Server` on a real socket over `TextStreams` over an engine without a model, and raw WebSockets to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from streamkv.engine.api import EngineRequest, KVMap
from streamkv.engine.fake import FakeEngine, Reply, fake_info
from streamkv.protocol.limits import SessionLimits
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.detokenizer import byte_level_alphabet
from streamkv.text.streams import TextStreams
from streamkv.text.template import ChatTemplate
from streamkv.text.tokenizer import TextTokenizer

DEADLINE_S = 60.0
"""Nothing here waits longer; a test that does has failed."""

CONTEXT = 256
VOCAB = 300  # a little wider than the tokenizer, as logits often are
SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


class CountingTokenizer(TextTokenizer):
    """Knows how often something was tokenised."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(byte_tokenizer(), template=ChatTemplate(TEMPLATE), max_tokens=max_tokens)
        self.calls = 0
        self._plain = _Counting(self._plain, self)
        self._control = _Counting(self._control, self)


class _Counting:
    """A `tokenizers` tokenizer whose `encode` is counted."""

    def __init__(self, tokenizer: Tokenizer, owner: CountingTokenizer) -> None:
        self._tokenizer = tokenizer
        self._owner = owner

    def encode(self, text: str, **options: Any) -> Any:
        self._owner.calls += 1
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, whose id is the byte, then the special tokens."""
    vocabulary = byte_level_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


class HeldEngine(FakeEngine):
    """Generates only as many tokens as the test allows; `hold=None` = all."""

    hold: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requests: list[EngineRequest] = []
        self.looks = 0  # at the blocks
        self._held: dict[str, int | None] = {}  # what the test allows
        self._granted: dict[str, int | None] = {}  # what the client accepts
        # Cleared, they make the engine one behind a slow wire: the request is on its way, or its answer is.
        self.taking, self.answering = asyncio.Event(), asyncio.Event()
        self.taking.set()
        self.answering.set()

    async def submit(self, request: EngineRequest) -> None:
        self.requests.append(request)
        await self.taking.wait()
        for request_id in request.ids:
            self._held[request_id], self._granted[request_id] = self.hold, request.credit
        await super().submit(msgspec.structs.replace(request, credit=_least(self.hold, request.credit)))
        await self.answering.wait()

    async def credit(self, request_id: str, limit: int) -> None:
        self._granted[request_id] = limit
        await super().credit(request_id, _least(self._held.get(request_id), limit) or 0)

    async def release(self, limit: int = 2**31) -> None:
        """Let every live request, and none to come, go on up to so many tokens."""
        for request_id in list(self._live):
            self._held[request_id] = limit
            await super().credit(request_id, _least(limit, self._granted.get(request_id)) or 0)

    async def kv_map(self) -> KVMap:
        self.looks += 1
        return await super().kv_map()

    @property
    def live(self) -> list[str]:
        return list(self._live)


def _least(one: int | None, other: int | None) -> int | None:
    """The smaller of two limits; None = none."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


@dataclass
class Serving:
    """A listening server and everything below it."""

    server: Server
    streams: TextStreams
    engine: HeldEngine
    tokenizer: CountingTokenizer
    http: aiohttp.ClientSession

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server.port}/v1/stream"

    @asynccontextmanager
    async def again(self, welcome: dict[str, Any], codec: str = "json", **hello: Any) -> AsyncIterator[Raw]:
        """A further connection that asks for the session of an earlier one; fields of `hello` may say otherwise."""
        async with self.raw(codec, hello=False) as raw:
            await raw.send(**{"t": "hello", "session": welcome["session"], "epoch": welcome["epoch"]} | hello)
            raw.welcome = await raw.receive()
            yield raw

    @asynccontextmanager
    async def raw(self, codec: str = "json", *, hello: bool = True, **options: Any) -> AsyncIterator[Raw]:
        """A WebSocket that has said hello, closed without a word at the end."""
        socket = await self.http.ws_connect(
            self.url, protocols=[f"streamkv.v1.{codec}"], max_msg_size=1 << 26, compress=0, **options
        )
        raw = Raw(socket, text=codec == "json")
        try:
            if hello:
                await raw.send(t="hello")
                raw.welcome = await raw.receive()
                assert raw.welcome["t"] == "welcome"
            yield raw
        finally:
            async with asyncio.timeout(DEADLINE_S):
                await socket.close()

    async def quiet(self) -> None:
        """Wait until the engine has nothing live and the server has no open stream."""
        await eventually(lambda: not self.engine.live and not self.streams.num_open)


@asynccontextmanager
async def serving(
    *,
    reply: Reply | None = None,
    limits: SessionLimits | None = None,
    grace_s: float = 0.0,
    context: int = CONTEXT,
    engine: HeldEngine | None = None,
    **config: Any,
) -> AsyncIterator[Serving]:
    """A server on a free port; afterwards nothing of it runs."""
    info = fake_info(vocab_size=VOCAB, max_model_len=context, embedding_dim=3)
    engine = engine or (HeldEngine(info=info) if reply is None else HeldEngine(reply, info=info))
    tokenizer = CountingTokenizer(context)
    engine.start()
    try:
        async with TextStreams(engine, tokenizer) as streams:
            server = Server(
                streams, replace(ServerConfig(port=0, limits=replace(limits or SessionLimits(), grace_s=grace_s)), **config)
            )
            async with server.listening(), aiohttp.ClientSession() as http:
                yield Serving(server, streams, engine, tokenizer, http)
    finally:
        await engine.close()


class ClosedError(Exception):
    """The server closed the socket; `code` and `reason` say why."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Raw:
    """A WebSocket without a client library: dictionaries or bytes in, dictionaries out."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, *, text: bool) -> None:
        self.socket = socket
        self.text = text
        self.welcome: dict[str, Any] = {}
        self._early: list[dict[str, Any]] = []
        self._stamps = itertools.count()

    def encode(self, message: Any) -> bytes:
        return msgspec.json.encode(message) if self.text else msgspec.msgpack.encode(message)

    async def send(self, **message: Any) -> None:
        await self.send_frame(self.encode(message))

    async def send_frame(self, data: bytes, *, text: bool | None = None) -> None:
        """`text`: kind of the frame, if not the protocol's own."""
        kind = aiohttp.WSMsgType.TEXT if (self.text if text is None else text) else aiohttp.WSMsgType.BINARY
        await self.socket.send_frame(data, kind)

    async def create(self, stream_id: str | list[str] = "s", prompt: Any = "abc", **body: Any) -> None:
        """A completion; `api="chat"` takes messages as prompt. Fields of `create` itself go by `create_...`."""
        api = body.pop("api", "completions")
        outer = {name[7:]: body.pop(name) for name in list(body) if name.startswith("create_")}
        names = {"ids": stream_id} if isinstance(stream_id, list) else {"id": stream_id}
        field = "messages" if api == "chat" else "prompt"
        await self.send(t="create", api=api, body={field: prompt} | body, **names, **outer)

    def kill(self) -> None:
        """Drop the connection as a dead network does: what is on its way is lost."""
        self.socket._writer.transport.abort()

    async def resume(self, stream_id: str = "s", from_: int = 0, **fields: Any) -> None:
        await self.send(t="resume", id=stream_id, **{"from": from_}, **fields)

    async def receive(self) -> dict[str, Any]:
        """The next message. Raises `ClosedError` at the end."""
        return self._early.pop(0) if self._early else await self._receive()

    async def _receive(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            frame = await self.socket.receive()
        if frame.type is aiohttp.WSMsgType.TEXT and self.text:
            return msgspec.json.decode(frame.data)
        if frame.type is aiohttp.WSMsgType.BINARY and not self.text:
            return msgspec.msgpack.decode(frame.data)
        if frame.type is aiohttp.WSMsgType.CLOSE:
            # Not `socket.close_code`: that is 1006 if our answer came too late.
            raise ClosedError(frame.data, str(frame.extra or ""))
        assert frame.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR), frame
        raise ClosedError(self.socket.close_code, str(frame.extra or ""))

    async def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first such message; what comes before it is kept for later."""
        for index, message in enumerate(self._early):
            if wanted(message):
                return self._early.pop(index)
        while not wanted(message := await self._receive()):
            self._early.append(message)
        return message

    async def wait_for_type(self, kind: str, stream_id: str | None = None) -> dict[str, Any]:
        return await self.wait_for(lambda message: message["t"] == kind and message.get("id") == stream_id)

    async def ended(self, stream_id: str = "s") -> Ended:
        """Wait for a stream's last frame; checks that what came before it is a stream's proper life."""
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1]["t"] not in ("done", "error"):
            messages.append(await self.wait_for(lambda message: message.get("id") == stream_id))
        return Ended.of(messages)

    async def closed(self) -> ClosedError:
        """Read until the server closes."""
        with _Expect() as expected:
            while True:
                self._early.append(await self._receive())
        return expected.error

    async def synced(self) -> list[dict[str, Any]]:
        """Everything that the server said before it answered a ping: shows what did *not* come, and that the connection lives."""
        stamp = 1e6 + next(self._stamps)
        await self.send(t="ping", ts=stamp)
        await self.wait_for(lambda message: message["t"] == "pong" and message["ts"] == stamp)
        early, self._early = self._early, []
        return early


class _Expect:
    error: ClosedError

    def __enter__(self) -> _Expect:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ClosedError):
            self.error = error
            return True
        return False


@dataclass(frozen=True)
class Ended:
    """One stream, from `accepted` to its last frame."""

    text: str
    count: int
    last: dict[str, Any]
    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, messages: list[dict[str, Any]]) -> Ended:
        deltas = [message for message in messages if message["t"] == "delta"]
        offset = 0
        for delta in deltas:
            assert delta["o"] == offset, f"gap or overlap before {delta}"
            offset += delta["n"]
        last = messages[-1]
        assert [message["t"] for message in messages].count("accepted") <= 1
        if last["t"] == "done":
            assert last["o"] == last["usage"]["completion"] == offset
        return cls("".join(delta["x"] for delta in deltas), offset, last, messages)

    @property
    def reason(self) -> str | None:
        return self.last.get("finish_reason")

    @property
    def code(self) -> str | None:
        return self.last.get("code")


async def eventually(condition: Callable[[], bool]) -> None:
    """Yield to the loop until it is true: for states of which nobody tells."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)
