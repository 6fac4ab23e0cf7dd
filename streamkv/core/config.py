"""Bounds and policy of a scheduler, and what can never be served within them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamkv.errors import ContextLengthError, InvalidRequestError, KVCapacityError

__all__ = ["SchedulerConfig"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds and policy.

    Attributes:
        max_num_seqs: rows, i.e. most requests running at once.
        max_num_batched_tokens: token budget of a step.
        max_model_len: most tokens of a request, prompt and output.
        max_queued_requests: most requests waiting.
        max_queued_tokens: most prompt tokens waiting.
        policy: `fcfs` ignores priorities.
        draft_rows: drafts are checked while a step of running requests and drafts has no more tokens than this: up to there a
            pass is bound by memory, and a few tokens more cost next to nothing. 0 = no speculation.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 4096
    max_queued_requests: int = 4096
    max_queued_tokens: int = 4_000_000
    policy: Literal["fcfs", "priority"] = "fcfs"
    draft_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Every running request must be able to decode in every step.
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        if not 0 <= self.draft_rows <= self.max_num_batched_tokens:
            raise ValueError("draft_rows must be between 0 and max_num_batched_tokens")
        if self.policy not in ("fcfs", "priority"):
            raise ValueError("policy must be fcfs or priority")

    def check_fits(self, num_prompt: int, max_tokens: int, block_size: int, num_blocks: int) -> None:
        """Refuse a request that could not run even alone.

        Raises:
            InvalidRequestError: the prompt is empty, or the number of output tokens is negative.
            ContextLengthError: prompt and output together are longer than `max_model_len`.
            KVCapacityError: they need more than all blocks.
        """
        if not num_prompt:
            raise InvalidRequestError("the prompt is empty; send at least one token", param="prompt")
        if max_tokens < 0:
            raise InvalidRequestError("max_tokens must be at least 0", param="max_tokens")
        total = num_prompt + max_tokens
        if total > self.max_model_len:
            raise ContextLengthError(
                f"prompt ({num_prompt} tokens) plus max_tokens ({max_tokens}) is {total}, "
                f"more than the context of {self.max_model_len}",
                param="prompt",
            )
        # The last sampled token is never fed back, so it needs no slot.
        blocks = -(-max(total - 1, num_prompt) // block_size)
        if blocks > num_blocks:
            raise KVCapacityError(
                f"the request needs {blocks} KV blocks and the server has {num_blocks}; shorten it",
                param="prompt",
            )
