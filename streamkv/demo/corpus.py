"""The dialogues that the demo model is trained on: a seeded, endless generator.

A dialogue is a walk over topics (small talk, memory, stories, sums, StreamKV) that share one memory, so
what a person told early can be asked for late. The held-out side never shares a slot combination (hero
and place, the operands of a sum, who told what in which words) with the training side.
"""

import random
from collections.abc import Iterator

from streamkv.demo import about, arithmetic, chitchat, memory, openchat, replies, smalltalk, story_talk
from streamkv.demo.memory import Memory
from streamkv.demo.text import Message, Split, casual, choose

_SYSTEM = [
    "You are {Brook|a helpful assistant|a friendly assistant|a helpful, friendly assistant|an assistant}.",
    "You are {Brook, |}the demo model of StreamKV. {Be brief.|Answer in plain English.|}",
    "{Be brief and friendly.|Answer shortly.|You are a helpful assistant. Be concise.}",
]
_WEIGHTS = {"smalltalk": 36, "open": 16, "memory": 24, "story": 10, "arithmetic": 13, "about": 26}
_INTENTS = smalltalk.INTENTS + chitchat.INTENTS
_OPENING, _CLOSING = (smalltalk.GREETING, smalltalk.HOW_ARE_YOU), (smalltalk.THANKS, smalltalk.GOODBYE)


def dialogues(seed: int, split: Split = "train") -> Iterator[list[Message]]:
    """Yield dialogues without end; equal seeds yield equal dialogues."""
    rng = random.Random(f"{split}:{seed}")
    while True:
        yield dialogue(rng, split)


def dialogue(rng: random.Random, split: Split, topics: int | None = None) -> list[Message]:
    """Return one dialogue of ``topics`` topics (drawn when None: 1 to 6, seldom up to 16)."""
    if topics is None:
        topics = rng.choice((1, 1, 2, 2, 3, 3, 4, 6)) if rng.random() < 0.95 else rng.randint(8, 16)
    known = Memory()
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": choose(rng, _SYSTEM).strip()})
    if rng.random() < 0.25:
        _append(rng, messages, known, [_intent(rng, rng.choice(_OPENING), known)])
    for _ in range(topics):
        _append(rng, messages, known, _topic(rng, known, split))
        while rng.random() < 0.55:
            reaction = replies.turns(rng, known, split, messages[-1]["content"])
            if not reaction:
                break
            _append(rng, messages, known, reaction)
    if rng.random() < 0.2:
        _append(rng, messages, known, [_intent(rng, rng.choice(_CLOSING), known)])
    return messages


def _topic(rng: random.Random, known: Memory, split: Split) -> list[tuple[str, str]]:
    name = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    if name == "memory":
        return memory.turns(rng, known, split)
    if name == "story":
        return story_talk.turns(rng, split)
    if name == "arithmetic":
        return arithmetic.turns(rng, split)
    if name == "about":
        return about.turns(rng)
    if name == "open":
        return [openchat.turn(rng, split)]
    weights = [weight for weight, _ in _INTENTS]
    picked = rng.choices(_INTENTS, weights, k=rng.choice((1, 1, 2, 3)))
    return [_intent(rng, intent, known) for _, intent in picked]


def _intent(rng: random.Random, intent: smalltalk.Intent, known: Memory) -> tuple[str, str]:
    """Draw a question and an answer; greetings use the person's name once it is known."""
    questions, answers = intent
    answer = choose(rng, answers)
    name = known.known.get("name")
    if name and rng.random() < 0.6:
        for opening in ("Goodbye!", "Bye!", "Hello!", "Hi!", "You are welcome!"):
            answer = answer.replace(opening, f"{opening[:-1]}, {name}!")
    return choose(rng, questions), answer


def _append(rng: random.Random, messages: list[Message], known: Memory, turns: list[tuple[str, str]]) -> None:
    for asked, answered in turns:
        typed = casual(rng, asked)
        messages.append({"role": "user", "content": typed})
        messages.append({"role": "assistant", "content": answered.strip()})
        known.asked.append(typed)
