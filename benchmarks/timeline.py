"""When what runs while a server works: forward passes in the runner's thread, everything else on the event loop.

python -m benchmarks.timeline [--rounds 3] [--svg FILE] [--model-dir DIR] [--quick]

*mixed32* of `benchmarks.workloads` goes through a real server to a client in another process, with look-ahead and without it in
turns. The parts of the engine are wrapped from outside to write down when they ran. Prints the share of the time from the first
forward pass to the last in which none ran, by what ran instead in the runner's thread; how much of the loop's work fell into
forward passes; how late a timer of 2 ms on that loop was; and how long forward passes of which size took. Draws steps of the
last round with look-ahead.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
from bisect import bisect_right
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final, NamedTuple

import uvloop

from benchmarks.compare.charts import line, page
from benchmarks.report import percentile, print_setting, print_table
from benchmarks.server import child
from benchmarks.workloads import DEFAULT_MODEL_DIR, Job, build_model, jobs
from streamkv.client import connect
from streamkv.engine.build import build_engine
from streamkv.engine.config import EngineConfig
from streamkv.engine.engine import InProcessEngine
from streamkv.engine.thread import use_short_switch_interval
from streamkv.logs import configure_logs
from streamkv.observe.recorder import Recorder
from streamkv.protocol.limits import SessionLimits
from streamkv.server.app import Server
from streamkv.server.config import ServerConfig
from streamkv.text.streams import TextStreams
from streamkv.text.tokenizer import load_tokenizer

__all__ = ["Shares", "Span", "Trace", "by_size", "draw", "shares"]

FORWARD: Final = "forward pass"
IN_THREAD: Final = ("prepare", "sample")
ON_LOOP: Final = ("plan", "commit", "detokenise", "send")
COLOURS: Final = {
    FORWARD: "#b9cfe8",
    "prepare": "#b08a2e",
    "sample": "#c25b3f",
    "plan": "#3b6fb6",
    "commit": "#8a5fa8",
    "detokenise": "#4b8b57",
    "send": "#777777",
}
STEPS: Final = 10
SIZES: Final = (4, 16, 32, 256, 512)
TICK_S: Final = 0.002


class Span(NamedTuple):
    """Something ran; seconds of `perf_counter`."""

    kind: str
    begin: float
    end: float


class Trace:
    """Collects spans from any thread."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.passes: list[tuple[int, float]] = []
        """Of each forward pass its tokens and seconds."""

    def watch(self, owner: Any, method: str, kind: str) -> None:
        """Have a method of an object (or class) write down when it ran."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.add(kind, began)

        setattr(owner, method, timed)

    def watch_passes(self, runner: Any) -> None:
        """Have a runner write down how large its forward passes are, and when they ran."""
        original = runner._forward  # noqa: SLF001  # the benchmark looks inside

        def forward(*inputs: Any) -> Any:
            began = perf_counter()
            try:
                return original(*inputs)
            finally:
                self.add(FORWARD, began)
                self.passes.append((len(inputs[0]), perf_counter() - began))

        runner._forward = forward  # noqa: SLF001  # as above

    def watch_frames(self, recorder: Recorder) -> None:
        """Have a server's recorder, which is told of each frame after it, write down when it was encoded and sent."""
        original = recorder.frame

        def frame(tokens: int, seconds: float) -> None:
            self.add("send", perf_counter() - seconds)
            original(tokens, seconds)

        recorder.frame = frame  # type: ignore[method-assign]  # looked in from outside

    def add(self, kind: str, began: float) -> None:
        """It has run from `began` until now."""
        self.spans.append(Span(kind, began, perf_counter()))


class Shares(NamedTuple):
    """Shares of the time from the beginning of the first forward pass to the end of the last; `overlap` of the loop's work."""

    steps: int
    forward: float
    prepare: float
    sample: float
    loop: float
    overlap: float


def shares(spans: Sequence[Span]) -> Shares:
    """What a trace comes to. Forward passes follow one another in it; the others may be anywhere."""
    passes = sorted(span for span in spans if span.kind == FORWARD)
    first, last = passes[0].begin, passes[-1].end
    whole = last - first
    begins = [span.begin for span in passes]

    def within(span: Span) -> float:
        """Seconds of a span in which a forward pass ran."""
        total = 0.0
        for index in range(max(0, bisect_right(begins, span.begin) - 1), bisect_right(begins, span.end)):
            total += max(0.0, min(span.end, passes[index].end) - max(span.begin, passes[index].begin))
        return total

    def share(kind: str) -> float:
        return sum(max(0.0, min(span.end, last) - max(span.begin, first)) for span in spans if span.kind == kind) / whole

    loop = [span for span in spans if span.kind in ON_LOOP and span.begin >= first and span.end <= last]
    spent = sum(span.end - span.begin for span in loop)
    return Shares(
        steps=len(passes),
        forward=share(FORWARD),
        prepare=share("prepare"),
        sample=share("sample"),
        loop=spent / whole,
        overlap=sum(map(within, loop)) / spent if spent else 0.0,
    )


def by_size(passes: Sequence[tuple[int, float]]) -> list[list[str]]:
    """Forward passes in rows: tokens, how many there were, their share of the time of all, milliseconds each (median)."""
    whole = sum(seconds for _, seconds in passes)
    rows = []
    for low, high in pairwise((0, *SIZES)):
        some = [seconds for tokens, seconds in passes if low < tokens <= high]
        if some:
            rows.append([f"{low + 1}–{high}", str(len(some)), f"{sum(some) / whole:.0%}", f"{median(some) * 1000:.1f}"])
    return rows


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(title: str, spans: Sequence[Span], steps: int = STEPS) -> str:
    """Two panels as SVG: consecutive steps from the middle of a trace, and the end of one of them, larger."""
    passes = sorted(span for span in spans if span.kind == FORWARD)
    first = max(0, len(passes) // 2 - steps // 2)
    some = passes[first : first + steps]
    middle = some[len(some) // 2]
    zoom = min(0.010, (middle.end - middle.begin) / 2)
    parts = _panel(spans, some[0].begin, some[-1].end, 44, f"{len(some)} steps")
    parts += _panel(spans, middle.begin - zoom / 2, middle.begin + zoom, 224, "where one step ends and the next begins")
    for index, kind in enumerate((FORWARD, *IN_THREAD)):
        parts.append(f'<rect x="{400 + 110 * index}" y="34" width="10" height="10" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{414 + 110 * index}" y="44">{escape(kind)}</text>')
    return page(title, 400, parts)


def _panel(spans: Sequence[Span], begin: float, end: float, top: float, title: str) -> list[str]:
    left, right, height = 110.0, 730.0, 22.0
    scale = (right - left) / (end - begin)
    lanes = [("runner's thread", (FORWARD, *IN_THREAD)), *((kind, (kind,)) for kind in ON_LOOP)]
    bottom = top + 8 + height * len(lanes)
    parts = [f'<text x="8" y="{top}" font-weight="bold">{escape(title)}</text>']
    shown = [span for span in spans if span.end > begin and span.begin < end]
    for row, (name, kinds) in enumerate(lanes):
        y = top + 8 + height * row
        parts.append(f'<text x="{left - 6:.0f}" y="{y + 15:.1f}" text-anchor="end">{escape(name)}</text>')
        for span in (span for span in shown if span.kind in kinds):
            x = left + (max(span.begin, begin) - begin) * scale
            width = max((min(span.end, end) - max(span.begin, begin)) * scale, 0.7)
            # Passes go down through all lanes: what stands on them overlaps.
            tall = bottom - y if span.kind == FORWARD else height - 4
            parts.append(
                f'<rect x="{x:.2f}" y="{y + 2:.1f}" width="{width:.2f}" height="{tall:.1f}" fill="{COLOURS[span.kind]}"/>'
            )
    for tick in range(6):
        x = left + (right - left) * tick / 5
        parts.append(line(x, bottom + 2, x, bottom + 6, "#333"))
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{(end - begin) * tick / 5 * 1000:.1f}'
            f"{' ms' if tick == 5 else ''}</text>"
        )
    return parts


# -- the run ----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description="what overlaps with forward passes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--svg", type=Path, default=None, help="where the picture is written")
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_MODEL_DIR, help="where the model is kept (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny model, short requests, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    print_setting("streamkv", "torch", "transformers", "aiohttp")
    configure_logs(level="error")
    use_short_switch_interval()
    uvloop.run(_measure(build_model(arguments.model_dir, tiny=arguments.quick), arguments))


async def _measure(model: Path, arguments: argparse.Namespace) -> None:
    found: dict[bool, list[tuple[Trace, list[float]]]] = {True: [], False: []}
    for turn in range(arguments.rounds):
        for look_ahead in (True, False) if turn % 2 else (False, True):
            settings = EngineConfig(model=str(model), dtype="float32" if arguments.quick else "bfloat16", look_ahead=look_ahead)
            async with build_engine(settings) as engine:
                found[look_ahead].append(await _serve(engine, model, 2 * turn + look_ahead, quick=arguments.quick))
    rows = []
    for look_ahead, rounds in found.items():
        each = [shares(trace.spans) for trace, _ in rounds]
        late = [value for _, some in rounds for value in some]
        rows.append([
            "on" if look_ahead else "off",
            str(each[0].steps),
            f"{median(1 - one.forward for one in each):.1%}",
            *(f"{median(get(one) for one in each):.1%}" for get in (_prepare, _sample, _waits, _loop, _overlap)),
            *(f"{percentile(late, share) * 1000:.1f}" for share in (0.5, 0.99, 1.0)),
        ])  # fmt: skip
    header = ["look-ahead", "steps", "no forward pass", "prepare", "sample", "thread waits", "loop works", "of that in a pass"]
    print_table(f"mixed32, {arguments.rounds} rounds", [*header, "lag p50 ms", "p99 ms", "max ms"], rows)
    passes = [one for trace, _ in found[True] for one in trace.passes]
    print_table("forward passes, look-ahead on", ["tokens", "passes", "of their time", "ms, median"], by_size(passes))
    if arguments.svg is not None:
        arguments.svg.write_text(draw("mixed32 through the server, 254M parameters, 2 cores", found[True][-1][0].spans))


def _prepare(one: Shares) -> float:
    return one.prepare


def _sample(one: Shares) -> float:
    return one.sample


def _waits(one: Shares) -> float:
    return 1 - one.forward - one.prepare - one.sample


def _loop(one: Shares) -> float:
    return one.loop


def _overlap(one: Shares) -> float:
    return one.overlap


async def _serve(engine: InProcessEngine, model: Path, seed: int, *, quick: bool) -> tuple[Trace, list[float]]:
    """(what ran, how late the loop was), after a first round that does not count: recordings are made in it."""
    scale, vocab = (8, 512) if quick else (1, 32_000)
    config = ServerConfig(port=0, limits=SessionLimits(streams=64), drain_timeout_s=0.0, slo_ttft_s=1e6)
    async with TextStreams(engine, load_tokenizer(model, max_tokens=engine.describe().max_model_len)) as streams:
        server = Server(streams, config)
        trace = _wrap(engine, streams)
        async with server.listening():
            rounds = [
                jobs("mixed32", 100 + seed, vocab_size=vocab, scale=8),
                jobs("mixed32", seed, vocab_size=vocab, scale=scale),
            ]
            with child(_client, server.port, rounds) as (_, client):
                await asyncio.to_thread(client.recv)
                for session in server.stream_door.sessions:
                    trace.watch(session, "next_message", "send")
                trace.watch_frames(server.recorder)
                trace.spans.clear()
                trace.passes.clear()
                lags: list[float] = []
                ticker = asyncio.create_task(_tick(lags))
                client.send("go")
                await asyncio.to_thread(client.recv)
                ticker.cancel()
                client.send("end")
    return trace, lags


def _wrap(engine: InProcessEngine, streams: TextStreams) -> Trace:
    """The benchmark looks inside: the names are those of the methods that docs/scheduler.md speaks of."""
    trace = Trace()
    runner: Any = engine._runner  # noqa: SLF001  # as above
    scheduler = engine._scheduler  # noqa: SLF001  # as above
    for owner, method, kind in (
        (runner, "_take_over", "prepare"),
        (runner, "_pack", "prepare"),
        (runner, "_finish", "sample"),
        (runner, "collect", "sample"),
        (scheduler, "plan", "plan"),
        (engine, "_start", "plan"),
        (scheduler, "commit", "commit"),
        (engine, "_batch", "commit"),
        (streams, "_dispatch", "detokenise"),
    ):
        trace.watch(owner, method, kind)
    trace.watch_passes(runner)
    return trace


async def _tick(lags: list[float]) -> None:
    while True:
        due = perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        lags.append(perf_counter() - due)


def _client(parent: Connection, port: int, rounds: list[list[Job]]) -> None:
    uvloop.run(_read(parent, port, rounds))


async def _read(parent: Connection, port: int, rounds: list[list[Job]]) -> None:
    async with connect(f"ws://127.0.0.1:{port}/v1/stream") as client:
        for work in rounds:
            streams = [client.complete(job.prompt, max_tokens=job.max_tokens, temperature=0, ignore_eos=True) for job in work]
            await asyncio.gather(*(stream.result() for stream in streams))
            assert sum(stream.num_tokens for stream in streams) == sum(job.max_tokens for job in work)
            parent.send("done")
            parent.recv()


if __name__ == "__main__":
    main()
