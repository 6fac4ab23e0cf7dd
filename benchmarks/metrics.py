"""What metrics cost: `python -m benchmarks.metrics`. Time per token that the recorder takes at 500 streams, and of looking.

Every figure is processor time, the median of several rounds. `prometheus_client` is measured beside the own histogram where it
is installed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

from streamkv.engine.api import StepBatch, StepOutput
from streamkv.engine.fake import FakeEngine, fake_info
from streamkv.observe.exposition import Histogram
from streamkv.observe.recorder import Recorder
from streamkv.sampling_params import Sampling
from streamkv.text.events import Finished, Timings, Why
from streamkv.text.observer import NullObserver, Observer
from streamkv.text.stream import PreparedPrompt

STREAMS, STEPS, ROUNDS = 500, 400, 7
PREPARED = PreparedPrompt([1] * 100, Sampling(max_tokens=200))


def end(name: str) -> Finished:
    return Finished(name, "length", 100, 200, 0, Timings(0.0, 0.01, 0.01, 2.0), why=Why(chunks=1))


def drive(observer: Observer, ends_per_step: int) -> float:
    """Seconds for all steps; so many streams end, and others begin, between two steps."""
    names = itertools.count()
    live = [f"c1-{next(names)}.0" for _ in range(STREAMS)]
    observer.opened(live, PREPARED, "", 0.0)
    now, spent = 0.0, 0.0
    for step in range(STEPS):
        now += 0.01
        batch = StepBatch([StepOutput(name, (1,)) for name in live], now)
        began = time.thread_time()
        observer.batch(batch)
        for index in range(ends_per_step):
            place = (step * ends_per_step + index) % STREAMS
            observer.finished(end(live[place]), now)
            live[place] = f"c1-{next(names)}.0"
            observer.opened([live[place]], PREPARED, "", now)
        spent += time.thread_time() - began
    return spent


def median(measure: Callable[[], float]) -> float:
    measure()
    return statistics.median(measure() for _ in range(ROUNDS))


def histograms() -> None:
    own = Histogram("h", "text", [0.001 * 2**power for power in range(20)])

    def time_of(call: Callable[[], object], count: int = 100_000) -> float:
        began = time.thread_time()
        for _ in range(count):
            call()
        return (time.thread_time() - began) / count

    print(f"one observation, own histogram          {median(lambda: time_of(lambda: own.observe(0.03))) * 1e9:7.0f} ns")
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client import Histogram as Theirs
    except ImportError:
        return
    theirs = Theirs("h", "text", ["model_name"], buckets=own.bounds, registry=CollectorRegistry()).labels("m")
    print(f"one observation, prometheus_client      {median(lambda: time_of(lambda: theirs.observe(0.03))) * 1e9:7.0f} ns")


async def scrape() -> None:
    engine = FakeEngine(info=fake_info())
    recorder = Recorder(engine.describe())

    async def once() -> float:
        began = time.thread_time()
        recorder.sample(await engine.stats(), await engine.kv_map())
        recorder.metrics.text("vllm")
        return time.thread_time() - began

    await once()
    print(f"one scrape                              {statistics.median([await once() for _ in range(50)]) * 1e3:7.2f} ms")


def kv_maps() -> None:
    """Looking at every block, on the loop, and making a message of it, in a thread."""
    from streamkv.core.config import SchedulerConfig
    from streamkv.core.kv_cache import KVCache
    from streamkv.core.request import StopRule
    from streamkv.core.scheduler import Scheduler
    from streamkv.core.step import Sampled
    from streamkv.engine.kv_view import take_kv_map
    from streamkv.server.kv_view import Viewer, encode

    for num_blocks in (1_000, 10_000, 100_000):
        config = SchedulerConfig(
            max_num_seqs=64, max_num_batched_tokens=1 << 22, max_model_len=1 << 22, max_queued_tokens=1 << 40
        )
        scheduler = Scheduler(config, KVCache(num_blocks, 16))
        length = num_blocks * 16 // 80
        for index in range(64):
            prompt = [index, *range(length - 1)]
            scheduler.submit((f"r{index}",), prompt, StopRule(1 if index % 2 else 100), salt=f"t{index % 4}")
        step = scheduler.plan(0.0)
        assert step is not None
        scheduler.commit(step, Sampled([(1,)] * len(step.rows)))
        kv = take_kv_map(scheduler.cache, at=0.0, step=1)
        assert kv.requests and kv.salts  # noqa: PT018  # half run, half are cached

        def look(scheduler: Scheduler = scheduler) -> float:
            began = time.thread_time()
            take_kv_map(scheduler.cache, at=0.0, step=1)
            return time.thread_time() - began

        size = 0

        def show() -> float:
            nonlocal size
            began = time.thread_time()
            size = len(encode(Viewer("t0").snapshot(kv)))  # noqa: B023  # called before the loop goes on
            return time.thread_time() - began

        taken, shown = median(look) * 1e3, median(show) * 1e3
        print(
            f"{num_blocks:7} blocks: look {taken:6.2f} ms on the loop; snapshot {shown:6.2f} ms beside it, {size / 1024:5.1f} KiB"
        )


def main() -> None:
    import asyncio

    tokens = STREAMS * STEPS
    for ends in (0, 2, 10):
        without = median(lambda ends=ends: drive(NullObserver(), ends))  # type: ignore[misc]  # bound at once
        with_it = median(lambda ends=ends: drive(Recorder(fake_info()), ends))  # type: ignore[misc]  # bound at once
        cost = with_it - without
        share = f"{cost / STEPS * 1e6:6.1f} us a step, {cost / tokens * 1e9:4.0f} ns a token"
        print(f"{STREAMS} streams, {ends:2} of them new each step: {share}")
    histograms()
    asyncio.run(scrape())
    kv_maps()


if __name__ == "__main__":
    main()
