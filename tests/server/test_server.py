"""The server on a real socket: what a client sees of its streams, and what is left behind in the engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streamkv.protocol.limits import SessionLimits
from streamkv.protocol.outbox import Outbox
from streamkv.protocol.session import Session
from tests.server.serving import eventually, serving

CODECS = ["json", "msgpack"]


@pytest.mark.smoke
@pytest.mark.parametrize("codec", CODECS)
async def test_many_streams_on_one_socket_come_interleaved_and_whole(codec: str):
    async with serving() as served, served.raw(codec) as raw:
        served.engine.hold = 0
        for index in range(20):
            await raw.create(f"s{index}", f"prompt {index} ", max_tokens=50 + index)
        await eventually(lambda: len(served.engine.live) == 20)
        await served.engine.release()
        last = await raw.wait_for_type("done", "s19")
        deltas = [message["id"] for message in raw._early if message["t"] == "delta"]
        raw._early.append(last)
        assert len(set(deltas[:20])) == 20, "one stream's text came before others had a turn"
        for index in reversed(range(20)):
            ended = await raw.ended(f"s{index}")
            prompt = f"prompt {index} "
            assert ended.text == (prompt * 20)[: 50 + index]
            assert ended.reason == "length"
            assert ended.last["usage"] == {"prompt": len(prompt), "completion": 50 + index, "cached": 0}
        await served.quiet()


async def test_a_stream_is_accepted_then_told_then_delivered_then_done():
    async with serving() as served, served.raw() as raw:
        await raw.create("s", "abc", max_tokens=40)
        ended = await raw.ended()
        kinds = [message["t"] for message in ended.messages]
        assert kinds[:3] == ["accepted", "status", "delta"]
        assert set(kinds[3:-1]) == {"delta"}
        assert kinds[-1] == "done"
        accepted, status = ended.messages[:2]
        assert accepted["prompt_tokens"] == 3
        assert accepted["rid"] == "c1-0.0"
        assert status["state"] == "decode"
        assert status["cached"] == 0
        assert all(value >= 0 for value in ended.last["timings"].values())
        assert set(ended.last["timings"]) == {"queue", "prefill", "ttft", "decode"}


async def test_json_and_messagepack_say_the_same():
    def told(messages: list[dict[str, Any]]) -> dict[str, Any]:
        deltas = [message for message in messages if message["t"] == "delta"]
        rest = [{k: v for k, v in m.items() if k not in ("timings", "rid", "now")} for m in messages if m["t"] != "delta"]
        for message in rest:
            message.get("why", {}).pop("lag", None)  # of this machine at this moment
        return {"text": "".join(delta["x"] for delta in deltas), "n": sum(delta["n"] for delta in deltas), "rest": rest}

    async with serving() as served:
        answers = []
        for codec in CODECS:
            async with served.raw(codec) as raw:
                limits = {name: raw.welcome[name] for name in ("t", "server", "models", "limits", "heartbeat_s", "epoch")}
                await raw.create("a", "hé€𝄞", max_tokens=30)
                first = told((await raw.ended("a")).messages)
                await raw.create("b", [1, 2], max_tokens=0)
                await raw.create("c", [{"role": "user", "content": "hi"}], api="chat", max_tokens=9, stop="i<")
                chat = told((await raw.ended("c")).messages)
                await raw.send(t="nonsense")
                answers.append((limits, first, chat, told(await raw.synced())))
        assert answers[0] == answers[1]
        assert answers[0][1]["text"].startswith("hé€𝄞hé€𝄞")


async def test_several_samples_of_one_prompt_are_streams_of_their_own():
    async with serving(reply=lambda _request, branch, _position: ord("a") + branch) as served, served.raw() as raw:
        await raw.create(["x", "y", "z"], "abc", max_tokens=5, n=3)
        assert [(await raw.ended(name)).text for name in ("x", "y", "z")] == ["aaaaa", "bbbbb", "ccccc"]
        assert served.tokenizer.calls == 1


async def test_cancel_ends_one_stream_with_its_text_so_far():
    async with serving() as served, served.raw() as raw:
        served.engine.hold = 5
        await raw.create("a", "abc", max_tokens=100)
        await raw.create("b", "xyz", max_tokens=100)
        await raw.wait_for(lambda message: message.get("id") == "a" and message.get("o", 0) + message.get("n", 0) >= 5)
        await raw.send(t="cancel", id="a")
        ended = await raw.wait_for_type("done", "a")
        assert (ended["finish_reason"], ended["o"]) == ("cancelled", 5)
        await eventually(lambda: served.engine.live == ["c1-1.0"])
        await raw.send(t="cancel", id="a")
        await raw.send(t="cancel", id="never")
        await served.engine.release()
        assert (await raw.ended("b")).count == 100
        assert all(message["id"] == "a" for message in await raw.synced())


async def test_cancel_sent_together_with_create_ends_the_stream():
    async with serving() as served, served.raw() as raw:
        served.engine.hold = 0
        for _ in range(5):
            await raw.create("a", "abc", max_tokens=100)
            await raw.send(t="cancel", id="a")
            ended = await raw.ended("a")
            assert ended.reason == "cancelled"
        await served.quiet()


async def test_an_id_is_taken_until_the_last_frame_and_free_afterwards():
    async with serving() as served, served.raw() as raw:
        served.engine.hold = 3
        await raw.create("a", "abc", max_tokens=6)
        await raw.wait_for_type("delta", "a")
        await raw.create("a", "xyz", max_tokens=6)
        error = await raw.wait_for_type("error")
        assert (error["code"], error["param"]) == ("stream_exists", "id")
        served.engine.hold = None
        await served.engine.release()
        assert (await raw.wait_for_type("done", "a"))["o"] == 6
        await raw.synced()
        await raw.create("a", "xyz", max_tokens=6)
        assert (await raw.ended("a")).text == "xyzxyz"


async def test_streams_beyond_the_running_ones_wait_and_beyond_those_are_refused():
    async with serving(limits=SessionLimits(streams=2, queue=2)) as served, served.raw() as raw:
        assert raw.welcome["limits"]["streams"] == 2
        served.engine.hold = 0
        for name in "abcde":
            await raw.create(name, name, max_tokens=3)
        error = await raw.wait_for_type("error", "e")
        assert (error["code"], error["retryable"]) == ("too_many_streams", True)
        await eventually(lambda: len(served.engine.live) == 2)
        await raw.create(["x", "y", "z"], "xyz", max_tokens=3)
        assert (await raw.ended("x")).code == "too_many_streams"
        await raw.send(t="cancel", id="c")
        assert (await raw.ended("c")).reason == "cancelled"
        assert len(served.engine.live) == 2
        served.engine.hold = None
        await served.engine.release()
        assert [(await raw.ended(name)).text for name in "abd"] == ["aaa", "bbb", "ddd"]


async def test_a_group_at_the_head_of_the_queue_starts_when_a_cancel_makes_it_fit():
    async with serving(limits=SessionLimits(streams=3, queue=8)) as served, served.raw() as raw:
        served.engine.hold = 0
        await raw.create(["a", "b"], "abc", max_tokens=3)
        await raw.create(["c", "d"], "abc", max_tokens=3)
        await raw.create("e", "abc", max_tokens=3)
        await eventually(lambda: len(served.engine.live) == 2)
        await raw.synced()
        assert len(served.engine.live) == 2, "a later stream overtook the group"
        await raw.send(t="cancel", id="d")
        await raw.wait_for_type("accepted", "c")
        await raw.send(t="cancel", id="a")
        await raw.wait_for_type("accepted", "e")


@pytest.mark.parametrize("codec", CODECS)
async def test_ping_is_answered_with_its_stamp_and_the_clock(codec: str):
    async with serving() as served, served.raw(codec) as raw:
        await raw.send(t="ping", ts=12.5)
        await raw.send(t="ping")
        first, second = await raw.receive(), await raw.receive()
        assert (first["t"], first["ts"], second["ts"]) == ("pong", 12.5, 0.0)
        assert second["now"] >= first["now"] > 0


@pytest.mark.parametrize("cancel", [True, False])
async def test_bye_ends_the_connection_and_its_streams(cancel: bool):
    async with serving() as served, served.raw() as raw:
        served.engine.hold = 2
        await raw.create("a", "abc", max_tokens=100)
        await raw.wait_for_type("delta", "a")
        await raw.send(t="bye", cancel=cancel)
        assert (await raw.closed()).code == 1000
        await served.quiet()


async def test_a_lost_connection_leaves_nothing_in_the_engine():
    async with serving(limits=SessionLimits(streams=3, queue=10)) as served, served.raw() as other:
        served.engine.hold = 2
        for _ in range(3):
            async with served.raw() as raw:
                for index in range(6):
                    await raw.create(f"s{index}", "abc", max_tokens=100)
                await raw.wait_for_type("delta", "s0")
                raw.socket._writer.transport.abort()
            await served.quiet()
            await eventually(lambda: len(served.server.stream_door.connections) == 1)
        served.engine.hold = None
        await other.create("a", "abc", max_tokens=3)
        assert (await other.ended("a")).text == "abc"


async def test_a_connection_lost_while_its_prompt_is_tokenised_leaves_nothing_in_the_engine():
    async with serving() as served:
        served.engine.hold = 0
        for _ in range(5):
            async with served.raw() as raw:
                await raw.create("s", "abc" * 50, max_tokens=10)
                raw.socket._writer.transport.abort()
            await eventually(lambda: not served.server.stream_door.connections)
            await served.quiet()


@pytest.mark.parametrize("slow", ["taking", "answering"])
async def test_a_connection_lost_while_the_engine_takes_its_request_leaves_nothing_in_the_engine(slow: str):
    async with serving() as served:
        served.engine.hold = 0
        event: asyncio.Event = getattr(served.engine, slow)
        event.clear()
        async with served.raw() as raw:
            await raw.create(["a", "b"], "abc", max_tokens=10)
            await eventually(lambda: bool(served.engine.requests))
            (connection,) = served.server.stream_door.connections
            raw.socket._writer.transport.abort()
            await eventually(lambda: connection.live.session.closed)
        event.set()
        await eventually(lambda: not served.server.stream_door.connections)
        await served.quiet()


async def test_a_stream_is_accepted_before_its_text_even_if_the_engine_is_faster_with_the_text():
    async with serving() as served, served.raw() as raw:
        served.engine.answering.clear()
        await raw.create("s", "abc", max_tokens=6)
        await eventually(lambda: bool(served.engine.requests) and not served.engine.live)
        assert await raw.synced() == []
        served.engine.answering.set()
        ended = await raw.ended("s")
        assert [message["t"] for message in ended.messages] == ["accepted", "status", "delta", "done"]
        assert ended.text == "abcabc"


async def test_text_waits_to_be_merged_but_never_longer_than_the_flush_time():
    limits = SessionLimits(flush_tokens=8, flush_s=0.01, flush_busy_s=0.02)
    async with serving(limits=limits) as served, served.raw() as raw:
        served.engine.hold = 1
        await raw.create("s", "abc", max_tokens=100)
        assert (await raw.wait_for_type("delta", "s"))["n"] == 1, "the first token waits for nothing"
        await served.engine.release(4)
        assert (await raw.wait_for_type("delta", "s"))["n"] == 3, "three tokens came within the flush time: one frame"
        await served.engine.release()
        await raw.wait_for_type("done", "s")
        counts = [message["n"] for message in await raw.synced() if message["t"] == "delta"]
        assert sum(counts) == 96
        assert len(counts) <= 96 // 8


async def test_a_silent_stream_tells_its_state_and_the_connection_sleeps_meanwhile():
    limits = SessionLimits(heartbeat_s=0.05, streams=1)
    async with serving(limits=limits) as served, served.raw() as raw:
        served.engine.hold = 1
        await raw.create("a", "abc", max_tokens=100)
        await raw.create("b", "abc", max_tokens=100)
        await raw.wait_for_type("delta", "a")
        raw._early.clear()
        for _ in range(3):
            assert (await raw.wait_for_type("status", "a"))["state"] == "stalled"
            assert (await raw.wait_for_type("status", "b"))["state"] == "queued"
        await raw.send(t="cancel", id="a")
        assert (await raw.wait_for_type("done", "a"))["o"] == 1


async def test_a_stream_that_waits_for_its_first_token_costs_no_cpu(monkeypatch: pytest.MonkeyPatch):
    """After its status a silent stream must leave the writer asleep: a writer that looks again and again burns a core."""
    async with serving() as served, served.raw() as raw:
        served.engine.hold = 0
        await raw.create("s", "abc", max_tokens=10)
        await raw.wait_for_type("accepted", "s")
        (connection,) = served.server.stream_door.connections
        looks, look = 0, Session.next_message

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal looks
            looks += 1
            return look(*args, **options)

        monkeypatch.setattr(Session, "next_message", counted)
        stream = connection.live.session._table.alive["s"]
        connection.live.session._outbox.status(stream, _status("s"))
        connection._wake.set()
        await raw.wait_for_type("status", "s")
        for _ in range(50):
            await asyncio.sleep(0)
        assert looks < 10


def _status(stream_id: str) -> Any:
    from streamkv.protocol import messages as m

    return m.Status(stream_id, "prefill", 0)


async def test_asking_without_reading_the_answers_stops_being_read(monkeypatch: pytest.MonkeyPatch):
    longest, say = 0, Outbox.say

    def watched(outbox: Outbox, message: Any) -> None:
        nonlocal longest
        say(outbox, message)
        longest = max(longest, len(outbox._control))

    monkeypatch.setattr(Outbox, "say", watched)
    async with serving(limits=SessionLimits(control=8), send_timeout_s=60.0) as served, served.raw() as raw:
        for _ in range(2000):
            await raw.send(t="ping", ts=1.0)
        for _ in range(2000):
            assert (await raw.receive())["t"] == "pong"
        assert longest <= 8
