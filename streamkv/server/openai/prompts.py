"""Tokenising the prompts of one request, before any of them is submitted: what cannot be served costs nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from streamkv.errors import InvalidRequestError
from streamkv.text.streams import PreparedPrompt

__all__ = ["prepare_each"]

T = TypeVar("T")


async def prepare_each(field: str, given: Sequence[T], prepare: Callable[[T], Awaitable[PreparedPrompt]]) -> list[PreparedPrompt]:
    """All of them, one after the other.

    Args:
        field: where they stand in the body.

    Raises:
        InvalidRequestError: one cannot be served; `param` says which.
    """
    prompts = []
    for index, each in enumerate(given):
        try:
            prompts.append(await prepare(each))
        except InvalidRequestError as error:
            if len(given) == 1 or error.param != field:
                raise
            raise type(error)(error.message, param=f"{field}[{index}]") from error
    return prompts
