"""Connections that die and come back, on a real socket: nothing is lost, nothing comes twice, nothing is left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from streamkv.engine.api import EngineRequest
from streamkv.protocol.limits import SessionLimits
from tests.server.serving import Serving, eventually, serving
from tests.server.wire import bearer, keyed

CODECS = ["json", "msgpack"]


def reply(request: EngineRequest, branch: int, position: int) -> int:
    """Letters that tell by themselves where in which stream they belong, as far as 26 letters can."""
    return 97 + (position * position + 5 * position + 3 * request.prompt[0] + branch) % 26


def reference(first: int, count: int) -> str:
    request = EngineRequest(("x",), [first], None)  # type: ignore[arg-type]  # nobody looks at it
    return "".join(chr(reply(request, 0, position)) for position in range(count))


async def finished_away(served: Serving, codec: str = "json", **body: Any) -> dict[str, Any]:
    """A stream that nobody sees end; its session's welcome."""
    async with served.raw(codec) as raw:
        await raw.create("s", [7], **{"max_tokens": 20} | body)
        await raw.wait_for_type("delta", "s")
        raw.kill()
    await served.quiet()
    return raw.welcome


@pytest.mark.parametrize("codec", CODECS)
async def test_what_has_finished_meanwhile_comes_with_its_last_frame(codec: str):
    async with serving(reply=reply, grace_s=60.0) as served:
        welcome = await finished_away(served, codec)
        for _ in range(3):  # as often as it is asked for
            async with served.again(welcome, codec) as raw:
                assert raw.welcome["resumed"]
                await raw.resume("s", 0)
                resumed = await raw.wait_for_type("resumed", "s")
                assert (resumed["from"], resumed["state"]) == (0, "done")
                ended = await raw.ended("s")
                assert (ended.text, ended.reason) == (reference(7, 20), "length")


@pytest.mark.parametrize("codec", CODECS)
async def test_an_end_that_was_lost_with_its_socket_comes_again(codec: str):
    """The server has sent everything, the client has read nothing of it: also of what generates no tokens."""
    async with serving(grace_s=60.0) as served:
        async with served.raw(codec) as raw:
            await raw.send(t="create", ids=["v", "w"], api="embeddings", body={"input": ["Hi", "Ho"]})
            await raw.send(t="create", id="c", api="score", body={"prompt": "ab", "input": "cd", "logprobs": 1})
            await raw.create("p", "abc", max_tokens=0, prompt_logprobs=0, echo=True)
            await raw.create("long", "x" * 300, max_tokens=5)  # refused by the engine
            (live,) = served.server.stream_door.sessions
            await eventually(lambda: live.session._table.retained.keys() == {"v", "w", "c", "p", "long"})
            raw.kill()
        async with served.again(raw.welcome, codec) as raw:
            for stream_id in ("v", "w", "c", "p", "long"):
                await raw.resume(stream_id, 0, epoch=raw.welcome["epoch"])
            assert len((await raw.ended("v")).last["embedding"]) == 3
            assert len((await raw.ended("w")).last["embedding"]) == 3
            score = await raw.ended("c")
            assert score.last["score"]["tokens"] == 2
            assert sum(len(message["lp"]) for message in score.messages if message["t"] == "prompt") == 3
            echo = await raw.ended("p")
            assert (echo.text, echo.reason) == ("abc", "length")
            assert (await raw.ended("long")).code == "context_length_exceeded"


async def test_the_newest_connection_wins():
    async with serving(reply=reply, context=2000, grace_s=60.0) as served, served.raw() as old:
        served.engine.hold = 5
        await old.create("s", [7], max_tokens=50)
        await old.wait_for_type("delta", "s")
        async with served.again(old.welcome, "msgpack") as new:
            assert new.welcome["resumed"]
            closed = await old.closed()
            assert (closed.code, closed.reason.split(":")[0]) == (4409, "taken_over")
            await new.resume("s", 0)
            await served.engine.release()
            ended = await new.ended("s")
            assert ended.text == reference(7, 50)


async def test_what_an_old_connection_still_says_is_not_heard():
    """Both frames come in at once: the session is the new one's before the old one's is read."""
    async with serving(reply=reply, grace_s=60.0) as served, served.raw() as old, served.raw(hello=False) as new:
        served.engine.hold = 5
        await old.create("s", [7], max_tokens=50)
        await old.wait_for_type("delta", "s")
        await new.send(t="hello", session=old.welcome["session"])
        await old.send(t="bye", cancel=True)
        assert (await new.receive())["resumed"]
        await new.resume("s", 0)
        await served.engine.release()
        assert (await new.ended("s")).text == reference(7, 50)


async def test_who_names_no_session_of_this_server_gets_a_new_one():
    async with serving(reply=reply, grace_s=60.0) as served:
        welcome = await finished_away(served)
        for wrong in ({"session": "nobody"}, {"session": ""}, {"epoch": "another"}, {"session": None}):
            async with served.again(welcome, **wrong) as raw:
                assert "resumed" not in raw.welcome  # false is left out
                assert raw.welcome["session"] != welcome["session"]
                await raw.resume("s", 0)
                assert (await raw.wait_for_type("error", "s"))["code"] == "resume_gone"
                assert await raw.synced() == []
        async with served.again(welcome) as raw:
            await raw.resume("s", 0)
            assert (await raw.ended("s")).text == reference(7, 20)


async def test_another_tenant_cannot_take_a_session_over(tmp_path: Path):
    async with keyed(tmp_path, reply=reply, grace_s=60.0) as served:
        async with served.raw(headers=bearer("acme")) as raw:
            await raw.create("s", [7], max_tokens=20)
            await raw.ended("s")
        for tenant, resumed in (("rival", False), ("acme", True)):
            async with served.raw(hello=False, headers=bearer(tenant)) as other:
                await other.send(t="hello", session=raw.welcome["session"])
                assert (await other.receive()).get("resumed", False) is resumed


@pytest.mark.parametrize("on_disconnect", ["grace", "cancel"])
async def test_nobody_comes_back(on_disconnect: str):
    """Grace over, or none wanted: the engine is empty, and the session is gone."""
    grace_s = 0.0 if on_disconnect == "grace" else 60.0
    async with serving(reply=reply, grace_s=grace_s) as served:
        async with served.raw() as raw:
            await raw.create("s", [7], max_tokens=100, create_max=3, create_on_disconnect=on_disconnect)
            await raw.wait_for_type("delta", "s")
            raw.kill()
        await served.quiet()
        await eventually(lambda: len(served.server.stream_door.sessions) == 0)
        async with served.again(raw.welcome) as raw:
            assert not raw.welcome.get("resumed")
            await raw.resume("s", 3)
            assert (await raw.wait_for_type("error", "s"))["code"] == "resume_gone"


async def test_bye_without_cancel_leaves_streams_running():
    async with serving(reply=reply, grace_s=60.0) as served:
        served.engine.hold = 3
        async with served.raw() as raw:
            await raw.create("s", [7], max_tokens=20)
            await raw.wait_for_type("delta", "s")
            await raw.send(t="bye", cancel=False)
            assert (await raw.closed()).code == 1000
        assert len(served.engine.live) == 1
        await served.engine.release()
        async with served.again(raw.welcome) as raw:
            await raw.resume("s", 0)
            assert (await raw.ended("s")).text == reference(7, 20)


async def test_many_streams_that_grew_while_their_client_was_away_do_not_make_it_slow():
    """40 streams with a hundred bytes each are more than the reader may be behind; it is not behind, it was away."""
    limits = SessionLimits(outbound=2000)
    async with serving(reply=reply, limits=limits, context=2000, grace_s=60.0) as served:
        served.engine.hold = 3
        names = [f"s{number}" for number in range(40)]
        async with served.raw() as raw:
            for name in names:
                await raw.create(name, [7], max_tokens=300)
                await raw.wait_for_type("delta", name)
            raw.kill()
        await eventually(lambda: not served.server.stream_door.connections)
        await served.engine.release(200)
        await eventually(lambda: all(live.num_tokens == 200 for live in served.engine._live.values()))
        async with served.again(raw.welcome) as raw:
            for name in names:
                await raw.resume(name, 0)
            await served.engine.release(201)  # something comes while nothing has been sent yet
            raw._early = await raw.synced()
            await served.engine.release()
            for name in names:
                assert (await raw.ended(name)).text == reference(7, 300)


async def test_finished_streams_are_forgotten_in_a_connection_that_stays():
    limits = SessionLimits(resume_s=0.05)
    async with serving(reply=reply, limits=limits, grace_s=60.0) as served, served.raw() as raw:
        await raw.create("s", [7], max_tokens=5)
        await raw.ended("s")
        (live,) = served.server.stream_door.sessions
        async with asyncio.timeout(5):
            await eventually(lambda: live.session.retained_bytes == 0)
        assert live.peer is not None


async def test_all_sessions_together_keep_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("streamkv.server.session_store._MAX_RETAINED", 30_000)
    monkeypatch.setattr("streamkv.server.session_store._BALANCE_S", 0.0)
    async with serving(reply=reply, grace_s=60.0) as served:
        for number in range(6):
            async with served.raw() as raw:
                for name in "abc":
                    await raw.create(name, [number], max_tokens=5)
                    await raw.ended(name)
                raw.kill()
            await eventually(lambda: not served.server.stream_door.connections)
        total = sum(live.session.retained_bytes for live in served.server.stream_door.sessions)
        assert 0 < total <= 30_000


async def test_a_stream_whose_answer_is_on_its_way_when_the_client_dies_is_resumed():
    """The request has been taken and `accepted` never came: the client resumes from 0 all the same."""
    async with serving(reply=reply, grace_s=60.0) as served:
        served.engine.answering.clear()
        async with served.raw() as raw:
            await raw.create("s", [7], max_tokens=20)
            await eventually(lambda: len(served.engine.requests) == 1)
            raw.kill()
        await eventually(lambda: not served.server.stream_door.connections)
        async with served.again(raw.welcome) as raw:
            await raw.resume("s", 0)
            assert (await raw.wait_for_type("resumed", "s"))["from"] == 0
            served.engine.answering.set()
            assert (await raw.ended("s")).text == reference(7, 20)


async def test_every_stream_of_a_family_is_a_branch_of_its_own():
    async with serving(reply=reply) as served, served.raw() as raw:
        await raw.create(["a", "b"], [7], max_tokens=20)
        await raw.ended("a")
        for names in (["c", "d"], ["e"]):
            await raw.send(t="fork", ids=names, **{"from": "a"}, at=0)
            for name in names:
                await raw.wait_for_type("done", name)
        await raw.send(t="fork", id="f", **{"from": "d"}, at=0)
        await raw.wait_for_type("done", "f")
        assert [request.first_branch for request in served.engine.requests] == [0, 2, 4, 5]


async def test_a_session_that_broke_the_protocol_cannot_be_resumed():
    async with serving(reply=reply, grace_s=60.0) as served:
        served.engine.hold = 3
        async with served.raw() as raw:
            await raw.create("s", [7], max_tokens=20)
            await raw.wait_for_type("delta", "s")
            await raw.send(t="hello")
            assert (await raw.closed()).code == 4400
        await served.quiet()
        async with served.again(raw.welcome) as raw:
            assert not raw.welcome.get("resumed")


async def test_a_drain_ends_sessions_without_a_connection():
    async with serving(reply=reply, grace_s=60.0) as served:
        served.engine.hold = 3
        async with served.raw() as raw:
            await raw.create("s", [7], max_tokens=20)
            await raw.wait_for_type("delta", "s")
            raw.kill()
        await eventually(lambda: not served.server.stream_door.connections)
        served.server.stream_door.drain(10.0, "test")
        await served.quiet()
        with pytest.raises(aiohttp.WSServerHandshakeError):
            async with served.again(raw.welcome):
                raise AssertionError("a draining server takes no connection")
