"""Profiles of traffic, each after a public trace: lengths, arrivals and shared prefixes.

Sources: Azure LLM inference traces 2023 (CC-BY) for `chat` and `code`; Mooncake (Apache-2.0) for `agent` and `long-chat`;
llm-d's benchmark of a business service for `b2b`. Lengths of prompt and answer do not depend on each other there, nor here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Final

from streamkv.bench.arrivals import Arrivals, gamma, mmpp, poisson
from streamkv.bench.lengths import PERCENTILES, Table, scaled
from streamkv.bench.sessions import Habit, Sessions
from streamkv.bench.trace import BLOCK, TraceRequest

__all__ = ["PROFILES", "Profile", "fixed"]


@dataclass(frozen=True)
class Profile:
    """One kind of traffic.

    Attributes:
        prompts, answers: tokens.
        habit: None = no two prompts have anything in common.
    """

    summary: str
    arrivals: Arrivals
    prompts: Table
    answers: Table
    habit: Habit | None = None

    def generate(self, count: int, seed: int) -> list[TraceRequest]:
        """So many requests; the same seed makes the same ones."""
        source = Random(seed)  # noqa: S311  # load, not secrets
        sessions = Sessions(self.habit or _STRANGERS)
        requests = []
        shares = zip(_even(count, source), _even(count, source), strict=True)
        for at, (prompt, answer) in zip(islice(self.arrivals(source), count), shares, strict=True):
            tokens = scaled(self.prompts.at(prompt), 1)
            ids = sessions.blocks(at, tokens, prompt, source)
            requests.append(TraceRequest(at * 1000, tokens, scaled(self.answers.at(answer), 1), ids))
        return requests


def _even(count: int, source: Random) -> list[float]:
    """Random shares (0..1), one of every 1/count: short runs have the trace's long prompts in proportion, too."""
    shares = [(index + source.random()) / count for index in range(count)]
    source.shuffle(shares)
    return shares


_FINER: Final = (*PERCENTILES[:9], 97.0, 98.0, 99.0, 99.5, *PERCENTILES[10:])
_FLAT: Final = (0.0, 100.0)
_ANY: Final = Table(1, 2, percentiles=(0.0, 100.0))
_STRANGERS: Final = Habit(follows=(0.0,), gap=_ANY, new=_ANY)

_CHAT: Final = Profile(
    "short chat, nothing shared (Azure, conversation)",
    gamma(5.53, 0.84),
    Table(2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 6179, 14050),
    Table(7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 954, 1000),
)

# Most of the hour is silence: 45 pauses of more than 10 s take 2,377 of 3,436 s. In between it is 8.3 requests a second.
_CODE: Final = Profile(
    "code completion in bursts, short answers (Azure, code)",
    mmpp((8.3, 0.0), (21.9, 49.0)),
    Table(3, 17, 75, 147, 578, 1469, 2744, 5187, 7303, 7436, 7437, 7437),
    # With three points more, without which the mean would be 8 % too high.
    Table(6, 6, 6, 7, 9, 13, 24, 55, 90, 128, 171, 251, 359, 825, 1899, percentiles=_FINER),
)

_AGENT: Final = Profile(
    "tool use: long prompts that grow by a little, short answers (Mooncake, synthetic)",
    poisson(3.91),
    Table(13, 16, 22, 30, 277, 11587, 23175, 38611, 48905, 66456, 191373, 191378),
    Table(1, 2, 2, 4, 11, 69, 250, 389, 519, 768, 813, 893),
    Habit(
        follows=(0.04, 0.01, 0.01, 0.61, 0.78, 0.49, 0.59, 0.58, 0.76, 0.86),
        gap=Table(
            0.5, 6.0, 20.0, 64.7, 164.2, 294.4, 607.8, 1200.0, percentiles=(1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 99.0, 100.0)
        ),
        new=Table(1, 156, 336, 508, 894, 1206, 1893, 3263, percentiles=(0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 100.0)),
    ),
)

_LONG_CHAT: Final = Profile(
    "long conversations behind one system prompt (Mooncake, conversation)",
    poisson(3.40),
    Table(891, 894, 901, 964, 2306, 6909, 15367, 27367, 39550, 85400, 121300, 126195),
    Table(1, 3, 10, 24, 156, 350, 472, 597, 698, 1118, 2000, 2000),
    Habit(
        follows=(0.02, 0.19, 0.53, 0.33, 0.37, 0.45, 0.47, 0.49, 0.47, 0.40),
        gap=Table(
            12.0, 42.0, 66.0, 123.0, 264.0, 483.0, 1476.9, 3000.0, percentiles=(0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 99.0, 100.0)
        ),
        new=Table(
            1, 163, 534, 829, 3495, 9741, 14691, 26705, 94968, percentiles=(0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 100.0)
        ),
        common=1,
    ),
)


class _Groups(Profile):
    """150 system prompts of 6,000 tokens, and questions of 1,200 to one of them."""

    def generate(self, count: int, seed: int) -> list[TraceRequest]:
        """So many requests."""
        source = Random(seed)  # noqa: S311  # load, not secrets
        prefix, whole = 6000 // BLOCK, -(-7200 // BLOCK)
        requests = []
        for number, at in enumerate(islice(self.arrivals(source), count)):
            group = source.randrange(150)
            first = 150 * prefix + number * (whole - prefix)
            ids = (*range(group * prefix, (group + 1) * prefix), *range(first, first + whole - prefix))
            requests.append(TraceRequest(at * 1000, 7200, scaled(self.answers.draw(source), 1), ids))
        return requests


PROFILES: Final[dict[str, Profile]] = {
    "chat": _CHAT,
    "code": _CODE,
    "agent": _AGENT,
    "long-chat": _LONG_CHAT,
    "b2b": _Groups(
        "150 system prompts of 6,000 tokens, questions of 1,200 (llm-d)",
        poisson(10.0),
        Table(7200, 7200, percentiles=_FLAT),
        Table(256, 256, percentiles=_FLAT),
    ),
}


def fixed(prompt: int, answer: int, rate: float) -> Profile:
    """Prompts and answers of one length; nothing shared, Poisson."""
    return Profile(
        f"{prompt} prompt and {answer} output tokens each",
        poisson(rate),
        Table(prompt, prompt, percentiles=_FLAT),
        Table(answer, answer, percentiles=_FLAT),
    )
