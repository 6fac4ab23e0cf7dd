"""Forks over the wire, from a real model: they say what their parent would have said, and share what it has computed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from streamkv import Engine
from streamkv.engine.config import EngineConfig
from streamkv.protocol.limits import SessionLimits
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from tests.server.serving import Ended, Raw

TEXT = "the quick brown fox jumps over the lazy dog and the dog says"
BLOCK = 8
LIMITS = SessionLimits(flush_tokens=1, flush_s=0.0, flush_busy_s=0.0)
"""A delta for each step, so that there are many borders."""


class Home:
    """A server over a tiny real model, one connection to it, and what only its own process can see."""

    def __init__(self, engine: Engine, server: Server, raw: Raw) -> None:
        self.engine = engine
        self.raw = raw
        self._server = server

    def output(self, stream_id: str) -> list[int]:
        (live,) = self._server.stream_door.sessions
        session = live.session
        return list((session._table.alive.get(stream_id) or session._table.retained[stream_id]).output)

    async def run(self, stream_id: str, prompt: Any, **body: Any) -> Ended:
        await self.raw.create(stream_id, prompt, **{"temperature": 0, "max_tokens": 20} | body)
        return await self.raw.ended(stream_id)

    async def fork(self, source: str, stream_id: str, at: int | None = None, **fields: Any) -> Said:
        await self.raw.send(
            t="fork",
            id=stream_id,
            **{"from": source},
            **({} if at is None else {"at": at}),
            body=fields.pop("body", {}),
            **fields,
        )
        return await self.said(stream_id)

    async def said(self, stream_id: str) -> Said:
        said = Said()
        while not said.read(await self.raw.wait_for(lambda message: message.get("id") == stream_id)):
            pass
        return said


class Said:
    """A stream that may begin anywhere."""

    def __init__(self) -> None:
        self.text = ""
        self.start: int | None = None
        self.end = self.prompt = self.cached = 0
        self.last: dict[str, Any] = {}

    def read(self, message: dict[str, Any]) -> bool:
        """True if this was the last."""
        match message["t"]:
            case "accepted":
                self.prompt = message["prompt_tokens"]
            case "status":
                self.cached = message.get("cached", self.cached)
            case "delta":
                self.start = message["o"] if self.start is None else self.start
                assert message["o"] == (self.end or self.start)
                self.end = message["o"] + message["n"]
                self.text += message["x"]
            case "done":
                assert message["o"] == self.end or self.start is None
                self.last = message
            case _:
                self.last = message
        return bool(self.last)


@pytest.fixture
async def home(folder: Path) -> AsyncIterator[Home]:
    async with at_home(folder) as home:
        yield home


@asynccontextmanager
async def at_home(folder: Path, num_blocks: int = 256) -> AsyncIterator[Home]:
    async with Engine(EngineConfig(model=str(folder), num_blocks=num_blocks, block_size=BLOCK, max_model_len=256)) as engine:
        server = Server(engine.streams, ServerConfig(port=0, limits=LIMITS))
        async with server.listening(), aiohttp.ClientSession() as http:
            socket = await http.ws_connect(f"ws://127.0.0.1:{server.port}/v1/stream", protocols=["streamkv.v1.json"])
            raw = Raw(socket, text=True)
            await raw.send(t="hello")
            await raw.receive()
            yield Home(engine, server, raw)
            await socket.close()


def _ids(home: Home, stream_id: str) -> list[int]:
    """All tokens of a stream whose prompt is `TEXT`."""
    return [*home.engine.streams.tokenizer.encode(TEXT), *home.output(stream_id)]


def borders(ended: Ended) -> dict[int, str]:
    """Offset -> text up to there, wherever a delta ends."""
    found, text = {0: ""}, ""
    for message in ended.messages:
        if message["t"] == "delta":
            text += message["x"]
            found[message["o"] + message["n"]] = text
    return found


PENALTIES: dict[str, float] = {"presence_penalty": 0.4, "frequency_penalty": 0.9, "repetition_penalty": 1.3}
"""Each changes what the model says; all together, the last leaves little to do for the others."""
FEW = list(range(100, 116))
"""With so few words every one is said again and again, so that each count matters."""
BODIES: list[dict[str, Any]] = [
    {},
    {"stop": ["e d", "q"]},
    {"echo": True},
    {"skip_special_tokens": False},
    {"prompt_logprobs": 0},
    *({name: value} for name, value in PENALTIES.items()),
    {"min_tokens": 15, "logit_bias": {"511": 100}, "stop_token_ids": [511]},
]


@pytest.mark.parametrize("body", BODIES)
async def test_a_greedy_fork_goes_on_as_its_parent_from_every_border(home: Home, body: dict[str, Any]):
    parent = await home.run("p", TEXT, **body)
    own = parent.text.removeprefix(TEXT if body.get("echo") else "")
    found = borders(parent)
    assert len(found) > 8
    for at, before in sorted(found.items())[:-1:2]:
        fork = await home.fork("p", f"f{at}", at)
        assert before.removeprefix(TEXT if body.get("echo") else "") + fork.text == own, f"forked at {at}"
        assert (fork.start, fork.end) == (at, parent.count)
        assert fork.last["usage"]["completion"] == parent.count - at
        assert fork.prompt == parent.last["usage"]["prompt"] + at
        if "prompt_logprobs" not in body:  # such a parent leaves nothing in the cache
            assert fork.cached >= (fork.prompt - 1) // BLOCK * BLOCK, "what the parent has computed is computed again"


@pytest.mark.parametrize("name", PENALTIES)
async def test_penalties_matter_to_what_these_forks_say(home: Home, name: str):
    """Else the test above would show nothing."""
    plain = await home.run("plain", TEXT)
    penalised = await home.run("penalised", TEXT, **{name: PENALTIES[name]})
    assert home.output("plain") != home.output("penalised")
    # Tokens that were said before the fork count: without them it would go another way.
    forgetful = await home.run("fresh", [*_ids(home, "penalised")[:-10]], **{name: PENALTIES[name]}, max_tokens=10)
    assert (forgetful.text == penalised.text[-len(forgetful.text) :]) == (name == "repetition_penalty")
    assert plain.count == penalised.count


async def test_a_fork_that_loses_its_blocks_still_counts_what_its_parent_said(folder: Path):
    async with at_home(folder, num_blocks=22) as home:
        parent = await home.run("p", TEXT, frequency_penalty=0.9, allowed_token_ids=FEW, max_tokens=80)
        at, before = next((at, text) for at, text in borders(parent).items() if at >= 20)
        await home.raw.create("other", TEXT[::-1], temperature=0, max_tokens=110)
        await home.raw.wait_for_type("delta", "other")  # it has come first, so it is the fork that must give way
        fork = await home.fork("p", "f", at)
        assert fork.last["why"]["preemptions"] > 0
        assert before + fork.text == parent.text
        assert home.output("f") == home.output("p")[at:]


async def test_more_of_a_conversation_is_asked_not_said(home: Home):
    """What follows a fork's parent makes all of it a prompt: nothing before it is output."""
    await home.run("p", TEXT, frequency_penalty=0.9)
    fork = await home.fork("p", "f", 10, body={"prompt": " and then"})
    ids = [*_ids(home, "p")[:-10], *home.engine.streams.tokenizer.encode_more(" and then")]
    fresh = await home.run("fresh", ids, frequency_penalty=0.9)
    assert (fork.text, fork.end - (fork.start or 0)) == (fresh.text, fresh.count)


async def test_lengths_that_a_fork_does_not_name_are_what_its_parent_has_left(home: Home):
    await home.run("p", TEXT, max_tokens=20, min_tokens=12)
    assert (await home.fork("p", "f", 15)).end == 20
    assert (await home.fork("f", "ff", 18)).end == 20
    assert (await home.fork("p", "g", 15, body={"max_completion_tokens": 9})).end == 24
    assert (await home.fork("p", "spent", 20)).last["param"] == "body.max_tokens"
    await home.run("q", TEXT, max_tokens=None, max_completion_tokens=20)
    assert (await home.fork("q", "qf", 15)).end == 20


async def test_a_fork_of_a_live_parent_shares_its_blocks_and_leaves_it_alone(home: Home):
    alone = await home.run("alone", TEXT, max_tokens=60)
    await home.raw.create("p", TEXT, temperature=0, max_tokens=60, create_max=30)
    await home.raw.wait_for(lambda message: message.get("state") == "stalled" and message["id"] == "p")
    fork = await home.fork("p", "f", body={"max_tokens": 10})
    assert (fork.start, fork.end) == (30, 40)
    assert fork.cached >= (fork.prompt - 1) // BLOCK * BLOCK
    await home.raw.send(t="credit", id="p", max=2**53 - 1)
    parent = await home.raw.ended("p")
    assert parent.text == alone.text
    assert borders(parent)[30] + fork.text in alone.text


async def test_forks_of_forks_join_too(home: Home):
    """Also where a stop string or half a character is held back at the border."""
    parent = await home.run("p", TEXT, max_tokens=30, stop=["zzzz"])
    texts, source = borders(parent), "p"
    text = ""
    for at in sorted(texts)[2:-1:4]:
        text = texts[at]
        fork = await home.fork(source, f"f{at}", at)
        assert text + fork.text == parent.text, f"forked at {at} from {source}"
        source = f"f{at}"


async def test_a_fork_counts_credit_in_its_familys_offsets(home: Home):
    parent = await home.run("p", TEXT)
    at = sorted(borders(parent))[3]
    await home.raw.send(t="fork", id="f", **{"from": "p"}, at=at, max=at + 3)
    await home.raw.wait_for(lambda message: message.get("state") == "stalled" and message["id"] == "f")
    said = [message for message in await home.raw.synced() if message["t"] == "delta"]
    assert said[-1]["o"] + said[-1]["n"] <= at + 3
    await home.raw.send(t="credit", id="f", max=parent.count)
    rest = await home.said("f")
    assert borders(parent)[at] + "".join(message["x"] for message in said) + rest.text == parent.text
    error = await home.fork("p", "g", at, max=at - 1)
    assert (error.last["code"], error.last["param"]) == ("invalid_request", "max")


async def test_more_prompt_is_the_same_as_a_fresh_request_with_these_tokens(home: Home):
    parent = await home.run("p", TEXT)
    at = sorted(borders(parent))[4]
    more = " 0123456789 and then"
    fork = await home.fork("p", "f", at, body={"prompt": more, "max_tokens": 12})
    tokenizer = home.engine.streams.tokenizer
    prompt = [*tokenizer.encode(TEXT), *home.output("p")[:at], *tokenizer.encode_more(more)]
    fresh = await home.run("fresh", prompt, max_tokens=12)
    assert fork.text == fresh.text
    assert fork.prompt == len(prompt)
    again = await home.fork("p", "ids", at, body={"prompt": tokenizer.encode_more(more), "max_tokens": 12})
    assert again.text == fresh.text


async def test_more_messages_are_the_same_as_a_fresh_conversation(home: Home):
    asked = [{"role": "user", "content": "Blocks are shared"}]
    await home.run("p", asked, api="chat")
    answer = home.engine.streams.tokenizer.decode(home.output("p"))
    further = [{"role": "user", "content": "and then?"}]
    fork = await home.fork("p", "f", body={"messages": further, "max_tokens": 12})
    fresh = await home.run("fresh", [*asked, {"role": "assistant", "content": answer}, *further], api="chat", max_tokens=12)
    assert fork.text == fresh.text
    assert fork.prompt == fresh.last["usage"]["prompt"]
    # And once more on top of that.
    said = home.engine.streams.tokenizer.decode(home.output("f"))
    last = await home.fork("f", "g", body={"messages": [{"role": "user", "content": "!"}], "max_tokens": 5})
    talk = [*asked, {"role": "assistant", "content": answer}, *further, {"role": "assistant", "content": said}]
    fresh = await home.run("fresh2", [*talk, {"role": "user", "content": "!"}], api="chat", max_tokens=5)
    assert last.text == fresh.text


async def test_forks_of_one_family_go_different_ways(home: Home):
    parent = await home.run("p", TEXT, temperature=1.0, seed=7)
    ids = [f"f{number}" for number in range(6)]
    await home.raw.send(t="fork", ids=ids, **{"from": "p"}, at=0, body={"temperature": 1.0})
    texts = [(await home.said(name)).text for name in ids]
    texts += [(await home.fork("p", name, 0)).text for name in ("g", "h")]
    texts.append((await home.fork("f0", "i", 0)).text)
    assert len({parent.text, *texts}) == 1 + len(texts)


async def test_overrides_are_the_forks_own_and_bad_ones_are_refused(home: Home):
    await home.run("p", TEXT)
    shorter = await home.fork("p", "s", 4, body={"max_tokens": 2})
    assert (shorter.start, shorter.end) == (4, 6)
    for body, param in (
        ({"temperature": -1}, "body.temperature"),
        ({"prompt": ""}, "body.prompt"),
        ({"max_tokens": 10**9}, "body.max_tokens"),
        ({"model": "another"}, "body.model"),
    ):
        refused = await home.fork("p", "r", 4, body=body)
        assert (refused.last["t"], refused.last["param"]) == ("error", param)
    spent = await home.fork("p", "none")
    assert (spent.last["t"], spent.last["param"]) == ("error", "body.max_tokens")
    vector = await home.run("v", TEXT, max_tokens=1)
    assert vector.reason == "length"


async def test_only_what_generates_can_be_forked(home: Home):
    await home.raw.send(t="create", id="v", api="embeddings", body={"input": TEXT})
    await home.raw.ended("v")
    assert (await home.fork("v", "f")).last["code"] == "fork_gone"
