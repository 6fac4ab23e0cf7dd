"""What a request of several inputs costs its tenant: one request, all of its tokens, and never more streams than it may have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from streamkv.server.limits import Quota, TokenBucket
from streamkv.server.principal import Principal
from tests.server.openai.dialect import COMPLETIONS, EMBEDDINGS, bare, door, post
from tests.server.serving import Serving, eventually


@asynccontextmanager
async def limited(**quota: float) -> AsyncIterator[tuple[Serving, list[float]]]:
    """A server whose only tenant has this quota, and the time of its admission, which stands still."""
    now = [1000.0]
    async with door() as served:
        admission, nobody = served.server.admission, Principal("t", quota=msgspec.convert(quota, Quota))
        admission._clock = lambda: now[0]
        served.server.guard.auth._nobody = nobody
        yield served, now


def bucket(served: Serving, name: str) -> TokenBucket:
    return getattr(served.server.admission._tenants["t"], name)


async def embed(served: Serving, *inputs: Any) -> tuple[int, Any]:
    status, body, headers = await post(served, EMBEDDINGS, {"input": list(inputs)})
    assert (status == 429) == ("Retry-After" in headers)
    served.server.admission.check()
    return status, body


async def test_five_inputs_are_one_request():
    async with limited(requests_per_s=1) as (served, now):
        status, body = await embed(served, *["abc"] * 5)
        assert (status, len(body["data"])) == (200, 5)
        assert bucket(served, "requests")._level == 0
        status, body = await embed(served, "abc")
        assert (status, body["error"]["code"]) == (429, "rate_limited")
        assert len(served.engine.requests) == 5
        now[0] += 1.0
        assert (await embed(served, "abc"))[0] == 200


async def test_samples_of_a_completion_are_one_request():
    async with limited(requests_per_s=1) as (served, _):
        body = {"prompt": "abc", "max_tokens": 2, "n": 5}
        assert (await post(served, COMPLETIONS, body))[0] == 200
        assert (await post(served, COMPLETIONS, body))[0] == 429


async def test_the_tokens_of_all_inputs_are_charged_and_refused_together():
    async with limited(prompt_tokens_per_s=10) as (served, now):
        # Like one prompt that is longer than the bucket ever holds: once, and then its tenant waits for that.
        assert (await embed(served, *["abcde"] * 6))[0] == 200
        assert bucket(served, "tokens")._level == -20
        assert (await embed(served, "a"))[0] == 429
        now[0] += 3.0
        assert (await embed(served, "a" * 6, "b" * 4))[0] == 200
        assert (await embed(served, "a", "b"))[0] == 429
        assert len(served.engine.requests) == 8, "a part of what is refused was computed"


async def test_many_at_once_are_not_let_in_before_the_first_is_charged():
    async with limited(prompt_tokens_per_s=10) as (served, _):
        statuses = await asyncio.gather(*(embed(served, *["abcde"] * 6) for _ in range(20)))
        assert sorted(status for status, _ in statuses) == [200] + [429] * 19
        assert bucket(served, "tokens")._level == -20


async def test_a_quota_of_streams_bounds_how_many_inputs_run_at_once():
    async with limited(streams=3) as (served, _):
        served.engine.taking.clear()
        asking = asyncio.create_task(embed(served, *["abc"] * 9))
        await eventually(lambda: len(served.engine.requests) == 3)
        tenant = served.server.admission._tenants["t"]
        assert (tenant.streams, tenant.held) == (3, 3)
        assert (await embed(served, "d"))[0] == 429, "its places are taken"
        assert (await post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 1}))[0] == 429
        served.engine.taking.set()
        assert (await asking)[0] == 200
        assert (tenant.streams, tenant.held) == (0, 0)


async def test_prompts_of_a_completion_are_one_request_and_their_samples_streams():
    async with limited(requests_per_s=1, prompt_tokens_per_s=100, streams=5) as (served, now):
        served.engine.hold = 0
        asking = asyncio.create_task(post(served, COMPLETIONS, {"prompt": ["abc"] * 9, "max_tokens": 1, "n": 2}))
        await eventually(lambda: len(served.engine.live) == 4)
        tenant = served.server.admission._tenants["t"]
        assert (tenant.streams, tenant.held) == (4, 4), "two prompts with two samples each; a third has no room"
        assert bucket(served, "requests")._level == 0
        assert bucket(served, "tokens")._level == 100 - 27
        served.engine.hold = None
        await served.engine.release()
        assert (await asking)[0] == 200
        now[0] += 1.0
        assert (await post(served, COMPLETIONS, {"prompt": ["abc"] * 2, "max_tokens": 1, "n": 6}))[0] == 429


async def test_it_takes_what_other_streams_of_the_tenant_have_left():
    async with limited(streams=3) as (served, _):
        served.engine.hold = 0
        running = asyncio.create_task(post(served, COMPLETIONS, {"prompt": "abc", "max_tokens": 2, "n": 2}))
        await eventually(lambda: len(served.engine.live) == 2)
        served.engine.hold = None
        served.engine.taking.clear()
        asking = asyncio.create_task(embed(served, *["abc"] * 9))
        await eventually(lambda: len(served.engine.requests) == 2)
        assert served.server.admission._tenants["t"].streams == 3
        served.engine.taking.set()
        assert (await asking)[0] == 200
        assert served.server.admission._tenants["t"].streams == 2
        await served.engine.release()
        assert (await running)[0] == 200


async def test_streams_of_a_client_that_has_left_count_until_they_have_ended():
    async with limited(streams=2) as (served, _):
        served.engine.taking.clear()
        async with bare(served, EMBEDDINGS, {"input": ["abc"] * 9}):
            await eventually(lambda: len(served.engine.requests) == 2)
        tenant = served.server.admission._tenants["t"]
        await eventually(lambda: not tenant.held)
        served.server.admission.check()
        assert tenant.streams == 2
        served.engine.taking.set()
        await eventually(lambda: not tenant.streams)


async def test_a_refusal_costs_nothing():
    async with limited(requests_per_s=1, prompt_tokens_per_s=100, streams=1) as (served, _):
        assert (await embed(served, "abc", "", "d"))[0] == 400
        status, body = await embed(served, "abc", "d", "x" * 300)
        assert (status, body["error"]["param"], body["error"]["code"]) == (400, "input[2]", "context_length_exceeded")
        assert not served.engine.requests, "a part of what cannot be served was computed"
        assert (await embed(served, "abc", "d"))[0] == 200


async def test_inputs_have_their_tenants_salt():
    async with limited() as (served, _):
        await embed(served, "abc", "d")
        assert [request.salt for request in served.engine.requests] == ["t", "t"]
