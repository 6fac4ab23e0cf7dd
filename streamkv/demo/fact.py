"""The shape of one thing the model knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """Templates for one fact.

    ``term`` is what "what is ...?" asks for (alternatives by ``|``; empty when the fact defines nothing),
    ``questions`` are other ways to ask, ``answers`` say the same thing in different words, ``more`` goes on.
    """

    term: str
    questions: list[str]
    answers: list[str]
    more: list[str]
