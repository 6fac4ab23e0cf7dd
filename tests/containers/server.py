"""The service `streamkv` of the running stack, as its users reach it."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final

from streamkv.client import connect
from tests.containers.engine import Engine
from tests.containers.report import until

__all__ = ["Server"]

_READY_S: Final = 120.0
_LONG_S: Final = 8.0
"""How long a stream takes that is to be still running when the signal comes, and to end well within the time for draining."""
_STORY: Final = [{"role": "user", "content": "Tell me a long story about a fox."}]


class Server:
    """Its published port."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.port = int(engine.environment["STREAMKV_PORT"])
        self.key = engine.environment["STREAMKV_API_KEY"]
        self.admin_key = engine.environment["STREAMKV_ADMIN_KEY"]
        self.tokens_per_s = 0.0

    def get(self, path: str, key: str | None = None) -> tuple[int, bytes]:
        """(status, body); 0 if nobody answers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def until_ready(self) -> float:
        """Seconds until `/ready` says so on the published port."""
        return until("/ready", _READY_S, lambda: self.get("/ready")[0] == 200)

    def talk(self, then: Callable[[], object] | None = None, **sampling: Any) -> tuple[int, str, bool]:
        """A story over the WebSocket; `then` runs in a thread once it has begun.

        Returns:
            (tokens, finish reason, whether the server said meanwhile that it goes away)
        """
        return asyncio.run(self._talk(then, sampling))

    def outlast(self, then: Callable[[], object]) -> int:
        """A stream that is running when `then` ends the server; asserts that all its tokens come, returns their number."""
        wanted = min(1500, max(50, round(self.tokens_per_s * _LONG_S)))
        found = self.talk(then, max_tokens=wanted, ignore_eos=True)
        assert found == (wanted, "length", True), f"{found} of {wanted}"
        return wanted

    async def _talk(self, then: Callable[[], object] | None, sampling: dict[str, Any]) -> tuple[int, str, bool]:
        begin = time.monotonic()
        async with connect(f"ws://127.0.0.1:{self.port}/v1/stream", api_key=self.key, reconnect_s=0) as client:
            stream = client.chat(_STORY, **sampling)
            beside = None
            async for _ in stream:
                if then is not None and beside is None:
                    beside = asyncio.create_task(asyncio.to_thread(then))
            drained = client.draining is not None
        self.tokens_per_s = stream.num_tokens / (time.monotonic() - begin)
        if beside is not None:
            await beside
        assert stream.done is not None
        return stream.num_tokens, str(stream.done.finish_reason), drained
