"""What is said of a prompt must not fill the memory when nobody reads it."""

from __future__ import annotations

from typing import Final

from streamkv.errors import InvalidRequestError
from streamkv.text.stream import PreparedPrompt

__all__ = ["check_report"]

_MAX_REPORTED: Final = 32_768
"""Most log-probabilities of prompt tokens that one request can ask for: about a megabyte of JSON."""


def check_report(*prompts: PreparedPrompt, times: int = 1) -> None:
    """Refuse what would be too much of one request.

    Args:
        times: how often the answer says it.

    Raises:
        InvalidRequestError: too many log-probabilities of prompt tokens.
    """
    top = prompts[0].sampling.prompt_logprobs
    tokens = sum(len(prepared.token_ids) for prepared in prompts)
    if top is not None and prompts[0].reports_prompt and tokens * (1 + top) * times > _MAX_REPORTED:
        said = f", said {times} times," if times > 1 else ""
        raise InvalidRequestError(
            f"{tokens} prompt tokens with {top} alternatives each{said} are more than {_MAX_REPORTED} log-probabilities; "
            "ask for fewer",
            param="prompt_logprobs",
        )
