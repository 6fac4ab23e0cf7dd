"""Every error that StreamKV raises on purpose.

One sentence for the user, naming the field and what to do; detail belongs in the log. The `code`s are the closed set of
the wire protocol (docs/protocol.md), so that an error keeps its meaning from the scheduler to the socket.
"""

from __future__ import annotations

from typing import ClassVar, Self

__all__ = [
    "BackendError",
    "ConfigError",
    "ContextLengthError",
    "DrainingError",
    "EngineError",
    "ForkGoneError",
    "InvalidRequestError",
    "KVCapacityError",
    "ModelLoadError",
    "ModelNotFoundError",
    "NumericalError",
    "OutOfMemoryError",
    "OverloadedError",
    "RateLimitedError",
    "StreamKVError",
    "TooManyStreamsError",
    "UnauthorizedError",
]


class StreamKVError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: name of the error in the wire protocol.
        retryable: True if the same request may succeed later.
        message: one sentence for the user.
        param: the request field at fault (a path such as `body.top_p`), if one is.
        retry_after_s: seconds after which the same request may succeed, if that can be told.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequestError(StreamKVError, ValueError):
    """A field of a request is out of its bounds or of the wrong type."""

    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested tokens do not fit the model's context."""

    code = "context_length_exceeded"

    @classmethod
    def of(cls, context: int, what: str, *, param: str | None) -> Self:
        """`what` is more than fits. It begins as OpenAI's message does, by which some clients know it (litellm)."""
        return cls(f"this model's maximum context length is {context} tokens; {what}", param=param)


class KVCapacityError(InvalidRequestError):
    """The request needs more KV blocks than the whole pool has."""

    code = "kv_oom"


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that this server does not serve."""

    code = "model_not_found"


class OverloadedError(StreamKVError):
    """The server has more work than it can begin in time; try again later."""

    code = "overloaded"
    retryable = True


class RateLimitedError(StreamKVError):
    """The tenant has used up its quota for now; the server itself may well be idle."""

    code = "rate_limited"
    retryable = True


class UnauthorizedError(StreamKVError):
    """No valid API key, ticket or token came with the request."""

    code = "unauthorized"


class DrainingError(StreamKVError):
    """The server is shutting down and takes no new work."""

    code = "draining"
    retryable = True


class TooManyStreamsError(StreamKVError):
    """The connection has as many streams as it may have."""

    code = "too_many_streams"
    retryable = True


class ForkGoneError(StreamKVError):
    """The stream to fork has not begun, or nothing is known of it any more."""

    code = "fork_gone"


class NumericalError(StreamKVError):
    """The model produced NaN or Inf for this request; only this request ends."""

    code = "numerical_error"


class OutOfMemoryError(StreamKVError):
    """The memory left beside weights and KV pool did not do for this request even alone; only this request ends."""

    code = "out_of_memory"
    retryable = True


class EngineError(StreamKVError):
    """The engine failed while computing this request."""


class ConfigError(StreamKVError, ValueError):
    """A start-up setting is wrong; the process does not start."""


class ModelLoadError(ConfigError):
    """The model folder cannot be served."""


class BackendError(ConfigError):
    """The asked attention backend cannot be used here."""
