"""Bounds of one session."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SessionLimits"]


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of one session (docs/protocol.md, "Limits").

    Attributes:
        streams: streams that may run at once; further ones wait here.
        queue: streams that may wait.
        frame: most bytes of an inbound frame.
        outbound: bytes of text that may wait for a slow reader.
        control: answers to the client's own frames that may wait; beyond, its frames are not read.
        flush_tokens, flush_bytes, flush_s, flush_busy_s: after its first token a stream's text is sent at this many tokens,
            bytes or seconds, whichever comes first; the longer time counts while other frames are waiting.
        heartbeat_s: a stream that has sent nothing for this long sends its status.
        window: tokens that clients are advised to accept ahead of what they have consumed.
        ring: most tokens of a stream that are kept for a resume; beyond, the oldest are forgotten.
        retained: bytes that one session may keep for resumes and forks; beyond, the oldest finished streams are forgotten.
        grace_s: how long a stream goes on without a connection, within its credit.
        resume_s: how long a finished stream is kept for a resume or a fork.
        stall_s: a stream whose client accepts nothing for this long is ended.
    """

    streams: int = 64
    queue: int = 256
    frame: int = 1 << 20
    hello_s: float = 5.0
    outbound: int = 256 * 1024
    control: int = 256
    flush_tokens: int = 8
    flush_bytes: int = 512
    flush_s: float = 0.020
    flush_busy_s: float = 0.050
    heartbeat_s: float = 20.0
    window: int = 1024
    ring: int = 4096
    retained: int = 8 << 20
    grace_s: float = 15.0
    resume_s: float = 60.0
    stall_s: float = 120.0
