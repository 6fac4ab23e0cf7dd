"""Small sums in words and in digits, with the follow-ups that people ask."""

import random

from streamkv.demo.text import Split, choose, held_out

WORD = {"+": "plus", "-": "minus", "*": "times"}

_ASK = [
    "{what is|what's|whats|how much is|calculate|compute|can you tell me what is|do you know what is} <a> <op> <b>?",
    "<a> <op> <b>{|?|=| =|= ?}",
    "<a><sign><b>{|?|=| = ?}",
    "{what is|what's|how much is} <a><sign><b>?",
    "{please |can you |}{add|sum} <a> and <b>{|?}",
]
_ANSWER = [
    "<a> <op> <b> is <result>.",
    "<a> <op> <b> is <result>.",
    "That is <result>: <a> <op> <b> is <result>.",
    "<a> <op> <b> makes <result>.",
]

_MORE = [
    "{<name>|Tom} has <a> {apples|coins|books|eggs|cookies} and {gets|finds|buys} <b> more. How many {are there|is that}{| now}?",
    "{If |}I have <a> {apples|pens|stones|cups} and {buy|get} <b> more, how many do I have{| now}?",
]
_LESS = [
    "{<name>|Anna} has <a> {apples|coins|books|eggs|cookies} and {gives away|loses|sells} <b>. How many are left?",
    "There are <a> {birds|cats|ducks} and <b> go away. How many {stay|are left}?",
    "{If |}I have <a> {apples|pens|cookies|cups} and {eat|lose|give away} <b>, how many {are left|do I have}?",
]
_TIMES = [
    "There are <a> {boxes|bags|baskets} with <b> {apples|eggs|books} {each|in each}. How many is that{| in all}?",
    "<name> buys <a> packs of <b> {cards|pens|eggs}. How many is that?",
]


def problem(rng: random.Random, split: Split) -> tuple[int, str, int]:
    """Draw ``(a, operator, b)`` within what the model is taught, on the asked side of the split."""
    while True:
        op = rng.choice("++--*")
        if op == "*":
            a, b = rng.randint(0, 12), rng.randint(0, 12)
        else:
            top = rng.choice((10, 20, 20, 100))
            a, b = rng.randint(0, top), rng.randint(0, top)
            if op == "-" and b > a:
                a, b = b, a
        if held_out(a, op, b) == (split == "heldout"):
            return a, op, b


def result_of(a: int, op: str, b: int) -> int:
    """Return the value of ``a op b``."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def ask(rng: random.Random, split: Split, name: str = "Mia") -> tuple[str, str, int]:
    """Return a question, its answer and the number that the answer must hold."""
    a, op, b = problem(rng, split)
    result = result_of(a, op, b)
    sign = {"+": rng.choice(["+", " + "]), "-": rng.choice(["-", " - "]), "*": rng.choice(["*", " * ", " x "])}[op]
    slots = {"a": str(a), "b": str(b), "op": WORD[op], "sign": sign, "result": str(result), "name": name}
    if rng.random() < 0.2:
        question = choose(rng, {"+": _MORE, "-": _LESS, "*": _TIMES}[op], slots)
    else:
        question = choose(rng, _ASK if op == "+" else _ASK[:4], slots)
    return question, choose(rng, _ANSWER, slots), result


def turns(rng: random.Random, split: Split) -> list[tuple[str, str]]:
    """A few sums in a row, with a follow-up now and then."""
    out: list[tuple[str, str]] = []
    if rng.random() < 0.15:
        out.append((choose(rng, _OFFER), choose(rng, _OFFERED)))
    result = 0
    for _ in range(rng.randint(1, 4)):
        question, answer, result = ask(rng, split)
        if out and rng.random() < 0.2:
            question = choose(rng, ["and <q>", "now <q>", "ok, <q>"], {"q": question})
        out.append((question, answer))
    draw = rng.random()
    if draw < 0.10:
        out.append(
            (
                choose(rng, ["are you sure?", "{is that|really} right?", "sure?"]),
                f"{rng.choice(['Yes', 'I think so'])}, the answer is {result}.",
            )
        )
    elif draw < 0.20 and result <= 90:
        more = rng.randint(1, 9)
        if held_out(result, "+", more) == (split == "heldout"):
            asked = choose(rng, ["{and |}plus <m>?", "add <m> to that", "and if you add <m>?", "+ <m>"], {"m": str(more)})
            out.append((asked, f"{result} plus {more} is {result + more}."))
    elif draw < 0.25:
        out.append(
            (choose(rng, _LARGE, {"n": str(rng.randint(120, 99999)), "m": str(rng.randint(120, 9999))}), choose(rng, _TOO_LARGE))
        )
    return out


_OFFER = [
    "{can you|do you know how to} {do maths|do math|calculate|count|add|do sums}?",
    "let's do {some|} {maths|math|sums}",
    "are you good at {maths|math}?",
]
_OFFERED = [
    "{Yes|Sure}, small sums. {Try me!|Ask me one.|Which one?}",
    "I can add, subtract and multiply small numbers. {Give me a sum.|Try me.}",
]
_LARGE = ["{what is|how much is} <n> {times|divided by|plus} <m>?", "<n> * <m>", "what is the {square root|cube} of <n>?"]
_TOO_LARGE = [
    "That is too {big|hard} for me. I only do small sums.",
    "I am not good with {numbers that large|sums that hard}. {Please use a calculator.|A calculator will do it better.}",
]
