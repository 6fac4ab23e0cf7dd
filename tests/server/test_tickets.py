"""Tickets, and the other ways in for a WebSocket: header, first frame, nothing at all."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from streamkv.errors import RateLimitedError
from streamkv.server.auth import TICKET_PREFIX
from streamkv.server.principal import Principal, principal_of
from streamkv.server.routes import Access, Route
from streamkv.server.tickets import TICKET_S, Tickets
from tests.server.serving import Serving, eventually, serving
from tests.server.wire import KEYS, ask, bearer, keyed, keys_text

ACME, RIVAL = Principal("acme", key="a"), Principal("rival", key="r")


# -- pure --------------------------------------------------------------------------------------------------------------


def test_a_ticket_is_good_once():
    tickets = Tickets()
    ticket = tickets.issue(ACME, 0.0)
    assert re.fullmatch(r"[A-Za-z0-9_\-]{43}", ticket)
    assert tickets.redeem(ticket, 1.0) is ACME
    assert tickets.redeem(ticket, 1.0) is None


def test_a_ticket_is_good_for_half_a_minute():
    tickets = Tickets()
    early, late = tickets.issue(ACME, 0.0), tickets.issue(RIVAL, 0.0)
    assert tickets.redeem(early, TICKET_S - 0.001) is ACME
    assert tickets.redeem(late, TICKET_S) is None
    assert len(tickets) == 0


def test_one_tenant_cannot_fill_the_memory_nor_keep_others_out():
    tickets = Tickets()
    for _ in range(1024):
        tickets.issue(ACME, 10.0)
    with pytest.raises(RateLimitedError) as caught:
        tickets.issue(ACME, 20.0)
    assert caught.value.retry_after_s == pytest.approx(20.0)
    assert tickets.redeem(tickets.issue(RIVAL, 20.0), 20.0) is RIVAL
    tickets.issue(ACME, 10.0 + TICKET_S)
    assert len(tickets) == 1


@given(st.lists(st.tuples(st.sampled_from(["issue", "redeem", "guess"]), st.floats(0, 20), st.integers(0, 30)), max_size=60))
def test_a_ticket_never_proves_more_than_it_was_issued_for(script: list[tuple[str, float, int]]):
    tickets, now, issued = Tickets(), 0.0, list[tuple[str, Principal, float]]()
    for action, pause, number in script:
        now += pause
        if action == "issue":
            principal = (ACME, RIVAL)[number % 2]
            issued.append((tickets.issue(principal, now), principal, now))
        elif action == "guess":
            assert tickets.redeem(f"guess {number}", now) is None
        elif issued:
            ticket, principal, made = issued.pop(number % len(issued))
            assert tickets.redeem(ticket, now) is (principal if now < made + TICKET_S else None)
            assert tickets.redeem(ticket, now) is None
    tickets.expire(now + TICKET_S)
    assert len(tickets) == 0
    assert not tickets._count


# -- over the wire -----------------------------------------------------------------------------------------------------


class Greeting:
    """A door whose one WebSocket says who came in: by its upgrade, or by the token in the first frame."""

    def __init__(self, served: Serving) -> None:
        self.guard = served.server.guard

    def routes(self) -> list[Route]:
        return [Route("GET", "/greet", self._greet, Access.UPGRADE)]

    async def _greet(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=["greet"])
        await socket.prepare(request)
        token = (await socket.receive_json())["token"]
        principal = self.guard.authenticate_hello(request, token)
        if principal is None:
            await socket.close(code=4401)
            return socket
        assert principal_of(request) == principal
        await socket.send_json({"tenant": principal.tenant})
        await socket.receive()
        return socket

    def drain(self, deadline_s: float, reason: str) -> None: ...

    def close(self, reason: str) -> None: ...

    idle = closed = True


async def ticket_of(served: Serving, tenant: str) -> str:
    answer = await ask(served, "POST", "/v1/ws-tickets", bearer(tenant), {})
    assert (answer.status, answer.json["expires_in"], answer.header("Cache-Control")) == (200, 30, "no-store")
    return answer.json["ticket"]


async def greeted(port: int, *, token: str | None = None, query: str = "", **options: Any) -> str | int:
    """The tenant's name, or the status or close code that says no."""
    options.setdefault("protocols", ["greet"])
    try:
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"http://127.0.0.1:{port}/greet{query}", **options) as socket,
        ):
            assert socket.protocol == "greet"  # never a ticket
            await socket.send_json({"token": token})
            message = await socket.receive()
            return message.json()["tenant"] if message.type is aiohttp.WSMsgType.TEXT else message.data
    except aiohttp.WSServerHandshakeError as error:
        return error.status


@pytest.fixture
def greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every server of the test has that door as well."""
    from streamkv.server import app

    routes = app.Server.routes
    monkeypatch.setattr(
        app.Server,
        "routes",
        lambda self: routes(self) + Greeting(type("S", (), {"server": self})()).routes(),  # type: ignore[arg-type]  # all it needs
    )


@pytest.mark.usefixtures("greeting")
async def test_every_way_in(tmp_path: Path):
    async with keyed(tmp_path) as served:
        port = served.server.port
        assert await greeted(port, headers=bearer("acme")) == "acme"
        assert await greeted(port, token=KEYS["rival"]) == "rival"
        ticket = await ticket_of(served, "acme")
        assert await greeted(port, query=f"?ticket={ticket}") == "acme"
        assert await greeted(port, query=f"?ticket={ticket}") == 401
        ticket = await ticket_of(served, "rival")
        assert await greeted(port, protocols=[TICKET_PREFIX + ticket, "greet"]) == "rival"
        assert await greeted(port, protocols=[TICKET_PREFIX + ticket, "greet"]) == 401
        ticket = await ticket_of(served, "acme")
        assert await greeted(port, token=ticket) == "acme"
        assert await greeted(port, token=ticket) == 4401
        # Who has proved himself already does not become somebody else.
        assert await greeted(port, headers=bearer("acme"), token=KEYS["boss"]) == "acme"


@pytest.mark.usefixtures("greeting")
async def test_every_way_to_stay_out(tmp_path: Path):
    async with keyed(tmp_path) as served:
        port = served.server.port
        for token in (None, "", "x", "x" * 100_000, KEYS["acme"] + "0", "\ud7ff"):
            assert await greeted(port, token=token) == 4401
        assert await greeted(port, headers={"Authorization": "Bearer nonsense"}, token=KEYS["acme"]) == 401
        assert await greeted(port, query="?ticket=nonsense", token=KEYS["acme"]) == 401
        assert await greeted(port, query="?ticket=") == 401
        assert await greeted(port, query=f"?token={KEYS['acme']}") == 4401
        assert await greeted(port, headers={"Cookie": f"ticket={await ticket_of(served, 'acme')}"}) == 4401
        ticket = await ticket_of(served, "acme")
        assert await greeted(port, query=f"?ticket={ticket}&ticket={ticket}") == 401
        assert len(served.server.guard.strangers) == 0


@pytest.mark.usefixtures("greeting")
async def test_a_ticket_dies_with_the_key_that_it_came_from(tmp_path: Path):
    async with keyed(tmp_path) as served:
        ticket = await ticket_of(served, "rival")
        (tmp_path / "keys.toml").write_text(keys_text(["acme"]))
        await served.server.guard.reload_keys()
        assert await greeted(served.server.port, query=f"?ticket={ticket}") == 401


@pytest.mark.usefixtures("greeting")
async def test_tickets_work_where_no_keys_are_needed():
    async with serving() as served:
        answer = await ask(served, "POST", "/v1/ws-tickets", {}, {})
        assert await greeted(served.server.port, query=f"?ticket={answer.json['ticket']}") == ""


@pytest.mark.usefixtures("greeting")
async def test_sockets_that_have_not_proved_who_they_are_are_few(tmp_path: Path):
    async with keyed(tmp_path, max_unauthenticated=3) as served, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{served.server.port}/greet"
        silent = [await http.ws_connect(url, protocols=["greet"]) for _ in range(3)]
        assert await greeted(served.server.port, token=KEYS["acme"]) == 429
        assert await greeted(served.server.port, headers=bearer("acme")) == "acme"  # who has a key is not in question
        await silent[0].send_json({"token": KEYS["acme"]})
        assert await silent[0].receive_json() == {"tenant": "acme"}
        assert await greeted(served.server.port, token=KEYS["acme"]) == "acme"  # that one's place is free, though it stays
        await silent[1].close()
        await eventually(lambda: len(served.server.guard.strangers) == 1)
        for socket in silent:
            await socket.close()
        await eventually(lambda: len(served.server.guard.strangers) == 0)


@pytest.mark.usefixtures("greeting")
async def test_no_log_has_a_ticket_or_a_key(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "aiohttp")
    async with keyed(tmp_path) as served:
        secrets = [await ticket_of(served, "acme") for _ in range(4)]
        port = served.server.port
        await greeted(port, query=f"?ticket={secrets[0]}")
        await greeted(port, query=f"?ticket={secrets[0]}")
        await greeted(port, protocols=[TICKET_PREFIX + secrets[1], "greet"])
        with pytest.raises(aiohttp.WSServerHandshakeError):  # no protocol in common: aiohttp would write what was offered
            await served.http.ws_connect(served.url, protocols=[TICKET_PREFIX + secrets[2]])
        await ask(served, "GET", f"/v1/nothing?ticket={secrets[3]}")
        await ask(served, "GET", "/v1/stream", [("Authorization", f"Bearer {KEYS['acme']}x")])
        await asyncio.sleep(0)
    said = "".join(capfd.readouterr()) + caplog.text
    for secret in (*secrets, *KEYS.values()):
        assert secret not in said
