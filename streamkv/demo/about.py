# ruff: noqa: E501 - a template reads best on one line
"""What the model knows about StreamKV: questions, answers and what it adds when asked for more.

The facts are in ``facts_cache.py`` (blocks and prefixes) and ``facts_serving.py`` (steps, streams, start).
"""

import random

from streamkv.demo.facts_cache import FACTS as CACHE_FACTS
from streamkv.demo.facts_serving import FACTS as SERVING_FACTS
from streamkv.demo.text import choose

FACTS = CACHE_FACTS + SERVING_FACTS

_OPENERS = [
    "",
    "",
    "",
    "",
    "",
    "",
    "please tell me: ",
    "I have a question: ",
    "ok, ",
    "and ",
    "hey, ",
    "so ",
    "sorry, but ",
    "Brook, ",
]
_DEFINE = [
    "{what is|what's|whats|explain|define|tell me about|what does it mean:|I do not understand|can you explain|please explain|what do you mean by|do you know what is} <term>{|?}",
    "what {is|are} <term>{| in StreamKV| exactly| here}?",
]
_MORE = [
    "{tell me more|more|go on|can you say more|and|more details please|explain more|please continue|can you explain that|how so|what else|in more detail|continue|say more|really|why|why is that|how come|tell me more about that|tell me more about it}{|?|.}",
]
_AGAIN = [
    "{say that again|can you repeat that|I do not understand|what do you mean|in other words|again please|repeat please|simpler please}{|?}"
]


def turns(rng: random.Random) -> list[tuple[str, str]]:
    """Ask about one to three facts, with "tell me more" and "again" in between."""
    out: list[tuple[str, str]] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        fact = rng.choice(FACTS)
        if fact.term and rng.random() < 0.35:
            question = choose(rng, _DEFINE, {"term": rng.choice(fact.term.split("|"))})
        else:
            question = choose(rng, fact.questions)
        answers = list(fact.answers)
        first = rng.choice(answers)
        out.append((rng.choice(_OPENERS) + question, choose(rng, [first])))
        draw = rng.random()
        if draw < 0.30:
            out.append((choose(rng, _MORE), choose(rng, fact.more)))
        elif draw < 0.38:
            others = [answer for answer in answers if answer != first] or answers
            out.append((choose(rng, _AGAIN), rng.choice(["In other words: ", "Once more: ", ""]) + choose(rng, others)))
    return out
