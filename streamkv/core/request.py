"""A request: a token list plus one integer, `computed`.

There is no prefill phase and no decode phase. Every step advances `computed` towards `len(tokens)`; prefill, chunked
prefill, prefix hit, decode, preemption and fork are all that one sentence.

    tokens    |----------- prompt -----------|---- output ----|?        ? = sampled by a step still in flight
    computed  |=============================>                           KV written and committed
    planned   |===================================>                     computed + what steps in flight will write
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from streamkv.core.host_slots import Saved
from streamkv.core.lookup import PromptLookup

__all__ = ["TRANSITIONS", "Account", "IllegalTransitionError", "Request", "State", "StopRule"]


class State(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    """In the queue (or held back behind a sibling that computes the same prefix)."""
    RUNNING = "running"
    """Owns a row and blocks; may be in a step."""
    PREEMPTED = "preempted"
    """Lost row and blocks to others; in the queue again, keeps its tokens."""
    FINISHED = "finished"
    """Has its final event; owns nothing."""


TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.WAITING: frozenset({State.RUNNING, State.FINISHED}),
    State.RUNNING: frozenset({State.PREEMPTED, State.FINISHED}),
    State.PREEMPTED: frozenset({State.RUNNING, State.FINISHED}),
    State.FINISHED: frozenset(),
}
"""Every legal move; anything else raises."""


class IllegalTransitionError(AssertionError):
    """A move that `TRANSITIONS` does not list: a bug of ours, never of a user."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a request ends by itself.

    Attributes:
        max_tokens: most output tokens; 0 = the request ends once its prompt is computed, with reason `length`.
        stop_token_ids: an output token in this set ends the request, with reason `stop`.
        min_tokens: so many output tokens are taken whatever they are; the set counts from the next one on.
    """

    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0


class Account:
    """What one tenant has had on one priority level (`streamkv.core.fairness`).

    Attributes:
        tenant: its name.
        served: tokens computed for it; raised when it comes back to the line. Owners: planner (prompts), scheduler (outputs),
            line.
        last_turn: id of the last step with prompt tokens of it; -1 before. Owner: planner.
    """

    __slots__ = ("last_turn", "served", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.served = 0
        self.last_turn = -1

    @property
    def standing(self) -> tuple[int, int]:
        """The least goes first."""
        return (self.served, self.last_turn)


class Request:
    """One sample of one prompt. Written by the scheduler and the KV cache only.

    Attributes:
        id: unique among live requests.
        tokens: prompt, then output; only ever grows.
        num_prompt: length of the prompt.
        priority: lower is served first.
        arrival: position in the order of submission; breaks ties.
        credit: absolute number of output tokens the client accepts; None = no limit.
        root: what isolates its prefix cache (fingerprint and salt); None = it neither reads nor publishes.
        leader: whose first `shared` tokens are this request's too: the sibling of a sample, the parent of a fork; its blocks are
            shared at admission. None once that is done, or if the request must go alone.
        shared: number of tokens at the start that are the leader's too.
        computed: tokens whose KV is written and committed. Owner: scheduler.
        planned: `computed` plus what steps in flight write. Owner: scheduler.
        pending: output tokens that steps in flight will sample, at most one per step. Owner: scheduler.
        row: fixed place in the runner's tables while running, else -1.
        entered: id of the step with which it got its row; -1 before.
        last_step: id of the last step that holds a row of it; its blocks are fenced until that step has ended.
        blocks: block table, ids in token order. Owner: KV cache.
        keys: (digest, packed tokens) of every full block hashed so far. Owner: KV cache.
        published: number of leading blocks that were offered to the index. Owner: KV cache.
        parent: serial (or root) that the next published block hangs on; None once the chain is broken.
        cached: prompt tokens that came from the cache at the first admission; -1 before.
        limit: `len(tokens)` at which the request ends by length; who only computes its prompt samples one token, dropped.
        num_preemptions: how often it lost its blocks.
        chunks: steps that computed more than its next token: until its first output, those of its prompt.
        use_cache: False = every token that is not there has to be computed: neither found nor moved in from the host.
        saved: what the host keeps of it while it is preempted. Owner: host slots.
        salt: of its prefix cache.
        tenant: who sent it; takes turns with others, and has its share of the cache.
        account: of its tenant. Written once, when it is queued.
        lookup: where drafts of its next tokens come from; None = it gets none.
        charged: prompt tokens that the account has paid for, or the cache had. Owner: planner.
    """

    __slots__ = (
        "account",
        "arrival",
        "blocks",
        "cached",
        "charged",
        "chunks",
        "computed",
        "credit",
        "entered",
        "id",
        "keys",
        "last_step",
        "leader",
        "limit",
        "lookup",
        "num_preemptions",
        "num_prompt",
        "parent",
        "pending",
        "planned",
        "priority",
        "published",
        "root",
        "row",
        "salt",
        "saved",
        "shared",
        "state",
        "stop",
        "tenant",
        "tokens",
        "use_cache",
    )
    account: Account

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        stop: StopRule,
        *,
        arrival: int,
        priority: int = 0,
        credit: int | None = None,
        root: bytes | None = None,
        use_cache: bool = True,
        salt: str = "",
        tenant: str = "",
        leader: Request | None = None,
        shared: int = 0,
        lookup: PromptLookup | None = None,
    ) -> None:
        self.id = request_id
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.stop = stop
        self.limit = len(prompt) + max(1, stop.max_tokens)
        self.priority = priority
        self.arrival = arrival
        self.credit = credit
        self.root = root
        self.use_cache = use_cache
        self.saved: Saved | None = None
        self.salt = salt
        self.tenant = tenant
        self.leader = leader
        self.shared = shared
        self.state = State.WAITING
        self.computed = 0
        self.planned = 0
        self.pending = 0
        self.row = -1
        self.entered = -1
        self.last_step = -1
        self.blocks: list[int] = []
        self.keys: list[tuple[bytes, bytes]] = []
        self.published = 0
        self.parent: int | bytes | None = root
        self.cached = -1
        self.num_preemptions = 0
        self.chunks = 0
        self.charged = 0
        self.lookup = lookup

    def move(self, state: State) -> None:
        """Go to `state`.

        Raises:
            IllegalTransitionError: the table does not allow it.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"request {self.id}: {self.state.value} -> {state.value}")
        self.state = state

    @property
    def num_output(self) -> int:
        """Output tokens so far, those in flight not counted."""
        return len(self.tokens) - self.num_prompt

    @property
    def parked(self) -> bool:
        """True if the client accepts no further token now: the request is skipped and preempted first."""
        return self.credit is not None and self.num_output + self.pending >= self.credit

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: priority, then arrival. Unique."""
        return (self.priority, self.arrival)

    def __repr__(self) -> str:
        return (
            f"Request({self.id} {self.state.value} tokens={len(self.tokens)} computed={self.computed} "
            f"planned={self.planned} blocks={len(self.blocks)})"
        )
