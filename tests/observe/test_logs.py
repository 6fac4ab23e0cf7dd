"""What a whole session leaves in the log: whose it was and what became of it, and nothing that was said."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import structlog

from streamkv.engine.api import EngineRequest
from streamkv.engine.fake import fake_info
from streamkv.logs import WITHHELD, configure_logs
from tests.server.serving import CONTEXT, VOCAB, HeldEngine, serving

SECRET = "zyzzyva"
"""In every prompt and key of these tests, and in no other word."""


class _Bytes(io.BytesIO):
    @property
    def buffer(self) -> _Bytes:
        return self

    def isatty(self) -> bool:
        return False


Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """Logs as JSON; call it for what was logged so far."""
    captured = _Bytes()
    monkeypatch.setattr(sys, "stderr", captured)
    configure_logs(json=True, level="debug")
    monkeypatch.undo()
    # Loggers of modules keep what they were configured with when they were first used; here they are used again later.
    structlog.configure(cache_logger_on_first_use=False)
    yield lambda: [msgspec.json.decode(line) for line in captured.getvalue().splitlines()]
    structlog.reset_defaults()


class Breaking(HeldEngine):
    """Fails on some prompts with words of the prompt in its local variables, as bugs do."""

    async def submit(self, request: EngineRequest) -> None:
        words = bytes(token for token in request.prompt if token < 256).decode()
        if "break" in words:
            raise RuntimeError("a bug")
        await super().submit(request)


async def test_a_session_with_every_kind_of_end_says_nothing_of_what_was_said(lines: Lines):
    headers = {"Authorization": f"Bearer {SECRET}", "Cookie": f"session={SECRET}"}
    engine = Breaking(info=fake_info(vocab_size=VOCAB, max_model_len=CONTEXT))
    async with serving(engine=engine) as served, served.raw(headers=headers) as raw:
        await raw.create("whole", f"{SECRET} once", max_tokens=20)
        assert (await raw.ended("whole")).reason == "length"
        await raw.create("chat", [{"role": "user", "content": SECRET}], api="chat", max_tokens=3)
        await raw.ended("chat")
        await raw.create("refused", SECRET * 60)
        assert (await raw.ended("refused")).code is not None
        await raw.create("bad field", f"{SECRET}")
        await raw.create("typed", SECRET, temperature=SECRET)
        assert (await raw.ended("typed")).code == "invalid_request"
        await raw.create("broken", f"break {SECRET}", max_tokens=2)
        assert (await raw.ended("broken")).code == "internal"
        await raw.send_frame(f'{{"t": "{SECRET}"'.encode())
        await raw.synced()
        engine.hold = 2
        await raw.create("cancelled", SECRET, max_tokens=9)
        await raw.wait_for(lambda message: message.get("state") == "stalled")
        await raw.send(t="cancel", id="cancelled")
        assert (await raw.ended("cancelled")).reason == "cancelled"
        async with served.http.post(f"{served.base}/v1/chat/completions", json={"prompt": SECRET}, headers=headers) as answer:
            await answer.read()
        async with served.http.get(f"{served.base}/v1/{SECRET}?key={SECRET}", headers=headers) as answer:
            assert answer.status == 404
    logged = lines()
    assert SECRET not in str(logged)
    events = [line["event"] for line in logged]
    assert events.count("stream_opened") == events.count("stream_finished") == 3
    assert {"stream_refused", "stream_failed"} <= set(events)
    assert len(logged) < 20, "a line per token, or nearly"
    for line in logged:
        if line["event"].startswith("stream_"):
            assert line["rid"], line


def test_bound_names_are_in_every_line_of_their_task(lines: Lines):
    with structlog.contextvars.bound_contextvars(conn="c1", stream="s1", tenant="acme"):
        structlog.get_logger().info("inside")
    structlog.get_logger().info("outside")
    inside, outside = lines()
    assert (inside["conn"], inside["stream"], inside["tenant"], inside["level"]) == ("c1", "s1", "acme", "info")
    assert "conn" not in outside


def test_names_that_hold_what_was_said_are_withheld(lines: Lines):
    structlog.get_logger().info("something", **dict.fromkeys(WITHHELD, SECRET), kept="this", long="x" * 5000)
    (line,) = lines()
    assert SECRET not in str(line)
    assert line["kept"] == "this"
    assert len(line["long"]) < 2100


@pytest.mark.parametrize("json", [True, False])
def test_tracebacks_have_no_local_variables(json: bool):
    program = f"""
from streamkv.logs import configure_logs
import structlog
configure_logs(json={json})
prompt = "zyz" + "zyva"
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger().exception("failed", what=object())
"""
    errors = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
    ).stderr
    assert "ZeroDivisionError" in errors
    assert SECRET not in errors
