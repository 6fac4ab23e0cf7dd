"""The values that cross between the pure core and whoever runs the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

__all__ = ["PENDING", "Event", "Miss", "Sampled", "Step"]

Miss = Literal["differs", "not_cached", "evicted", "off"]

PENDING: Final = -1
"""An input token that is not known yet: "what this row's last step sampled".

It lets a step be planned while its predecessor runs."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: which rows, which token ranges, which blocks, which copies. Carries only what changed.

    A *row* is a running request's fixed place in the runner's tables. A runner must, in this order:

    1. carry out `swap_out` (block, host slot): what the block holds goes to the slot, before anything here overwrites it,
    2. fill the blocks in `clears` with zeros,
    3. carry out `copies`: all sources are read before any destination is written,
    4. carry out `swap_in` (block, host slot): what the slot holds goes to the block,
    5. take over `admitted` (row, request id) and `tables` (row, first index, block ids) into its tables,
    6. compute, for each entry i, `counts[i]` tokens of row `rows[i]` from position `starts[i]` on,
    7. sample a token after each of the last `samples[i]` of them: one, or as many as a draft has tokens and one more.

    The first five also for a step that is skipped because an earlier one failed: later ones build on them.

    A *draft* is what may come after a row's last token: an entry with drafts has its last token and the drafts as input. A token
    that was sampled is kept while the drafts before it were what was sampled before them, so that one at least is kept.

    Attributes:
        id: steps are numbered from 0; they are run and committed in this order.
        at: the `now` that `plan` was given, in seconds.
        tokens: input tokens of all entries one after the other; `PENDING` = what that row sampled last.
    """

    id: int
    at: float
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    admitted: list[tuple[int, str]] = field(default_factory=list)
    tables: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    clears: list[int] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a runner returns for a step.

    Attributes:
        tokens: per entry of the step the sampled ids that are kept: none where nothing was sampled, several behind drafts.
        failed: entries whose logits hold NaN or Inf.
        extras: per entry whatever else the runner has to hand through to the reader, only for entries that have some.
    """

    tokens: Sequence[tuple[int, ...]]
    failed: frozenset[int] = frozenset()
    extras: Mapping[int, Any] = field(default_factory=dict)


class Event(NamedTuple):
    """What happened to one request. The event with a `finish_reason` is its last, and there is exactly one.

    `extra` is what `Sampled.extras` held for it. `miss` comes with the first state "prefill": why the prefix cache did not have
    more of the prompt (`KVCache.miss`). `chunks` comes with the first token: in how many steps the prompt was computed.
    """

    id: str
    tokens: tuple[int, ...] = ()
    state: Literal["prefill", "decode", "stalled", "preempted"] | None = None
    extra: Any = None
    cached: int | None = None
    finish_reason: str | None = None
    error: tuple[str, str] | None = None
    miss: Miss | None = None
    chunks: int = 0
