"""Books what happens in metrics: of streams by observing `TextStreams`, of sockets and doors by plain calls.

Everything runs on the event loop. What a token costs is paid in `batch`, with set operations over a whole step: streams that
had a token in the step before have waited equally long for this one.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from streamkv.engine.api import KV_STATES, EngineInfo, EngineStats, KVMap, StepBatch
from streamkv.observe.lag import LoopLag, Mark
from streamkv.observe.metrics import FINISHED_REASONS, Metrics
from streamkv.text.events import Finished
from streamkv.text.observer import NullObserver
from streamkv.text.stream import PreparedPrompt

__all__ = ["NullRecorder", "Recorder"]

_PAGE: Final = resource.getpagesize()
_UPGRADED: Final = 101


class _Live:
    """A stream on its way.

    Attributes:
        last: when it had its last token, if that was not in the last step with tokens.
        mark: loop lag at its start.
    """

    __slots__ = ("last", "mark", "opened", "state", "wanted")

    def __init__(self, opened: float, wanted: int, mark: Mark) -> None:
        self.opened = opened
        self.wanted = wanted
        self.mark = mark
        self.state = "queued"
        self.last: float | None = None


class NullRecorder(NullObserver):
    """The calls of sockets and doors, and nothing comes of them: for tests, benchmarks and servers without metrics."""

    def connected(self) -> None:
        """A WebSocket has been accepted."""

    def disconnected(self, seconds: float) -> None:
        """It has ended, so many seconds later."""

    def slow_consumer(self) -> None:
        """A connection was ended because its peer did not read."""

    def resumed(self, tokens: int) -> None:
        """A stream was taken up again; so many tokens are sent once more."""

    def resume_gone(self) -> None:
        """A stream could not be taken up again."""

    def orphaned(self, tokens: int) -> None:
        """So many tokens came for a stream that no client is connected to."""

    def frame(self, tokens: int, seconds: float) -> None:
        """A delta of so many tokens has been handed to the socket, which took so long."""

    def rejected(self, gate: str) -> None:
        """A request was turned away; `gate` is one of `streamkv.observe.metrics.GATES`."""

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A request was answered in so long; `handler` is the route's path as it stands in the table, not what came."""


class Recorder(NullRecorder):
    """Of one engine."""

    def __init__(self, info: EngineInfo) -> None:
        """`lag` must be started on the loop that serves."""
        self.lag = LoopLag()
        self.metrics = Metrics(info, self.lag)
        self.metrics.started.set(_started())
        self.outbound: Callable[[], int] = lambda: 0
        """Bytes that wait for readers; whoever knows replaces it."""
        self._live: dict[str, _Live] = {}
        self._flowing: set[str] = set()  # had a token in the last step that gave any
        self._flowing_at = 0.0
        self._paused: set[str] = set()  # neither queued nor decoding; a token tells that a pause is over

    # -- streams --------------------------------------------------------------------------------------------------

    def opened(self, ids: Sequence[str], prepared: PreparedPrompt, salt: str, now: float) -> None:
        """Count them as queued."""
        mark = self.lag.mark()
        for request_id in ids:
            self._live[request_id] = _Live(now, prepared.sampling.max_tokens, mark)
        self.metrics.streams.add(len(ids), "queued")
        self.metrics.request_n.observe(len(ids))

    def refused(self, ids: Sequence[str]) -> None:
        """Forget them."""
        for request_id in ids:
            self._forget(request_id)

    def batch(self, batch: StepBatch) -> None:
        """Who waited how long for this step's token; who changed its state."""
        outputs, at = batch.outputs, batch.at
        flowing = {output.id for output in outputs if output.token_ids}
        if flowing:
            before, then = self._flowing, self._flowing_at
            steady = flowing & before
            if steady:
                self.metrics.itl.observe(at - then, len(steady))
            if len(steady) < len(before):
                for request_id in before - steady:
                    self._live[request_id].last = then
            if len(steady) < len(flowing):
                for request_id in flowing - steady:
                    if not self._token_again(request_id, at):
                        flowing.discard(request_id)
            for request_id in flowing & self._paused:
                self._enter(request_id, "decode")
            self._flowing, self._flowing_at = flowing, at
        for output in [output for output in outputs if output.state is not None]:
            assert output.state is not None
            self._enter(output.id, output.state)

    def _token_again(self, request_id: str, at: float) -> bool:
        """Its first token, or one after a pause; False if it is unknown."""
        live = self._live.get(request_id)
        if live is None:
            return False  # ended by a stop string; the engine does not know yet
        if live.last is None:
            self.metrics.ttft.observe(at - live.opened)
        else:
            self.metrics.itl.observe(at - live.last)
        return True

    def _enter(self, request_id: str, state: str) -> None:
        live = self._live.get(request_id)
        if live is not None and live.state != state:
            self.metrics.streams.add(-1, live.state)
            self.metrics.streams.add(1, state)
            live.state = state
            (self._paused.discard if state == "decode" else self._paused.add)(request_id)

    def finished(self, event: Finished, now: float) -> Finished:
        """Book a whole stream; tells it how late the loop was meanwhile."""
        live = self._forget(event.id)
        if live is None:
            return event
        metrics, timings, why = self.metrics, event.timings, event.why
        metrics.success.add(1, FINISHED_REASONS[event.finish_reason])
        metrics.e2e.observe(now - live.opened)
        metrics.request_prompt.observe(event.prompt_tokens)
        metrics.request_computed.observe(event.prompt_tokens - event.cached_tokens)
        metrics.request_generated.observe(event.completion_tokens)
        metrics.request_wanted.observe(live.wanted)
        metrics.stalled.add(why.stalled)
        metrics.preempted.add(why.preempted)
        if why.miss is not None:
            metrics.misses.add(1, why.miss)
        if why.chunks:
            metrics.chunks.observe(why.chunks)
            metrics.queue.observe(timings.queue)
            metrics.prefill.observe(timings.prefill)
            metrics.decode.observe(timings.decode)
            metrics.inference.observe(timings.prefill + timings.decode)
            if event.completion_tokens > 1:
                metrics.tpot.observe(timings.decode / (event.completion_tokens - 1))
        lag = self.lag.since(live.mark)
        return msgspec.structs.replace(event, why=msgspec.structs.replace(why, lag=lag))

    def _forget(self, request_id: str) -> _Live | None:
        live = self._live.pop(request_id, None)
        if live is not None:
            self.metrics.streams.add(-1, live.state)
            self._flowing.discard(request_id)
            self._paused.discard(request_id)
        return live

    # -- sockets and doors ----------------------------------------------------------------------------------------

    def connected(self) -> None:
        """Count it."""
        self.metrics.sockets.add(1)
        self.metrics.sockets_opened.add()

    def disconnected(self, seconds: float) -> None:
        """Count it."""
        self.metrics.sockets.add(-1)
        self.metrics.socket_seconds.observe(seconds)

    def slow_consumer(self) -> None:
        """Count it."""
        self.metrics.slow.add()

    def resumed(self, tokens: int) -> None:
        """Count it."""
        self.metrics.resumes.add(1, "resumed")
        self.metrics.replayed.add(tokens)

    def resume_gone(self) -> None:
        """Count it."""
        self.metrics.resumes.add(1, "gone")

    def orphaned(self, tokens: int) -> None:
        """Count them."""
        self.metrics.orphans.add(tokens)

    def frame(self, tokens: int, seconds: float) -> None:
        """Count it."""
        self.metrics.frame_tokens.observe(tokens)
        self.metrics.send_seconds.observe(seconds)

    def rejected(self, gate: str) -> None:
        """Count it."""
        self.metrics.rejects.add(1, gate)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count it."""
        self.metrics.http.add(1, handler, method, f"{status // 100}xx")
        if status != _UPGRADED:  # the life of a socket is no answer's
            self.metrics.http_seconds.observe(seconds, handler, method)

    # -- at a scrape ----------------------------------------------------------------------------------------------

    def sample(self, stats: EngineStats, kv: KVMap) -> None:
        """Take over what the engine counts itself, and what stands in its pool now."""
        metrics = self.metrics
        total = stats.blocks_free + stats.blocks_cached + stats.blocks_used
        metrics.running.set(stats.running)
        metrics.waiting.set(stats.waiting)
        metrics.waiting_why.set(stats.waiting - stats.asleep, "capacity")
        metrics.waiting_why.set(stats.asleep, "deferred")
        metrics.kv_usage.set(stats.blocks_used / total)
        metrics.prefix_queries.reached(stats.prompt_tokens)
        metrics.prefix_hits.reached(stats.cached_tokens)
        metrics.prompt_tokens.reached(stats.prompt_tokens)
        metrics.prompt_cached.reached(stats.cached_tokens)
        metrics.prompt_cached_where.reached(stats.cached_tokens, "device")
        metrics.prompt_sources.reached(stats.cached_tokens, "local_cache_hit")
        metrics.prompt_sources.reached(stats.prompt_tokens - stats.cached_tokens, "local_compute")
        metrics.generated.reached(stats.output_tokens)
        metrics.preemptions.reached(stats.preemptions)
        metrics.drafts.reached(stats.drafts)
        metrics.draft_tokens.reached(stats.draft_tokens)
        metrics.accepted_tokens.reached(stats.accepted_tokens)
        metrics.evictions.reached(stats.evictions)
        metrics.swapped.reached(stats.swapped_out, "out")
        metrics.swapped.reached(stats.swapped_in, "in")
        metrics.host_blocks.set(stats.host_slots_used)
        if stats.step_tokens:
            metrics.step_tokens.counts = list(stats.step_tokens)
            metrics.step_tokens.sum = float(stats.computed_tokens)
        self._sample_blocks(kv)
        metrics.outbound.set(self.outbound())
        self._sample_process()

    def _sample_process(self) -> None:
        """What the system does not tell is 0."""
        metrics = self.metrics
        usage = resource.getrusage(resource.RUSAGE_SELF)
        metrics.cpu.reached(usage.ru_utime + usage.ru_stime)
        metrics.max_files.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        with suppress(OSError):
            metrics.resident.set(int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE)
            metrics.files.set(sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1)  # without the one that looks

    def _sample_blocks(self, kv: KVMap) -> None:
        states = np.frombuffer(kv.states, np.uint8)
        for index, state in enumerate(KV_STATES):
            self.metrics.blocks.set(int((states == index).sum()), state)
        used = states == KV_STATES.index("used")
        slots = int(used.sum()) * kv.block_size
        filled = int(np.frombuffer(kv.filled, "<u2")[used].sum())
        self.metrics.waste.set(1 - filled / slots if slots else 0.0)
        self.metrics.shared.set(int((np.frombuffer(kv.counts, "<u2") > 1).sum()))


def _started() -> float:
    """When this process began, seconds since 1970; 0 where the system does not tell."""
    with suppress(OSError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine was started
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0
