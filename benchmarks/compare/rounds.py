"""Serve one workload with all contestants, in turns, each time with tokens that none of them has seen."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.compare.adapters import Served
from benchmarks.compare.apart import Apart, PeerError, apart
from benchmarks.compare.ceiling import Ceiling, Machine, ModelShape
from benchmarks.compare.contestants import LIMITS, Contestant
from benchmarks.workloads import Job, jobs

__all__ = ["AGAIN", "Measured", "Rounds", "figures"]

AGAIN: Final = "prefix32-again"
"""prefix32, the same tokens a second time."""
_NO_CACHE: Final = ("generate",)
"""A second time is no different."""

Figures = dict[str, float]


@dataclass
class Measured:
    """One workload.

    Attributes:
        rounds: contestant -> its figures, one of each timed round; fewer if it was too slow for more, or failed.
        limits: figures that cannot be exceeded, one of each timed round.
        limits_of: contestant with quantised weights -> the same with its own bytes of a weight.
        machine: what those were computed from.
        failures: contestant -> what went wrong.
        facts: contestant -> what it says of itself.
        outputs: contestant -> the tokens of the untimed round.
    """

    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    limits: list[Figures] = field(default_factory=list)
    limits_of: dict[str, list[Figures]] = field(default_factory=dict)
    machine: list[Machine] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    outputs: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounds:
    """How everything is measured.

    Attributes:
        folder: of the model.
        converted: form -> path, for contestants that do not read `folder`.
        python: interpreter of those that may live elsewhere.
        llama_server: the program.
        logs: folder for what they print.
        threads: of each.
        repeats: timed rounds.
        slow_s: who takes longer for a turn has one timed round only.
        timeout_s: for one turn.
        seed: of the tokens.
        scale: lengths are divided by it.
        quick: the tiny model.
    """

    folder: Path
    converted: dict[str, Path]
    python: str
    llama_server: str | None
    logs: Path
    threads: int
    repeats: int
    slow_s: float
    timeout_s: float
    seed: int
    scale: int
    quick: bool

    @property
    def dtype(self) -> str:
        """Of weights, activations and products."""
        return "float32" if self.quick else "bfloat16"

    def jobs(self, workload: str, turn: int) -> list[Job]:
        """The requests of one round."""
        return jobs(workload, self.seed + turn, vocab_size=512 if self.quick else 32_000, scale=self.scale)

    def measure(self, workload: str, contestants: Sequence[Contestant], limits: Apart) -> dict[str, Measured]:
        """Start those that take part, let them take turns, end them. Keys: the workload, and `AGAIN` after prefix32."""
        found = {workload: Measured()}
        if workload == "prefix32":
            found[AGAIN] = Measured()
        first = found[workload]
        with ExitStack() as stack:
            running: dict[str, tuple[Contestant, Apart]] = {}
            for contestant in contestants:
                self._say(workload, f"{contestant.name} starts")
                try:
                    options = self.options(contestant, self.jobs(workload, 0))
                    context = apart(contestant.name, self._python(contestant), contestant.adapter, options, self.logs)
                    peer = stack.enter_context(context)
                    running[contestant.name] = contestant, peer
                    first.facts[contestant.name] = peer.facts
                except PeerError as error:
                    self._fail(workload, found, contestant.name, error)
            for turn in range(self.repeats + 1):
                if turn:
                    machine = Machine(**limits.ask(None, self.timeout_s))
                    self._limits(found, self.jobs(workload, turn), contestants, machine)
                names = list(running) if turn % 2 else list(reversed(running))
                for name in names:
                    if name not in first.failures and not self._is_slow(found[workload], name, turn):
                        self._turn(workload, found, *running[name], turn)
        return found

    def _turn(self, workload: str, found: dict[str, Measured], contestant: Contestant, peer: Apart, turn: int) -> None:
        batch, name = self.jobs(workload, turn), contestant.name
        for key, measured in found.items():
            if key == AGAIN and name in _NO_CACHE:
                continue
            try:
                served = self._serve(peer, batch)
            except PeerError as error:
                self._fail(workload, found, name, error)
                return
            own = figures(batch, served)
            self._say(key, f"{f'round {turn} of {self.repeats}' if turn else 'untimed'}: {name} took {served.seconds:.1f} s")
            if turn:
                measured.rounds.setdefault(name, []).append(own)
            elif served.outputs is not None and contestant.exact:
                measured.outputs[name] = served.outputs

    def _serve(self, peer: Apart, batch: Sequence[Job]) -> Served:
        """Exactly the tokens that were asked for."""
        served = Served(**peer.ask([[job.prompt, job.max_tokens] for job in batch], self.timeout_s))
        for told in (served.outputs, served.times):
            counts = [len(each) for each in told] if told is not None else None
            if counts is not None and counts != [job.max_tokens for job in batch]:
                raise PeerError(f"gave {sum(counts)} tokens where {sum(job.max_tokens for job in batch)} were asked for")
        return served

    def _limits(
        self, found: dict[str, Measured], batch: Sequence[Job], contestants: Sequence[Contestant], machine: Machine
    ) -> None:
        for key, measured in found.items():
            measured.machine.append(machine)
            measured.limits.append(self._most(machine, key, batch, None))
            for each in contestants:
                if each.weight_bits is not None:
                    own = self._most(machine, key, batch, each.weight_bits)
                    measured.limits_of.setdefault(each.name, []).append(own)

    def _most(self, machine: Machine, key: str, batch: Sequence[Job], weight_bits: float | None) -> Figures:
        shape = ModelShape.of(self.folder, weight_bits=weight_bits)
        return Ceiling(shape, machine).figures(batch, cached=key == AGAIN)

    def _is_slow(self, measured: Measured, name: str, turn: int) -> bool:
        done = measured.rounds.get(name, [])
        return turn > 1 and bool(done) and done[0]["seconds"] > self.slow_s

    def _fail(self, workload: str, found: dict[str, Measured], name: str, error: PeerError) -> None:
        self._say(workload, f"{name}: {error}")
        for measured in found.values():
            measured.failures[name] = str(error)

    def _python(self, contestant: Contestant) -> str:
        return self.python if contestant.elsewhere else sys.executable

    def options(self, contestant: Contestant, batch: Sequence[Job]) -> dict[str, Any]:
        """For the contestant's adapter; room for the requests of two rounds."""
        kv_tokens = max(8192, 2 * sum(len(job.prompt) + job.max_tokens for job in batch))
        options: dict[str, Any] = {"folder": str(self.folder), "dtype": self.dtype, "threads": self.threads}
        if contestant.converted is not None:
            options["converted"] = str(self.converted[contestant.converted])
        match contestant.adapter:
            case "streamkv_engine" | "streamkv_server":
                options["engine"] = {
                    "model": str(self.folder),
                    "dtype": self.dtype,
                    "num_blocks": kv_tokens // 16,
                    "max_num_batched_tokens": 512,
                    **contestant.settings,
                }
            case "openvino_batching":
                options["kv_tokens"] = kv_tokens
            case "llama_server":
                options["binary"] = self.llama_server
                options["slot_tokens"] = -(-max(len(job.prompt) + job.max_tokens for job in batch) // 256) * 256
            case "limits":
                options["read_bytes"] = 1 << 26 if self.quick else 3 << 29
        return options

    def open_limits(self) -> Any:
        """The process that measures the machine; a context manager."""
        return apart(LIMITS.name, sys.executable, LIMITS.adapter, self.options(LIMITS, [Job([0], 1)]), self.logs)

    def _say(self, workload: str, text: str) -> None:
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {workload}: {text}", file=sys.stderr, flush=True)


def figures(batch: Sequence[Job], served: Served) -> Figures:
    """What a turn says.

    Returns:
        `seconds`; `rate`, tokens that were asked for, a second. Where the engine tells when each token came: `ttft`, seconds to
        the first token, mean of the requests; `prompt`, prompt tokens a second until then, of a single request; `decode`, tokens
        a second while all streams decode, from when the last one has its first token until the first one is done.
    """
    found = {"seconds": served.seconds, "rate": sum(job.max_tokens for job in batch) / served.seconds}
    if served.times is None:
        return found
    firsts = [times[0] for times in served.times]
    found["ttft"] = sum(firsts) / len(firsts)
    if len(batch) == 1:
        found["prompt"] = len(batch[0].prompt) / firsts[0]
    begin, end = max(firsts), min(times[-1] for times in served.times)
    if begin < end:
        count = sum(begin < at <= end for times in served.times for at in times)
        found["decode"] = count / (end - begin)
    return found
