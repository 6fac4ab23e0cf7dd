"""The runner's thread: when results reach the loop; and what a process that serves sockets asks of the interpreter."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from streamkv.engine.thread import FULL_COLLECTION_AFTER, RunnerThread, make_full_collections_rare


@asynccontextmanager
async def closing() -> AsyncIterator[RunnerThread]:
    thread = RunnerThread()
    try:
        yield thread
    finally:
        await asyncio.to_thread(thread.close)


class Gate:
    """A function for the thread that tells the test when it is where, and goes on when the test says so."""

    def __init__(self, result: str, before: Callable[[], None] | None = None) -> None:
        self.result = result
        self.before = before
        self.at_start, self.go, self.at_pass, self.end = (threading.Event() for _ in range(4))

    def __call__(self) -> str:
        self.at_start.set()
        assert self.go.wait(30)
        if self.before is not None:
            self.before()
        self.at_pass.set()
        assert self.end.wait(30)
        return self.result


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 30)
    await asyncio.sleep(0)  # what the thread told the loop before is now done


async def test_a_result_waits_until_the_next_function_computes():
    async with closing() as thread:
        await thread.submit(thread.deliver)
        first, second = Gate("first"), Gate("second", thread.deliver)
        results = [thread.submit(first), thread.submit(second)]
        first.go.set()
        first.end.set()
        await reached(second.at_start)
        assert not results[0].done()
        second.go.set()
        assert await results[0] == "first"  # while the second computes
        assert not second.end.is_set()
        second.end.set()
        assert await results[1] == "second"  # none is behind it


async def test_a_result_comes_at_once_if_nothing_waits_or_nobody_ever_delivers():
    async with closing() as thread:
        first, second = Gate("first"), Gate("second")
        results = [thread.submit(first), thread.submit(second)]
        for gate in (first, second):
            gate.go.set()
        first.end.set()
        assert await results[0] == "first"
        second.end.set()
        assert await results[1] == "second"
        await thread.submit(thread.deliver)
        assert await thread.submit(lambda: "third") == "third"


@pytest.mark.parametrize("fails", [False, True])
async def test_a_function_that_ends_without_delivering_lets_the_one_before_go_first(fails: bool):
    def second() -> None:
        if fails:
            raise ValueError("second")

    async with closing() as thread:
        await thread.submit(thread.deliver)
        order: list[str] = []
        first = Gate("first")
        results = [thread.submit(first), thread.submit(second)]
        for name, result in zip(("first", "second"), results, strict=True):
            result.add_done_callback(lambda _, name=name: order.append(name))
        first.go.set()
        first.end.set()
        done = await asyncio.gather(*results, return_exceptions=True)
        assert order == ["first", "second"]
        assert done[0] == "first"
        assert isinstance(done[1], ValueError) == fails


async def test_a_result_held_for_a_function_that_is_cancelled_or_dropped_still_comes():
    thread = RunnerThread()
    await thread.submit(thread.deliver)
    first, second, third = Gate("first"), Gate("second"), Gate("third")
    results = [thread.submit(gate) for gate in (first, second, third)]
    await reached(first.at_start)
    results[1].cancel()
    await asyncio.wait([results[1]])
    await asyncio.sleep(0)  # the thread knows
    first.go.set()
    first.end.set()
    await reached(third.at_start)
    assert await results[0] == "first"
    dropped = thread.submit(Gate("dropped"))
    thread._executor.shutdown(wait=False, cancel_futures=True)  # the first thing that `close` does
    third.go.set()
    third.end.set()
    await asyncio.to_thread(thread.close)
    async with asyncio.timeout(30):
        assert await results[2] == "third"
        await asyncio.wait([dropped])
    assert dropped.cancelled()


async def test_what_a_result_was_made_of_is_freed_with_the_next_one_and_not_between_telling_and_computing():
    """Freeing tensors let the loop have the interpreter, and its work stood before the pass instead of beside it."""

    class Pending:
        def ready(self) -> bool:
            return False

        def collect(self) -> str:
            return "done"

    async with closing() as thread:
        pending = Pending()
        alive = weakref.ref(pending)
        told = thread.launch(lambda pending: pending, pending)
        del pending
        seen = thread.submit(lambda: (thread.deliver(), alive() is not None)[1])
        assert await told == "done"
        assert await seen
        await thread.submit(lambda: None)
        assert alive() is None


@pytest.mark.parametrize("own", [10, 5000])
def test_full_collections_are_made_rarer_than_by_default_and_never_more_frequent(own: int):
    before = gc.get_threshold()
    gc.set_threshold(700, 10, own)
    try:
        make_full_collections_rare()
        assert gc.get_threshold() == (700, 10, max(own, FULL_COLLECTION_AFTER))
    finally:
        gc.set_threshold(*before)
