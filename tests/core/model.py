"""A model of integers: slots hold what was written into them, and the next token is a function of everything before it.

`SlotMemory` is KV memory with one number per slot. Computing a token *reads every slot before it through the block table* and
asserts that it holds the right prefix, so that a wrong hit, a missing copy, an early reuse or a write to a shared block
changes an output or fails at once.
"""

from __future__ import annotations

from hashlib import blake2b

from streamkv.core.config import SchedulerConfig
from streamkv.core.kv_cache import KVCache
from streamkv.core.request import StopRule
from streamkv.core.scheduler import Scheduler
from streamkv.core.step import PENDING, Event, Sampled, Step

VOCAB = 7
NAN = -1  # what a failed row leaves in the slots it wrote


def chain(previous: int, token: int) -> int:
    """State of a prefix: depends on every token of it."""
    return int.from_bytes(blake2b(b"%d,%d" % (previous, token), digest_size=8).digest(), "little")


def next_token(state: int, branch: int) -> int:
    """What the model says after a prefix."""
    return chain(state, 1_000_003 + branch) % VOCAB


def branch_of(request_id: str) -> int:
    """Ids of parallel samples are written `name/branch`."""
    return int(request_id.rpartition("/")[2]) if "/" in request_id else 0


def reference(prompt: list[int], request_id: str, stop: StopRule) -> tuple[list[int], str]:
    """Output tokens and finish reason, computed without any cache."""
    state = 0
    for token in prompt:
        state = chain(state, token)
    output: list[int] = []
    if stop.max_tokens == 0:
        return output, "length"
    while True:
        token = next_token(state, branch_of(request_id))
        output.append(token)
        state = chain(state, token)
        if token in stop.stop_token_ids and len(output) > stop.min_tokens:
            return output, "stop"
        if len(output) == stop.max_tokens:
            return output, "length"


class SlotMemory:
    """Carries out steps as `Step` says a runner must."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int, num_host_slots: int = 0) -> None:
        self.block_size = block_size
        self.slots: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host: list[list[int | None]] = [[None] * block_size for _ in range(num_host_slots)]
        self.tables: list[list[int]] = [[] for _ in range(num_rows)]
        self.names = [""] * num_rows
        self.last = [PENDING] * num_rows
        self.doomed: set[str] = set()  # requests whose rows have come out as NaN
        self.computed_tokens = 0

    def run(self, step: Step, *, fail: frozenset[str] = frozenset()) -> Sampled:
        """One forward pass; rows of the requests in `fail` come out as NaN."""
        self.update(step)
        position = 0
        sampled: list[tuple[int, ...]] = []
        failed: set[int] = set()
        for index, (row, start, count, samples) in enumerate(zip(step.rows, step.starts, step.counts, step.samples, strict=True)):
            tokens = [self.last[row] if t == PENDING else t for t in step.tokens[position : position + count]]
            position += count
            name = self.names[row]
            if name in fail or name in self.doomed:
                self._spoil(row, start, count)
                self.doomed.add(name)
                failed.add(index)
                self.last[row] = 0
                sampled.append((0,) if samples else ())
                continue
            states = self._compute(row, start, tokens)
            new = self._check_drafts(states[count - samples :], tokens[count - samples + 1 :], branch_of(name))
            if new:
                self.last[row] = new[-1]
            sampled.append(new)
        assert position == len(step.tokens), "tokens do not match counts"
        return Sampled(sampled, frozenset(failed))

    def update(self, step: Step) -> None:
        """Everything of a step but the computation: also done for a step that is skipped after a failure."""
        for block, slot in step.swap_out:
            self.host[slot] = list(self.slots[block])
        for block in step.clears:
            self.slots[block] = [None] * self.block_size
        # A fork may copy its leader's tail while that is being spoiled: behind what the copy is for, and overwritten.
        contents = [[None if value == NAN else value for value in self.slots[source]] for source, _ in step.copies]
        for (_, target), content in zip(step.copies, contents, strict=True):
            self.slots[target] = content
        for block, slot in step.swap_in:
            self.slots[block] = list(self.host[slot])
        for row, name in step.admitted:
            self.names[row] = name
            self.doomed.discard(name)
            self.tables[row] = []
        for row, first, ids in step.tables:
            self.tables[row][first:] = list(ids)

    def _spoil(self, row: int, start: int, count: int) -> None:
        """A row of NaN: every slot it writes holds NaN afterwards."""
        for position in range(start, start + count):
            self.slots[self.tables[row][position // self.block_size]][position % self.block_size] = NAN

    @staticmethod
    def _check_drafts(states: list[int], drafts: list[int], branch: int) -> tuple[int, ...]:
        """What is said after each state, as long as the drafts were that."""
        new: list[int] = []
        for position, state in enumerate(states):
            if position and drafts[position - 1] != new[-1]:
                break
            new.append(next_token(state, branch))
        return tuple(new)

    def _compute(self, row: int, start: int, tokens: list[int]) -> list[int]:
        """The state after each token."""
        table, size = self.tables[row], self.block_size
        state = 0
        if start:
            value = self.slots[table[(start - 1) // size]][(start - 1) % size]
            assert value is not None, f"{self.names[row]}: slot {start - 1} was never written"
            state = value
        states: list[int] = []
        for offset, token in enumerate(tokens, start):
            assert 0 <= token < VOCAB * 1000, f"{self.names[row]}: token {token}"
            state = chain(state, token)
            states.append(state)
            self.slots[table[offset // size]][offset % size] = state
        self.computed_tokens += len(tokens)
        self._verify(row, start + len(tokens))
        return states

    def _verify(self, row: int, end: int) -> None:
        """Every slot up to `end` must hold the state that follows from the one before: attention reads them all."""
        table, size = self.tables[row], self.block_size
        values = [self.slots[table[p // size]][p % size] for p in range(end)]
        previous = 0
        for position, value in enumerate(values):
            assert value is not None, f"{self.names[row]}: reads unwritten slot {position}"
            assert value in {chain(previous, token) for token in range(VOCAB)}, (
                f"{self.names[row]}: slot {position} holds another prefix"
            )
            previous = value


class Oracle:
    """Drafts that are right for a while: it knows the model, and errs on purpose."""

    def __init__(self, request_id: str) -> None:
        self.branch = branch_of(request_id)
        self.asked = 0
        self.expected: list[int] = []  # how many of the last proposal are right
        self.learned: list[tuple[int, int]] = []

    def propose(self, tokens: list[int], pending: int, most: int) -> list[int]:
        """Up to five, the first `asked % 6` of them right."""
        assert pending in (0, 1)
        state = 0
        for token in tokens:
            state = chain(state, token)
        for _ in range(pending):
            state = chain(state, next_token(state, self.branch))
        drafts: list[int] = []
        right = self.asked % 6
        self.asked += 1
        for position in range(max(0, min(most, 5))):
            token = next_token(state, self.branch)
            drafts.append(token if position < right else (token + 1) % VOCAB)
            state = chain(state, drafts[-1])
        self.expected = [min(right, len(drafts))]
        return drafts

    def learn(self, tokens: int, proposed: int, accepted: int) -> None:
        self.learned.append((proposed, accepted))
        assert [accepted] == self.expected, "a right draft was refused, or a wrong one taken"


class World:
    """A scheduler, the memory it drives, and what came out, with one step of look-ahead if asked."""

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        max_model_len: int = 64,
        policy: str = "fcfs",
        digest_size: int = 32,
        caching: bool = True,
        max_queued_requests: int = 1000,
        draft_rows: int = 0,
        num_host_slots: int = 0,
        swap_block_tokens: float = 0.0,
    ) -> None:
        cache = KVCache(
            num_blocks,
            block_size,
            enable_prefix_caching=caching,
            digest_size=digest_size,
            num_host_slots=num_host_slots,
            swap_block_tokens=swap_block_tokens,
        )
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(budget, max_num_seqs),
            max_model_len=max_model_len,
            max_queued_requests=max_queued_requests,
            policy=policy,  # type: ignore[arg-type]  # parametrised
            draft_rows=min(draft_rows, max(budget, max_num_seqs)),
        )
        self.scheduler = Scheduler(config, cache)
        self.memory = SlotMemory(num_blocks, block_size, max_num_seqs, num_host_slots)
        self.flight: list[tuple[Step, Sampled]] = []
        self.asked: dict[str, tuple[list[int], StopRule]] = {}
        self.begun: set[str] = set()
        self.deadline: dict[str, float] = {}
        self.output: dict[str, list[int]] = {}
        self.reason: dict[str, str] = {}
        self.events: list[Event] = []
        self.steps: list[Step] = []
        self.now = 0.0
        self.most_tokens = config.max_num_batched_tokens

    def submit(self, name: str, prompt: list[int], max_tokens: int = 4, *, n: int = 1, **options: object) -> tuple[str, ...]:
        stop_ids, min_tokens = options.pop("stop_token_ids", frozenset()), options.pop("min_tokens", 0)
        stop = StopRule(max_tokens, stop_ids, min_tokens)  # type: ignore[arg-type]  # tests pass frozensets and integers
        ids = (name,) if n == 1 else tuple(f"{name}/{branch}" for branch in range(n))
        self.scheduler.submit(ids, prompt, stop, **options)  # type: ignore[arg-type]  # passed through
        for request_id in ids:
            request = self.scheduler._roster.live[request_id]
            if request.lookup is not None:
                request.lookup = Oracle(request_id)  # type: ignore[assignment]  # says what the real one says
            self.asked[request_id] = (list(prompt), stop)
            self.output[request_id] = []
            if options.get("deadline") is not None:
                self.deadline[request_id] = options["deadline"]  # type: ignore[assignment]  # tests pass numbers
        return ids

    def take(self, events: list[Event]) -> None:
        self.events.extend(events)
        for event in events:
            assert event.id not in self.reason, f"{event} follows the last event"
            self.output[event.id].extend(event.tokens)
            if event.finish_reason is not None:
                self.reason[event.id] = event.finish_reason

    def plan(self, *, fail: frozenset[str] = frozenset(), only: frozenset[str] | None = None) -> Step | None:
        """Plan and run; the result waits for its commit, as with look-ahead."""
        self.now += 1.0
        step = self.scheduler.plan(self.now, only)
        if step is not None:
            self._check_deadlines(step)
            # Every row has one token; what is more than that, prompts and drafts, keeps to the budget.
            assert step.num_tokens <= max(self.most_tokens, len(step.rows)), "the step is too large"
            self.steps.append(step)
            self.flight.append((step, self.memory.run(step, fail=fail)))
        return step

    def _check_deadlines(self, step: Step) -> None:
        """Nobody begins too late, but for further samples of a prompt that has begun in time."""
        for _, name in step.admitted:
            prompt_name = name.partition("/")[0]
            assert prompt_name in self.begun or self.deadline.get(name, float("inf")) > step.at, f"{name} begins too late"
            self.begun.add(prompt_name)

    def commit(self) -> None:
        step, sampled = self.flight.pop(0)
        self.take(self.scheduler.commit(step, sampled))

    def check(self) -> None:
        """The scheduler's own invariants, and: nobody can be handed a block with NaN in it."""
        self.scheduler.check()
        pool = self.scheduler.cache.pool
        for block, slots in enumerate(self.memory.slots):
            if NAN in slots and pool.count(block) == 0:
                assert block in self.scheduler._clears, f"block {block} is available and holds NaN"

    def run_once(self) -> None:
        """One step without look-ahead."""
        self.plan()
        self.commit_all()

    def commit_all(self) -> None:
        while self.flight:
            self.commit()

    def crash(self, *, ran: bool, ahead: bool) -> list[str]:
        """The next step raises, before or after its work; the one planned behind it is skipped. Returns the suspects."""
        self.commit_all()
        step = self.scheduler.plan(self.now)
        if step is None:
            return []
        self._check_deadlines(step)
        if ran:
            self.memory.run(step)
        else:
            self.memory.update(step)
        skipped = self.scheduler.plan(self.now) if ahead else None
        if skipped is not None:
            self._check_deadlines(skipped)
            self.memory.update(skipped)
        return self.scheduler.abandon()

    def squeeze(self, max_tokens: int) -> None:
        self.most_tokens = max_tokens
        self.scheduler.squeeze(max_tokens)

    def cancel(self, request_id: str) -> None:
        event = self.scheduler.cancel(request_id)
        if event is not None:
            self.take([event])

    def run(self, *, look_ahead: bool = True, limit: int = 2000) -> None:
        """Until nothing is left to do."""
        while len(self.flight) > int(look_ahead):
            self.commit()
        for _ in range(limit):
            planned = self.plan()
            self.check()
            if planned is None and not self.flight:
                self.take(self.scheduler.take_events())
                return
            while self.flight and (planned is None or len(self.flight) > int(look_ahead)):
                self.commit()
                self.check()
        raise AssertionError("no progress")

    def verify(self) -> None:
        """Finished requests have exactly the reference's output; others a prefix of it."""
        for request_id, (prompt, stop) in self.asked.items():
            tokens, reason = reference(prompt, request_id, stop)
            if self.reason.get(request_id) in ("stop", "length"):
                assert (self.output[request_id], self.reason[request_id]) == (tokens, reason), request_id
            else:
                assert self.output[request_id] == tokens[: len(self.output[request_id])], request_id
