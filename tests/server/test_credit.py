"""Credit on a real socket: a stream ends where its client says, others go on, and the engine knows."""

from __future__ import annotations

import pytest

from streamkv.protocol.limits import SessionLimits
from tests.server.serving import eventually, serving
from tests.server.test_resume import CODECS, reference, reply


@pytest.mark.parametrize("codec", CODECS)
async def test_a_stream_without_credit_stops_exactly_there_while_others_finish(codec: str):
    async with serving(reply=reply, context=600) as served, served.raw(codec) as raw:
        await raw.create("slow", [1], max_tokens=400, create_max=256)
        others = [f"s{number}" for number in range(10)]
        for number, name in enumerate(others):
            await raw.create(name, [number], max_tokens=300)
        for number, name in enumerate(others):
            assert (await raw.ended(name)).text == reference(number, 300)
        await raw.wait_for(lambda message: message.get("state") == "stalled")
        (live,) = served.engine._live.values()
        assert (live.num_tokens, live.parked) == (256, True)
        said = []
        while sum(message["n"] for message in said) < 256:
            said.append(await raw.wait_for_type("delta", "slow"))
        assert "".join(message["x"] for message in said) == reference(1, 256)
        for limit in (100, 256, 257, 257, 300):  # late, repeated, larger
            await raw.send(t="credit", id="slow", max=limit)
        await eventually(lambda: live.num_tokens == 300)
        await raw.send(t="credit", id="slow", max=2**53 - 1)
        while said[-1]["t"] != "done":
            said.append(await raw.wait_for(lambda message: message.get("id") == "slow" and message["t"] in ("delta", "done")))
        assert "".join(message.get("x", "") for message in said) == reference(1, 400)


async def test_samples_have_credit_of_their_own():
    async with serving(reply=reply, context=600) as served, served.raw() as raw:
        await raw.create(["a", "b", "c"], [1], max_tokens=50, create_max=4)
        await eventually(lambda: sorted(live.num_tokens for live in served.engine._live.values()) == [4, 4, 4])
        await raw.send(t="credit", id="b", max=9)
        await eventually(lambda: sorted(live.num_tokens for live in served.engine._live.values()) == [4, 4, 9])
        await raw.send(t="credit", id="b", max=50)
        assert (await raw.ended("b")).count == 50
        assert len(served.engine.live) == 2


async def test_credit_that_comes_before_the_engine_has_the_request_counts():
    async with serving(reply=reply) as served, served.raw() as raw:
        served.engine.taking.clear()
        await raw.create("s", [1], max_tokens=50, create_max=0)
        await raw.send(t="credit", id="s", max=7)
        await raw.synced()
        served.engine.taking.set()
        await raw.wait_for(lambda message: message.get("state") == "stalled")
        await eventually(lambda: [live.num_tokens for live in served.engine._live.values()] == [7])


@pytest.mark.parametrize("limit", [0, 3])
async def test_who_grants_nothing_for_too_long_is_ended(limit: int):
    limits = SessionLimits(stall_s=0.05)
    async with serving(reply=reply, limits=limits) as served, served.raw() as raw:
        await raw.create("s", [1], max_tokens=50, create_max=limit)
        last = await raw.wait_for_type("error", "s")
        assert (last["code"], last["retryable"]) == ("stalled_timeout", True)
        await served.quiet()
        await raw.create("t", [2], max_tokens=5)
        assert (await raw.ended("t")).text == reference(2, 5)


@pytest.mark.parametrize("field", ["max", "ack"])
@pytest.mark.parametrize("value", [-1, 2**53])
async def test_credit_out_of_bounds_is_a_notice(field: str, value: int):
    async with serving(reply=reply) as served, served.raw() as raw:
        await raw.create("s", [1], max_tokens=20, create_max=3)
        await raw.send(**{"t": "credit", "id": "s", "max": 20} | {field: value})
        error = await raw.wait_for_type("error")
        assert (error["code"], error["param"]) == ("invalid_request", field)
        await raw.send(t="credit", id="s", max=20)
        assert (await raw.ended("s")).count == 20
