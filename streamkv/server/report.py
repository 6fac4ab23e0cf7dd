"""What is said of a prompt must not fill the memory when nobody reads it."""

from __future__ import annotations

from typing import Final

from streamkv.errors import InvalidRequestError
from streamkv.text.stream import PreparedPrompt

__all__ = ["check_report"]

_MAX_REPORTED: Final = 32_768
"""Most log-probabilities of prompt tokens that one request can ask for: about a megabyte of JSON."""


def check_report(prepared: PreparedPrompt) -> None:
    """Refuse what would be too much.

    Raises:
        InvalidRequestError: too many log-probabilities of prompt tokens.
    """
    top = prepared.sampling.prompt_logprobs
    if top is not None and prepared.reports_prompt and len(prepared.token_ids) * (1 + top) > _MAX_REPORTED:
        raise InvalidRequestError(
            f"{len(prepared.token_ids)} prompt tokens with {top} alternatives each are more than {_MAX_REPORTED} "
            "log-probabilities; ask for fewer",
            param="prompt_logprobs",
        )
