"""What is said of a prompt must not fill the memory when nobody reads it."""

from __future__ import annotations

from typing import Final

from streamkv.errors import InvalidRequestError
from streamkv.text.stream import PreparedPrompt

__all__ = ["check_report"]

_MAX_REPORTED: Final = 32_768
"""Most log-probabilities of prompt tokens that one request can ask for: about a megabyte of JSON."""


def check_report(*prompts: PreparedPrompt) -> None:
    """Refuse what would be too much of one request.

    Raises:
        InvalidRequestError: too many log-probabilities of prompt tokens.
    """
    top = prompts[0].sampling.prompt_logprobs
    tokens = sum(len(prepared.token_ids) for prepared in prompts)
    if top is not None and prompts[0].reports_prompt and tokens * (1 + top) > _MAX_REPORTED:
        raise InvalidRequestError(
            f"{tokens} prompt tokens with {top} alternatives each are more than {_MAX_REPORTED} log-probabilities; ask for fewer",
            param="prompt_logprobs",
        )
