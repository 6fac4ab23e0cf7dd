"""Do all give the same greedy tokens? And where two part, is it rounding, or a mistake?

Two engines that compute in 16 bits part at the first near-tie and then write different texts. So what counts is each first
difference: in float32, both tokens must be within `SLACK` times the largest error that the model's own dtype makes there, as
transformers computes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.compare.apart import Apart, apart
from benchmarks.compare.rounds import Measured, Rounds
from benchmarks.workloads import Job

__all__ = ["Agreement", "agreements"]

SLACK: Final = 4.0
"""Either of two logits may be off by one error, and an engine's error may be twice that of transformers."""
REQUESTS: Final = 8
"""Of a workload, from its first."""


@dataclass(frozen=True)
class Agreement:
    """One contestant beside the reference, over some requests of one workload.

    Attributes:
        tokens: compared.
        agreed: before the first difference of each request.
        differences: requests that have one.
        worst: largest deficit of its tokens at first differences, in units of the model's own error there.
        worst_reference: the same of the reference's tokens there.
    """

    workload: str
    name: str
    reference: str
    tokens: int
    agreed: int
    differences: int
    worst: float
    worst_reference: float

    @property
    def ok(self) -> bool:
        """Neither is more than `SLACK`: all differences are rounding."""
        return max(self.worst, self.worst_reference) <= SLACK


def agreements(rounds: Rounds, results: dict[str, Measured]) -> list[Agreement]:
    """Compare what all gave in the untimed rounds with what the first of each workload gave.

    Raises:
        PeerError: the judge cannot be asked.
    """
    found = []
    options = {"folder": str(rounds.folder), "dtype": rounds.dtype, "threads": rounds.threads}
    with apart("judge", sys.executable, "judge", options, rounds.logs) as judge:
        for workload, measured in results.items():
            if len(measured.outputs) > 1 and not workload.endswith("again"):
                print(f"{workload}: comparing tokens", file=sys.stderr, flush=True)
                batch = rounds.jobs(workload, 0)[:REQUESTS]
                found += _workload(judge, rounds, workload, batch, measured.outputs)
    return found


def _workload(
    judge: Apart, rounds: Rounds, workload: str, batch: Sequence[Job], outputs: dict[str, list[list[int]]]
) -> list[Agreement]:
    reference = "streamkv" if "streamkv" in outputs else next(iter(outputs))
    others = [name for name in outputs if name != reference]
    firsts: dict[str, list[int]] = {name: [] for name in others}
    worst = {name: [0.0, 0.0] for name in others}  # of the reference, of the other
    for index, job in enumerate(batch):
        ours = outputs[reference][index]
        questions, askers = [], []
        for name in others:
            theirs = outputs[name][index]
            place = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
            firsts[name].append(place)
            if place < len(ours):
                questions.append([len(job.prompt) + place, [ours[place], theirs[place]]])
                askers.append(name)
        if questions:
            answers = judge.ask([job.prompt + ours, questions], rounds.timeout_s)
            for name, (deficits, error) in zip(askers, answers, strict=True):
                worst[name] = [max(so_far, new / error) for so_far, new in zip(worst[name], deficits, strict=True)]
    lengths = [len(tokens) for tokens in outputs[reference][: len(batch)]]
    return [
        Agreement(
            workload,
            name,
            reference,
            sum(lengths),
            sum(firsts[name]),
            sum(first < length for first, length in zip(firsts[name], lengths, strict=True)),
            worst[name][1],
            worst[name][0],
        )
        for name in others
    ]
