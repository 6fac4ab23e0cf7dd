"""API keys, the file that they are in, and who gets in with which."""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
from copy import copy
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv import cli
from streamkv.errors import ConfigError
from streamkv.server import keys as keys_module
from streamkv.server.app import run_until_signalled
from streamkv.server.config import ServerConfig
from streamkv.server.keys import ApiKey, KeyRing, KeyStore, new_key, parse_keys
from streamkv.server.limits import Places, Quota, TokenBucket, network_of
from streamkv.server.principal import Principal
from tests.server.serving import Serving, eventually, serving
from tests.server.wire import KEYS, Answer, ask, bearer, keyed, keys_text


def ring(*keys: str) -> KeyRing:
    return KeyRing(ApiKey.of(sha256(key.encode()).digest(), f"t{index}") for index, key in enumerate(keys))


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_found_by_its_whole_self_only():
    keys = ring("first", "second")
    assert keys.find("second").tenant == "t1"
    for wrong in ("", "secon", "second ", "SECOND", "\udcff", "é" * 100):
        assert keys.find(wrong) is None


@given(st.text(min_size=1), st.text())
def test_no_other_key_is_found(key: str, other: str):
    try:
        key.encode()
    except UnicodeEncodeError:
        return
    assert (ring(key).find(other.encode("utf-8", "surrogatepass").decode("utf-8", "replace")) is None) == (key != other)


@pytest.mark.parametrize("key", ["first", "third", "nobody's", ""])
def test_all_keys_are_compared_whichever_matches(key: str, monkeypatch: pytest.MonkeyPatch):
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", counting)
    ring("first", "second", "third").find(key)
    # Digests, so that neither the length nor the beginning of what was sent matters.
    assert compared == [(32, 32)] * 3


def test_new_keys_are_long_and_never_the_same():
    made = [new_key() for _ in range(100)]
    assert len({key for key, _ in made}) == 100
    for key, digest in made:
        assert sha256(key.encode()).hexdigest() == digest
        assert len(key) == len("sk-streamkv-") + 43


# -- the file ----------------------------------------------------------------------------------------------------------

DIGEST = "ab" * 32
ENTRY = f'[[keys]]\ntenant = "acme"\nsha256 = "{DIGEST}"\n'


def test_a_file_says_who_may_do_what():
    text = (
        ENTRY
        + f'[[keys]]\ntenant = "boss"\nadmin = true\nnote = "ours"\nsha256 = "{"CD" * 32}"\n'
        + "[quota]\nstreams = 3\n[tenants.acme]\nrequests_per_s = 2.5\nprompt_tokens_per_s = 100\n"
    )
    acme, boss = (key.principal for key in parse_keys(text, "x"))
    assert acme == Principal("acme", is_admin=False, key="abababababab", quota=Quota(2.5, 100))
    assert boss == Principal("boss", is_admin=True, key="cdcdcdcdcdcd", quota=Quota(streams=3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys = 3", "keys"),
        ("[[keys]]\n", "tenant"),
        ("[[keys]", "line"),
        (ENTRY + "admin = 'yes'", "bool"),
        (ENTRY + "key = 'secret'", "key"),
        (ENTRY + ENTRY, "twice"),
        (ENTRY.replace("acme", ""), "tenant"),
        (ENTRY.replace("acme", "a b"), "tenant"),
        (ENTRY.replace("acme", "a" * 65), "tenant"),
        (ENTRY.replace("acme", "../x"), "tenant"),
        (ENTRY.replace(DIGEST, "hunter2"), "not the key itself"),
        (ENTRY + "[quota]\nstreams = 0", "streams"),
        (ENTRY + "[quota]\nrequests_per_s = -1", "requests_per_s"),
        (ENTRY + "[quota]\nrequests_per_s = nan", "requests_per_s"),
        (ENTRY + "[quota]\nrequests = 1", "requests"),
        ("x=" + "[" * 100_000, "keys.toml"),
    ],
)
def test_a_file_with_a_mistake_is_refused_in_one_sentence(text: str, said: str):
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "keys.toml")
    assert said in caught.value.message
    assert "keys.toml" in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("broken", [None, b"[[", b"\xff", b"#" * (5 << 20)], ids=["missing", "toml", "utf8", "large"])
def test_a_file_that_cannot_be_read_stops_the_start_but_not_the_server(tmp_path: Path, broken: bytes | None):
    path = tmp_path / "keys.toml"
    path.write_text(keys_text())
    store = KeyStore(path)
    path.unlink()
    if broken is not None:
        path.write_bytes(broken)
    assert not store.reload()
    assert store.ring.find(KEYS["acme"]) is not None
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        KeyStore(path)


def test_a_changed_file_is_read_again_and_an_unchanged_one_only_if_asked(tmp_path: Path):
    path = tmp_path / "keys.toml"
    path.write_text(keys_text())
    store = KeyStore(path)
    acme, rival = store.ring.find(KEYS["acme"]), store.ring.find(KEYS["rival"])
    assert not store.reload()
    assert store.reload(even_if_unchanged=True)
    path.write_text(keys_text(["acme"]))
    assert store.reload()
    assert store.ring.still_valid(acme)
    assert not store.ring.still_valid(rival)


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(tmp_path: Path):
    path, other = tmp_path / "keys.toml", tmp_path / "new.toml"
    path.write_text(keys_text(["acme"]))
    store = KeyStore(path)
    other.write_text(keys_text(["boss"])[: path.stat().st_size].ljust(path.stat().st_size))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert store.reload()
    assert store.ring.find(KEYS["boss"]) is not None


def test_the_last_key_can_be_revoked_and_lets_nobody_in(tmp_path: Path):
    path = tmp_path / "keys.toml"
    path.write_text(keys_text(["acme"]))
    store = KeyStore(path)
    path.write_text("")
    assert store.reload()
    assert store.required
    assert store.ring.find(KEYS["acme"]) is None


def test_a_key_that_changed_hands_or_rights_is_not_the_same_key(tmp_path: Path):
    path = tmp_path / "keys.toml"
    path.write_text(ENTRY)
    store = KeyStore(path)
    before = Principal("acme", is_admin=False, key=DIGEST[:12])
    assert store.ring.still_valid(before)
    for change in (ENTRY.replace("acme", "rival"), ENTRY + "admin = true\n"):
        path.write_text(change)
        store.reload(even_if_unchanged=True)
        assert not store.ring.still_valid(before)
    path.write_text(ENTRY + "[quota]\nstreams = 1\n")
    store.reload(even_if_unchanged=True)
    assert store.ring.still_valid(before)  # another quota is no reason to hang up


def test_keys_of_the_environment():
    store = KeyStore(None, "environment-key-1", "environment-key-2")
    assert store.ring.find("environment-key-1") == Principal(
        "default", is_admin=False, key=store.ring.find("environment-key-1").key
    )
    assert store.ring.find("environment-key-2").is_admin
    assert not KeyStore().required
    for bad in ("short", "with blanks in it ..", "ümlaute-ümlaute-ü"):
        with pytest.raises(ConfigError, match="16 visible ASCII"):
            KeyStore(None, bad)
    assert "environment-key-1" not in repr(ServerConfig(api_key="environment-key-1"))


def test_the_command_prints_a_key_and_lines_that_the_file_takes(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["keys", "new", "acme", "--admin", "--note", 'a "b" \\ \n c']) == 0
    said = capsys.readouterr().out
    key = next(line for line in said.splitlines() if line.startswith("sk-streamkv-"))
    (found,) = parse_keys(said[said.index("[[keys]]") :], "x")
    assert KeyRing([found]).find(key) == found.principal
    assert (found.principal.tenant, found.principal.is_admin) == ("acme", True)
    assert cli.main(["keys", "new", "a/b"]) == 1
    assert "A-Z a-z 0-9" in capsys.readouterr().err


# -- buckets and places ------------------------------------------------------------------------------------------------


def test_a_bucket_gives_a_second_at_once_and_then_its_rate():
    bucket = TokenBucket(10, now=0.0)
    for _ in range(10):
        assert bucket.wait(1, 0.0) == 0
        bucket.take(1)
    assert bucket.wait(1, 0.0) == pytest.approx(0.1)
    assert bucket.wait(1, 0.1) == 0
    assert bucket.wait(100, 5.0) == 0  # more than it ever holds: once it is full
    bucket.take(100)
    assert bucket.wait(1, 5.0) == pytest.approx(9.1)
    assert bucket.wait(1, -5.0) == pytest.approx(9.1)  # a clock that goes back gives nothing


@given(st.floats(0.1, 1000), st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 50)), max_size=50))
def test_a_bucket_never_gives_more_than_its_rate_and_one_burst(rate: float, wishes: list[tuple[float, float]]):
    bucket, now, taken, largest = TokenBucket(rate, 0.0), 0.0, 0.0, 0.0
    for pause, amount in wishes:
        now += pause
        if bucket.wait(amount, now) == 0:
            bucket.take(amount)
            taken += amount
            largest = max(largest, amount)
            assert taken <= (rate * now + max(bucket.burst, largest)) * (1 + 1e-9)
        else:
            later = now + bucket.wait(amount, now) * (1 + 1e-9) + 1e-9
            assert copy(bucket).wait(amount, later) == 0  # the answer is the truth


def test_places_are_counted_by_network():
    places = Places(2)
    assert [places.enter("a"), places.enter("a"), places.enter("a"), places.enter("b")] == [True, True, False, True]
    places.leave("a")
    assert places.enter("a")
    for name in ("a", "a", "b"):
        places.leave(name)
    assert len(places) == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        (None, "not an address", True),
    ],
)
def test_whose_addresses_are_whose(one: str | None, other: str, same: bool):
    assert (network_of(one) == network_of(other)) is same


# -- a server that asks for keys ---------------------------------------------------------------------------------------


async def models(served: Serving, *headers: tuple[str, str], target: str = "/v1/kv/map") -> Answer:
    return await ask(served, "GET", target, headers)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer wrong-key-0123456789")],
        [("Authorization", f"Basic {KEYS['acme']}")],
        [("Authorization", KEYS["acme"])],
        [("Authorization", f"Bearer  {KEYS['acme']}")],
        [("Authorization", f"Bearer {KEYS['acme']},x")],
        [("Authorization", f"Bearer {KEYS['acme'].upper()}")],
        [("Authorization", f"Bearer {KEYS['acme'][:-1]}")],
        [("Authorization", f"Bearer {KEYS['acme']}0")],
        [("Authorization", "Bearer " + "x" * 5000)],
        [("Authorization", "Bearer \xff\xfe")],
        [("X-Api-Key", KEYS["acme"])],
        [("Api-Key", KEYS["acme"])],
        [("Cookie", f"Authorization=Bearer {KEYS['acme']}; api_key={KEYS['acme']}")],
        [("Proxy-Authorization", f"Bearer {KEYS['acme']}")],
    ],
    ids=lambda headers: headers[0][1][:30] if headers else "none",
)
async def test_only_a_valid_bearer_key_gets_in(tmp_path: Path, headers: list[tuple[str, str]]):
    async with keyed(tmp_path) as served:
        answer = await models(served, *headers)
        assert (answer.status, answer.code, answer.header("WWW-Authenticate")) == (401, "unauthorized", "Bearer")


@pytest.mark.parametrize(
    "query", ["api_key={}", "key={}", "token={}", "access_token={}", "ticket={}", "authorization=Bearer%20{}"]
)
async def test_a_key_in_the_address_gets_nobody_in(tmp_path: Path, query: str):
    async with keyed(tmp_path) as served:
        assert (await models(served, target="/v1/kv/map?" + query.format(KEYS["acme"]))).status == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_a_valid_key_gets_in(tmp_path: Path, scheme: str):
    async with keyed(tmp_path) as served:
        assert (await models(served, ("Authorization", f"{scheme} {KEYS['acme']}"))).status == 200


async def test_two_keys_at_once_are_refused(tmp_path: Path):
    async with keyed(tmp_path) as served:
        both = [("Authorization", f"Bearer {KEYS[tenant]}") for tenant in ("acme", "boss")]
        assert (await models(served, *both)).status in (400, 401)


async def test_a_server_without_keys_takes_whatever_key_a_client_has():
    async with serving() as served:
        assert (await models(served, ("Authorization", "Bearer whatever"))).status == 200


async def test_a_revoked_key_is_out_within_seconds_and_everybody_is_asked_to_look_again(tmp_path: Path):
    async with keyed(tmp_path) as served:
        looked: list[int] = []
        guard, chores = served.server.guard, served.server._chores
        guard.revoked.append(lambda: looked.append(len(guard.auth.keys.ring)))
        rival = guard.auth.keys.ring.find(KEYS["rival"])
        assert (await models(served, *bearer("rival").items())).status == 200
        assert guard.still_valid(rival)
        (tmp_path / "keys.toml").write_text(keys_text(["acme"]))
        chores._keys_at -= 2.0  # two seconds later
        await chores.once()
        assert looked == [1]
        assert not guard.still_valid(rival)
        assert (await models(served, *bearer("rival").items())).status == 401
        assert (await models(served, *bearer("acme").items())).status == 200


def test_the_file_is_looked_at_often_enough_for_the_promise_of_five_seconds():
    from streamkv.server.chores import _KEYS_S, _TICK_S

    assert _KEYS_S + _TICK_S <= 5.0 - 1.0


async def test_sighup_reads_the_keys_at_once_and_does_not_end_the_server(tmp_path: Path):
    async with keyed(tmp_path) as served:
        server, ready = served.server, asyncio.Event()
        running = asyncio.create_task(run_until_signalled(server, ready=ready))
        await ready.wait()
        (tmp_path / "keys.toml").write_text(keys_text(["boss"]))
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: len(server.guard.auth.keys.ring) == 1)
        assert not running.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running is True


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "192.0.2.1"}, True),
        ({"host": "streams.example"}, True),
        ({"admin_port": 1, "admin_host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_key": "0123456789abcdef"}, False),
        ({"host": "0.0.0.0", "admin_key": "0123456789abcdef"}, False),
        ({"host": "0.0.0.0", "api_keys": Path("keys.toml")}, False),
        ({"host": "0.0.0.0", "insecure_no_auth": True}, False),
    ],
    ids=str,
)
def test_without_keys_nothing_but_this_machine_is_served(options: dict[str, Any], refused: bool):
    if not refused:
        ServerConfig(**options)
        return
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**options)
    for hint in ("--api-keys", "STREAMKV_API_KEY", "--insecure-no-auth"):
        assert hint in caught.value.message
    assert "\n" not in caught.value.message
