"""Who may come in, for every route that there is; from which pages and under which names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from streamkv.errors import ConfigError
from streamkv.server.app import Server
from streamkv.server.config import HttpLimits, ServerConfig
from streamkv.server.routes import Access, Route
from tests.server.serving import Serving, serving
from tests.server.wire import KEYS, Answer, ask, bearer, exchange, keyed

PUBLIC = {"/health", "/ready"}
PAGES = re.compile(r"/(assets/.*|favicon\.ico)?")  # of the page, once there is one
WEBSOCKET = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
]


def every_route(server: Server) -> list[tuple[str, str, Access | None]]:
    """What aiohttp's router really has: method, a path that matches, and what the guard knows about it."""
    found = []
    for route in server.app().router.routes():
        assert route.resource is not None
        path = re.sub(r"\{[^}]*\}", "x", route.resource.canonical)
        found.append((route.method, path, server.guard._access.get(route)))
    return found


async def knock(served: Serving, method: str, path: str, headers: dict[str, str]) -> Answer:
    return await ask(served, method, path, headers, {} if method == "POST" else None)


# -- R-ROUTES ----------------------------------------------------------------------------------------------------------


async def test_r_routes_everything_but_the_public_asks_for_a_key(tmp_path: Path):
    """R-ROUTES: every route x {no key, bad key, key in the address, key in a cookie}."""
    async with keyed(tmp_path) as served:
        routes = every_route(served.server)
        assert {path for _, path, _ in routes} >= PUBLIC | {"/v1/stream", "/v1/ws-tickets"}
        for method, path, access in routes:
            assert access is not None, f"{path} has no access"
            if path in PUBLIC or PAGES.fullmatch(path):
                assert access is Access.PUBLIC
                assert (await knock(served, method, path, {})).status == 200
                continue
            assert access is not Access.PUBLIC, f"{path} is open to everybody"
            secret = KEYS["boss"]
            for headers in ({}, {"Authorization": "Bearer " + "x" * 20}, {"Cookie": f"key={secret}"}, {"X-Api-Key": secret}):
                answer = await knock(served, method, path, headers)
                assert (answer.status, answer.code) == (401, "unauthorized"), (method, path, headers)
            assert (await knock(served, method, f"{path}?api_key={secret}&token={secret}", {})).status == 401


async def test_r_routes_a_tenant_is_no_administrator(tmp_path: Path):
    """R-ROUTES: every route x {tenant, other tenant, administrator}."""
    async with keyed(tmp_path) as served:
        for method, path, access in every_route(served.server):
            for tenant in KEYS:
                status = (await knock(served, method, path, bearer(tenant))).status
                assert status != 401, (path, tenant)
                assert (status == 403) == (access is Access.ADMIN and tenant != "boss"), (path, tenant, status)


async def test_r_routes_a_websocket_without_a_key_gets_no_further_than_its_first_frame(tmp_path: Path):
    """R-ROUTES: an upgrade without a key is accepted only to be told who it is; with a bad one it is not."""
    async with keyed(tmp_path) as served:
        for method, path, access in every_route(served.server):
            if access is not Access.UPGRADE:
                continue
            bad = [*WEBSOCKET, ("Authorization", "Bearer " + "x" * 20)]
            assert (await ask(served, method, path, bad)).status == 401
            assert (await ask(served, method, path + "?ticket=" + "x" * 43, WEBSOCKET)).status == 401


async def test_methods_that_a_path_does_not_have_are_refused(tmp_path: Path):
    async with keyed(tmp_path) as served:
        for method, path, _ in every_route(served.server):
            for other in ("HEAD", "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
                answer = await knock(served, other, path, bearer("boss"))
                if other != method and (other, path) not in {(m, p) for m, p, _ in every_route(served.server)}:
                    assert answer.status == 405, (other, path)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "//v1/stream",
        "/V1/stream",
        "/v1/stream/",
        "/v1/./stream",
        "/health/../v1/stream",
        "/v1/stream%00",
        "/%2e%2e/etc/passwd",
    ],
)
async def test_paths_that_look_like_others_are_nothing(tmp_path: Path, path: str):
    async with keyed(tmp_path) as served:
        answer = await ask(served, "GET", path)
        # aiohttp resolves dots before it looks for a route: then it is that route, and asks for a key.
        assert (answer.status, answer.code) in {(404, "not_found"), (401, "unauthorized")}


async def test_a_route_without_access_answers_nobody():
    async def forgotten(_request: web.Request) -> web.Response:
        raise AssertionError("reached")

    async with serving() as served:
        guard = served.server.guard
        app = web.Application(middlewares=[guard.middleware])
        app.router.add_route("GET", "/forgotten", forgotten)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            assert (await ask(runner.addresses[0][1], "GET", "/forgotten")).status == 404
        finally:
            await runner.cleanup()


# -- the admin port ----------------------------------------------------------------------------------------------------


async def test_with_an_admin_port_admin_routes_are_there_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def secret(_request: web.Request) -> web.Response:
        return web.json_response({})

    routes = Server.routes
    monkeypatch.setattr(Server, "routes", lambda self: [*routes(self), Route("GET", "/admin/secret", secret, Access.ADMIN)])
    async with keyed(tmp_path) as served:
        assert (await ask(served, "GET", "/admin/secret", bearer("boss"))).status == 200
        assert (await ask(served, "GET", "/admin/secret", bearer("acme"))).status == 403
    async with keyed(tmp_path, admin_port=0) as served:
        admin = served.server.guard.admin_port
        assert admin not in (0, None, served.server.port)
        assert (await ask(served, "GET", "/admin/secret", bearer("boss"))).status == 404
        assert (await ask(admin, "GET", "/admin/secret", bearer("boss"))).status == 200
        assert (await ask(admin, "GET", "/admin/secret", bearer("acme"))).status == 403
        assert (await ask(admin, "GET", "/admin/secret")).status == 401
        assert (await ask(admin, "GET", "/v1/kv/map", bearer("boss"))).status == 404
        assert (await ask(admin, "GET", "/ready")).status == 200
    # Without keys whoever is on this machine runs the server; others never do.
    async with serving() as served:
        assert (await ask(served, "GET", "/admin/secret")).status == 200
    async with serving(host="0.0.0.0", insecure_no_auth=True) as served:
        assert (await ask(served, "GET", "/admin/secret")).status == 403


# -- R-HOST, Origin ----------------------------------------------------------------------------------------------------

HOSTS: list[tuple[str, bool]] = [
    ("127.0.0.1:{port}", True),
    ("localhost", True),
    ("[::1]:80", True),
    ("127.0.0.1", True),
    ("x/?", False),
    ("127.0.0.1/?", False),
    ("evil.example", False),
    ("127.0.0.1.evil.example", False),
    ("127.0.0.1@evil.example", False),
    ("[::1", False),
]
ORIGINS: list[tuple[str | None, bool | None]] = [  # None = only where the page is the server's own
    (None, True),
    ("http://{host}", None),
    ("https://{host}", None),
    ("https://good.example", True),
    ("https://good.example:8443", True),
    ("http://good.example", False),
    ("https://good.example:444", False),
    ("https://good.example/", False),
    ("https://GOOD.example", False),
    ("https://evil.example", False),
    ("https://good.example.evil.example", False),
    ("https://evil.example#good.example", False),
    ("https://evil-good.example", False),
    ("null", False),
    ("", False),
    ("*", False),
    ("ftp://{host}", False),
    ("http://user@{host}", False),
    ("http://[::", False),
    ("https://good.example https://evil.example", False),
]
GOOD = frozenset({"https://good.example", "https://good.example:8443"})


async def test_r_host_and_origin_matrix():
    """R-HOST: 20 origins x 10 hosts, on plain HTTP and on the upgrade."""
    async with serving(allowed_origins=GOOD) as served:
        for host_form, host_good in HOSTS:
            host = host_form.format(port=served.server.port)
            for origin_form, origin_good in ORIGINS:
                headers = {} if origin_form is None else {"Origin": origin_form.format(host=host)}
                # A malformed host makes no origin of its own; the refusal is the same.
                expected = host_good and origin_good is not False
                answer = await ask(served, "GET", "/v1/kv/map", headers, host=host)
                assert (answer.status == 200) is expected, (host, headers)
                if not expected:
                    assert answer.status == 403
                    assert answer.header("Access-Control-Allow-Origin") in (None, headers.get("Origin"))


@pytest.mark.parametrize(
    "target",
    ["http://evil.example/v1/kv/map", "http://evil.example:80/health/../v1/kv/map", "http://x:y@evil.example/v1/kv/map"],
)
async def test_r_host_absolute_form_gets_past_nobody(tmp_path: Path, target: str):
    """R-HOST: the route is what was matched, whatever the request line says about hosts."""
    async with keyed(tmp_path) as served:
        assert (await ask(served, "GET", target)).status in (401, 404)
        assert (await ask(served, "GET", target, bearer("acme"), host="evil.example")).status in (403, 404)


async def test_r_host_two_hosts_or_none_are_refused():
    """R-HOST."""
    async with serving() as served:
        assert (await ask(served, "GET", "/v1/kv/map", [("Host", "evil.example")])).status in (400, 403)
        answer = Answer.parse(await exchange(served.server.port, b"GET /v1/kv/map HTTP/1.0\r\n\r\n"))
        assert answer.status == 403


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        ({"insecure_no_auth": True}, "192.0.2.1:8000", 200),
        ({"insecure_no_auth": True}, "localhost", 200),
        ({"insecure_no_auth": True}, "evil.example", 403),
        ({"insecure_no_auth": True, "allowed_hosts": frozenset({"my.example"})}, "my.example", 200),
        ({"insecure_no_auth": True, "allowed_hosts": frozenset({"my.example"})}, "192.0.2.1", 403),
        ({"api_key": KEYS["acme"]}, "any.example", 200),
        ({"api_key": KEYS["acme"]}, "any.example/", 403),
    ],
    ids=str,
)
async def test_names_of_a_server_that_others_reach(options: dict[str, Any], host: str, status: int):
    async with serving(host="0.0.0.0", **options) as served:
        assert (await ask(served, "GET", "/v1/kv/map", bearer("acme"), host=host)).status == status


# -- CORS --------------------------------------------------------------------------------------------------------------


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type",
    }


async def test_cors_is_off_unless_asked_for():
    async with serving() as served:
        answer = await ask(served, "OPTIONS", "/v1/ws-tickets", preflight("https://good.example"))
        assert answer.status == 405
        assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]


async def test_cors_names_the_one_origin_and_never_credentials(tmp_path: Path):
    async with keyed(tmp_path, allowed_origins=GOOD) as served:
        answer = await ask(served, "OPTIONS", "/v1/ws-tickets", preflight("https://good.example"))
        assert answer.status == 204
        assert answer.header("Access-Control-Allow-Origin") == "https://good.example"
        assert answer.header("Access-Control-Allow-Methods") == "POST"
        # The star stands for whatever SDKs send, but not for this one; and only where there are no credentials.
        assert answer.header("Access-Control-Allow-Headers") == "authorization, *"
        assert answer.header("Vary") == "Origin"
        assert answer.header("Access-Control-Allow-Credentials") is None
        real = await ask(served, "POST", "/v1/ws-tickets", bearer("acme") | {"Origin": "https://good.example"}, {})
        assert (real.status, real.header("Access-Control-Allow-Origin")) == (200, "https://good.example")
        # A page must be able to read why it was refused.
        refused = await ask(served, "POST", "/v1/ws-tickets", {"Origin": "https://good.example"}, {})
        assert (refused.status, refused.header("Access-Control-Allow-Origin")) == (401, "https://good.example")
        for evil in ("https://evil.example", "null", "*"):
            answer = await ask(served, "OPTIONS", "/v1/ws-tickets", preflight(evil))
            assert (answer.status, answer.header("Access-Control-Allow-Origin")) == (405, None)
        assert (await ask(served, "OPTIONS", "/v1/nothing", preflight("https://good.example"))).status == 404


@pytest.mark.parametrize("origin", ["*", "https://*.example", "good.example", "https://good.example/", "https://a/b", "null"])
def test_an_allowed_origin_must_be_one(origin: str):
    with pytest.raises(ConfigError, match="origin"):
        ServerConfig(allowed_origins=frozenset({origin}))


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "fine"),
    [
        ("application/json", True),
        ("application/json; charset=utf-8", True),
        ("Application/JSON", True),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
        ("application/jsonx", False),
        ("text/plain; application/json", False),
        ("", False),
    ],
)
async def test_every_post_must_be_json(content_type: str, fine: bool):
    async with serving() as served:
        for method, path, access in every_route(served.server):
            if method == "POST" and access is Access.CLIENT:
                answer = await ask(served, method, path, [("Content-Type", content_type)], b"{}")
                assert (answer.status == 415) is not fine, path
                assert fine or answer.code == "unsupported_media_type"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
async def test_compressed_bodies_are_refused(encoding: str):
    async with serving() as served:
        answer = await ask(served, "POST", "/v1/ws-tickets", {"Content-Encoding": encoding}, b"{}")
        assert answer.status == 415


# -- cookies, headers, errors ------------------------------------------------------------------------------------------


async def test_nothing_sets_a_cookie_and_every_answer_is_marked(tmp_path: Path):
    async with keyed(tmp_path) as served:
        for method, path, _ in every_route(served.server):
            for headers in ({}, bearer("boss"), {"Cookie": "a=b"}):
                answer = await knock(served, method, path, headers)
                assert answer.header("Set-Cookie") is None
                assert answer.header("Server") == "streamkv"
                assert answer.header("X-Content-Type-Options") == "nosniff"


async def test_a_handler_that_fails_says_nothing_about_it(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    async def fails(_request: web.Request) -> web.Response:
        raise RuntimeError("secret /etc/passwd 0x7f0000000000")

    async def fails_late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise RuntimeError("secret")

    async def teapot(_request: web.Request) -> web.Response:
        raise web.HTTPBadRequest(text="secret")

    routes = Server.routes
    more = [Route("GET", f"/{handler.__name__}", handler, Access.CLIENT) for handler in (fails, fails_late, teapot)]
    monkeypatch.setattr(Server, "routes", lambda self: [*routes(self), *more])
    async with serving() as served:
        answer = await ask(served, "GET", "/fails")
        assert (answer.status, answer.code) == (500, "internal")
        assert b"secret" not in answer.body
        assert "secret" in "".join(capfd.readouterr())  # for the operator
        answer = await ask(served, "GET", "/fails_late")
        assert b"secret" not in answer.body
        assert b"error" not in answer.body  # an answer in an answer would be a lie
        answer = await ask(served, "GET", "/teapot")
        assert (answer.status, b"secret" in answer.body) == (400, False)


# -- the name of a request ---------------------------------------------------------------------------------------------


def lines_of(capfd: pytest.CaptureFixture[str], rid: str) -> list[str]:
    return [line for line in "".join(capfd.readouterr()).splitlines() if rid in line]


async def test_every_answer_names_its_request_and_so_does_the_log_of_every_refusal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Every route, asked as nobody, as a stranger, as a tenant and as an administrator; known methods and others."""
    async with keyed(tmp_path) as served:
        statuses = set()
        for number, (method, path, _) in enumerate(every_route(served.server)):
            for who in ({}, {"Authorization": "Bearer " + "x" * 20}, bearer("acme"), bearer("boss")):
                for asked in (method, "PROPFIND"):
                    rid = f"mine-{number}.{len(statuses)}"
                    answer = await knock(served, asked, path, who | {"X-Request-Id": rid})
                    statuses.add(answer.status)
                    assert answer.header("X-Request-Id") == rid, (asked, path, answer)
                    lines = lines_of(capfd, rid)
                    assert len(lines) == (answer.status >= 400), (asked, path, answer, lines)
                    assert all(str(answer.status) in line and answer.code in line for line in lines if answer.body)
        assert statuses >= {200, 400, 401, 403, 404, 405, 426}


REFUSALS: list[tuple[int, str, str, list[tuple[str, str]], bytes | None]] = [
    (401, "POST", "/v1/completions", [], b"{}"),
    (403, "GET", "/v1/models", [("Origin", "https://evil.example")], None),
    (403, "GET", "/v1/models", [("Host", "x/?")], None),
    (403, "GET", "/metrics", [*bearer("acme").items()], None),
    (404, "GET", "/nothing", [], None),
    (405, "DELETE", "/v1/models", [], None),
    (405, "OPTIONS", "/v1/models", [("Origin", "https://evil.example")], None),
    (408, "POST", "/tokenize", [*bearer("acme").items(), ("Content-Length", "5"), ("Content-Type", "application/json")], None),
    (413, "POST", "/tokenize", [*bearer("acme").items()], b" " * (2 << 20)),
    (415, "POST", "/tokenize", [*bearer("acme").items(), ("Content-Type", "text/plain")], b"{}"),
    (415, "POST", "/tokenize", [*bearer("acme").items(), ("Content-Encoding", "br")], b"{}"),
    (417, "GET", "/nothing", [("Expect", "a secret")], None),
    (417, "GET", "/v1/models", [("Expect", "a secret")], None),
    (429, "GET", "/v1/stream", WEBSOCKET, None),
]


@pytest.mark.parametrize(("status", "method", "path", "headers", "body"), REFUSALS, ids=lambda value: str(value)[:24])
async def test_what_is_refused_before_a_handler_has_a_name_too(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    status: int,
    method: str,
    path: str,
    headers: list[tuple[str, str]],
    body: bytes | None,
):
    """Each kind of the guard's and the listener's own refusals."""
    http = HttpLimits(body_s=0.05)
    async with keyed(tmp_path, http=http, max_unauthenticated=0 if status == 429 else 1) as served:
        host = dict(headers).get("Host")
        headers = [(name, value) for name, value in headers if name != "Host"]
        for given in ("mine-1", "not one to be logged", ""):
            answer = await ask(served, method, path, [*headers, ("X-Request-Id", given)], body, host=host)
            assert answer.status == status
            assert set(answer.json["error"]) == {"message", "type", "param", "code"}
            assert b"secret" not in answer.body, "the client's own words"
            rid = answer.header("X-Request-Id")
            assert rid == given if given == "mine-1" else re.fullmatch(r"[0-9a-f]{24}", rid or "")
            (line,) = lines_of(capfd, rid)
            assert "request_failed" in line
            assert str(status) in line
            assert path not in line


async def test_what_is_not_http_has_a_name_too(capfd: pytest.CaptureFixture[str]):
    async with serving() as served:
        for data in (b"GET /health HTTP/1.1\nHost: x\n\n", b"GET /health\r\nHost: x\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
            answer = Answer.parse(await exchange(served.server.port, data))
            assert answer.status == 400
            (line,) = lines_of(capfd, answer.header("X-Request-Id") or "none")
            assert "request_failed" in line
