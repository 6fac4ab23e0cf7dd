"""The pure core alone, without torch: planning, look-up, hashing, cost of a block at three pool sizes, unfilled slots.

python -m benchmarks.core [--quick]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from time import perf_counter
from typing import TypeVar

from benchmarks.report import percentile, print_setting, print_table
from streamkv.core.block_pool import BlockPool
from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.request import Request, StopRule
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import Sampled, Step

BLOCK = 16
VOCAB = 32_000
US = 1e6
ROOT = b"root"
Key = tuple[bytes, bytes]
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the pure core")
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs, not how fast")
    quick = parser.parse_args().quick
    print_setting()
    steps = 50 if quick else 3000
    rows = [
        ("64 decode, 1,000 wait", *planning(steps, (steps + 400, steps + 400))),
        ("64 run, 1,000 wait, outputs of 64–192 tokens end and others enter", *planning(steps, (64, 192))),
        ("the same, of 100 tenants", *planning(steps, (64, 192), tenants=100)),
        ("the same, of 1,064 tenants", *planning(steps, (64, 192), tenants=1064)),
    ]
    header = ["workload", "median µs", "p99 µs", "tokens a step"]
    print_table("plan + commit of one step (goal: median <= 150 µs)", header, rows)
    rows = prefix(20 if quick else 2000)
    print_table("Prefix of 128 blocks (goal: look-up <= 20 µs)", ["operation", "median µs", "p99 µs"], rows)
    sizes = (1_000, 10_000) if quick else (1_000, 10_000, 100_000)
    header = ["operation", *(f"{size:,} blocks" for size in sizes)]
    print_table("Nanoseconds for one block, by size of the pool", header, per_block(sizes))
    header = ["workload", "unfilled slots %", "worst step %", "blocks in use %", "requests running", "steps"]
    print_table("Unfilled slots in referenced blocks, pool full (goal: < 4 %)", header, waste(40 if quick else 2000))


# -- plan and commit --------------------------------------------------------------------------------------------------


class Driver:
    """A scheduler and a made-up model that samples seeded tokens."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.cache = KVCache(num_blocks, BLOCK, fingerprint="benchmark")
        self.scheduler = Scheduler(config, self.cache)
        self.num_submitted = 0

    def submit(self, num_prompt: int, max_tokens: int, tenant: str = "") -> None:
        """Queue a request of random tokens."""
        prompt = self.random.choices(range(VOCAB), k=num_prompt)
        self.scheduler.submit((f"r{self.num_submitted}",), prompt, StopRule(max_tokens), tenant=tenant, salt=tenant)
        self.num_submitted += 1

    def sampled(self, step: Step) -> Sampled:
        """What the model would return."""
        return Sampled([(self.random.randrange(VOCAB),) if samples else () for samples in step.samples])

    def timed_step(self) -> tuple[float, int]:
        """(seconds in plan and commit, tokens computed)."""
        start = perf_counter()
        step = self.scheduler.plan(0.0)
        planned = perf_counter()
        assert step is not None
        sampled = self.sampled(step)
        before = perf_counter()
        self.scheduler.commit(step, sampled)
        return planned - start + perf_counter() - before, step.num_tokens


def planning(steps: int, outputs: tuple[int, int], tenants: int = 1) -> tuple[str, str, str]:
    """64 requests run and 1,000 wait in every measured step; prompts of 128 tokens, outputs uniform, tenants in turns."""
    num_blocks = 64 * (64 + outputs[1] // BLOCK)
    driver = Driver(SchedulerConfig(max_num_seqs=64, max_model_len=200_000), num_blocks)

    def refill() -> None:
        stats = driver.scheduler.stats()
        for _ in range(1064 - stats.waiting - stats.running):
            driver.submit(128, driver.random.randint(*outputs), f"tenant{driver.num_submitted % tenants}")

    refill()
    for _ in range(200):  # until all rows are taken and arrivals are no longer in step with each other
        driver.timed_step()
        refill()
    seconds, tokens = [], []
    for _ in range(steps):
        spent, computed = driver.timed_step()
        seconds.append(spent)
        tokens.append(computed)
        refill()
    return f"{median(seconds) * US:.0f}", f"{percentile(seconds, 0.99) * US:.0f}", f"{mean(tokens):.0f}"


# -- look-up and hashing ----------------------------------------------------------------------------------------------


def prefix(repetitions: int) -> list[tuple[str, str, str]]:
    """A request whose first 128 blocks are all cached, and one that has to hash them first."""
    cache = KVCache(1024, BLOCK, fingerprint="benchmark")
    tokens = random.Random(0).choices(range(VOCAB), k=128 * BLOCK + 1)

    def fresh() -> Request:
        return Request("r", tokens, StopRule(1), arrival=0, root=cache.root(""))

    writer = fresh()
    cache.extend_keys(writer)
    cache.admit(writer, cache.lookup(writer))
    cache.grow(writer, len(tokens))
    writer.computed = writer.planned = len(tokens)
    cache.publish(writer)
    reader = fresh()
    cache.extend_keys(reader)
    assert len(cache.lookup(reader).blocks) == 128
    found, hashed = [], []
    for _ in range(repetitions):
        found.append(_seconds(lambda: cache.lookup(reader)))
        unhashed = fresh()
        hashed.append(_seconds(lambda request=unhashed: cache.extend_keys(request)))
    return [
        ("look-up, hashes given", f"{median(found) * US:.1f}", f"{percentile(found, 0.99) * US:.1f}"),
        ("hashing, per block", f"{median(hashed) * US / 128:.2f}", f"{percentile(hashed, 0.99) * US / 128:.2f}"),
    ]


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


# -- one block, by size of the pool -----------------------------------------------------------------------------------


def per_block(sizes: tuple[int, ...]) -> list[tuple[str, ...]]:
    columns = [_operations(size) for size in sizes]
    return [(name, *(f"{column[name]:.0f}" for column in columns)) for name in columns[0]]


def _operations(size: int) -> dict[str, float]:
    """Nanoseconds per call; medians of 9 rounds over 1,000 blocks; all others are cached."""
    pool, count = BlockPool(size), 1_000
    serials = itertools.count()

    def allocate() -> list[int]:
        return [pool.allocate() for _ in range(count)]

    def publish(ids: list[int], keys: list[Key]) -> None:
        for block_id, (digest, packed) in zip(ids, keys, strict=True):
            pool.publish(block_id, digest, packed, ROOT)

    def find(keys: list[Key]) -> None:
        for key in keys:
            pool.match((key,), ROOT)

    def acquire(ids: list[int]) -> None:
        for block_id in ids:
            pool.acquire(block_id)

    timings: dict[str, list[float]] = {}

    def measure(name: str, call: Callable[..., T], *arguments: object) -> T:
        start = perf_counter()
        result = call(*arguments)
        timings.setdefault(name, []).append((perf_counter() - start) * 1e9 / count)
        return result

    ids = [pool.allocate() for _ in range(size)]
    keys = [_key(next(serials)) for _ in ids]
    publish(ids, keys)
    pool.release(ids)
    for _ in range(9):
        ids = measure("allocate by evicting", allocate)
        keys = [_key(next(serials)) for _ in ids]
        measure("publish", publish, ids, keys)
        pool.release(ids)
        measure("find one published block", find, keys)
        measure("acquire a cached block", acquire, ids)
        measure("release it to the cache", pool.release, ids)
    pool.reset()
    for _ in range(9):
        ids = measure("allocate a free block", allocate)
        measure("release it to the free list", pool.release, ids)
    return {name: median(values) for name, values in timings.items()}


def _key(number: int) -> Key:
    """A digest and a block's packed tokens, different for every number."""
    return number.to_bytes(32, "little"), number.to_bytes(8, "little") * (BLOCK // 2)


# -- waste ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Distribution of prompt and output lengths."""

    name: str
    draw: Callable[[random.Random], tuple[int, int]]


def _exponential(prompt: float, output: float) -> Callable[[random.Random], tuple[int, int]]:
    def draw(source: random.Random) -> tuple[int, int]:
        return tuple(min(2048, 1 + int(source.expovariate(1 / scale))) for scale in (prompt, output))  # type: ignore[return-value]  # a tuple of two values

    return draw


WORKLOADS = (
    Lengths("mixed: prompts 16–512, outputs 16–256, uniform", lambda r: (r.randint(16, 512), r.randint(16, 256))),
    Lengths("as ShareGPT: exponential, means 161 and 338", _exponential(161, 338)),
    Lengths("as Alpaca: exponential, means 19.3 and 58.5", _exponential(19.3, 58.5)),
)


def waste(steps: int) -> list[tuple[str, ...]]:
    rows = []
    for lengths in WORKLOADS:
        unfilled, used, running = wasted(lengths, steps)
        figures = f"{mean(unfilled):.2f}", f"{max(unfilled):.2f}", f"{mean(used):.1f}", f"{mean(running):.0f}"
        rows.append((lengths.name, *figures, str(steps)))
    return rows


def wasted(lengths: Lengths, steps: int, num_blocks: int = 2048) -> tuple[list[float], list[float], list[int]]:
    """Per step: percent of slots unfilled, percent of blocks in use, requests running.

    Requests always wait; a step counts once the pool has been full for the first time (nobody could be admitted).
    """
    config = SchedulerConfig(max_num_seqs=1024, max_num_batched_tokens=2048, max_model_len=4096)
    driver = Driver(config, num_blocks)
    shares: list[float] = []
    used: list[float] = []
    running: list[int] = []
    while len(shares) < steps:
        while driver.scheduler.stats().waiting < 64:
            driver.submit(*lengths.draw(driver.random))
        step = driver.scheduler.plan(0.0)
        assert step is not None
        pool = driver.cache.pool
        num_running = driver.scheduler.stats().running
        if shares or pool.num_available <= 2 * num_running:
            unfilled, slots = driver.cache.waste()
            shares.append(100 * unfilled / slots)
            used.append(100 * pool.num_used / pool.num_blocks)
            running.append(num_running)
        driver.scheduler.commit(step, driver.sampled(step))
    return shares, used, running


if __name__ == "__main__":
    gc.freeze()
    main()
