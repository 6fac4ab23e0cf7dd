# ruff: noqa: E501 - a template reads best on one line
"""What a person says to a question that the model has just asked: "yes", "fine", a name, a colour."""

import random
import re
from collections.abc import Callable

from streamkv.demo import chitchat, memory, openchat, smalltalk, story_talk
from streamkv.demo.memory import Memory
from streamkv.demo.stories import tell
from streamkv.demo.text import Split, choose
from streamkv.demo.words import HEROES, PLACES, THINGS

Turns = list[tuple[str, str]]

_YES = (
    "{yes|yes please|sure|ok|okay|yeah|of course|please do|yes, tell me|go ahead|yep|why not|gladly|please|oh yes|do it|y}{|!|.}"
)
_NO = "{no|no thanks|no thank you|not now|nope|maybe later|rather not|nah|no, thank you}{|!|.}"
_DECLINED = [
    "{All right.|No problem.|That is fine.|Okay.} {What would you like instead?|What shall we do instead?|What shall we talk about?|Then tell me something about you.}"
]
_MORE = ["{another one|another|one more|again|more|tell me another one|one more please|another one please}{|!|?}"]
_LEAD = ["", "", "Gladly! ", "Here is your story. ", "All right, here it comes. ", "Of course. "]


def turns(rng: random.Random, known: Memory, split: Split, answer: str) -> Turns:
    """Return the turns that react to the end of ``answer``; empty when it asks nothing known here."""
    for pattern, react in _RULES:
        found = pattern.search(answer)
        if found:
            return react(rng, known, split, found)
    return []


def _story(rng: random.Random, known: Memory, split: Split, found: re.Match[str]) -> Turns:
    if rng.random() < 0.2:
        return [(choose(rng, [_NO]), choose(rng, _DECLINED))]
    noun = found.groupdict().get("noun")
    if noun is None or noun not in HEROES + PLACES + THINGS:
        return [(choose(rng, [_YES]), rng.choice(_LEAD) + tell(rng, split).text)]
    hero = noun if noun in HEROES else None
    place = noun if hero is None and noun in PLACES else None
    thing = noun if hero is None and place is None else None
    return [(choose(rng, [_YES]), rng.choice(_LEAD) + tell(rng, split, hero, place, thing).text)]


def _one_of(intent: smalltalk.Intent, ask: list[str]) -> Callable[..., Turns]:
    """React to an offer: accepted with ``intent``'s answer, or declined."""

    def react(rng: random.Random, known: Memory, split: Split, found: re.Match[str]) -> Turns:
        if ask == [_YES] and rng.random() < 0.15:
            return [(choose(rng, [_NO]), choose(rng, _DECLINED))]
        return [(choose(rng, ask), choose(rng, intent[1]))]

    return react


def _feeling(rng: random.Random, known: Memory, split: Split, found: re.Match[str]) -> Turns:
    intent = rng.choice([smalltalk.FEEL_GOOD, smalltalk.FEEL_GOOD, smalltalk.FEEL_BAD, chitchat.FEEL_AND_YOU])
    return [(choose(rng, intent[0]), choose(rng, intent[1]))]


def _telling(key: str) -> Callable[..., Turns]:
    """React by telling what the model asked for."""

    def react(rng: random.Random, known: Memory, split: Split, found: re.Match[str]) -> Turns:
        return [memory.told(rng, known, key, split)]

    return react


def _weather(rng: random.Random, known: Memory, split: Split, found: re.Match[str]) -> Turns:
    return [(choose(rng, smalltalk.WEATHER_SAID[0]), choose(rng, smalltalk.WEATHER_SAID[1]))]


def _free(rng: random.Random, known: Memory, split: Split, found: re.Match[str]) -> Turns:
    """React to "what shall we talk about?": with a wish, a statement, or no idea."""
    draw = rng.random()
    if draw < 0.3:
        return [(choose(rng, chitchat.CHOICE[0]), choose(rng, chitchat.CHOICE[1]))]
    if draw < 0.6:
        return [openchat.turn(rng, split)]
    if draw < 0.8:
        return story_talk.turns(rng, split)
    return [memory.told(rng, known, rng.choice(["name", "hobby", "city", "food", "pet"]), split)]


def _open(rng: random.Random, known: Memory, split: Split, found: re.Match[str]) -> Turns:
    return [memory.reply(rng)]


def _rule(pattern: str, react: Callable[..., Turns]) -> tuple[re.Pattern[str], Callable[..., Turns]]:
    return re.compile(pattern), react


_RULES = [
    _rule(r"story about an? (?P<noun>\w+)\?$", _story),
    _rule(r"(?:but I like stories about them|an? (?P<noun>\w+), but I like stories).*Shall I tell you one\?$", _story),
    _rule(r"(joke\? Just say yes\.|joke\? Shall we do that\?|Would you like a joke\?)$", _one_of(smalltalk.JOKE, [_YES])),
    _rule(r"riddle\? (Just say yes\.|Shall we do that\?)$", _one_of(chitchat.RIDDLE, [_YES])),
    _rule(r"(Do you want another one\?|Shall I tell you one more\?|I know a few more\.)$", _one_of(smalltalk.JOKE, [_YES, *_MORE])),
    _rule(r"^(Sure!|Here is one\.|All right\.|Gladly!) (Why|What)", _one_of(smalltalk.JOKE, _MORE)),
    _rule(r"(The answer is an? |A (piano|towel|clock|needle)!|It is a (clock|needle)|It is your age|Your age!)", _one_of(chitchat.RIDDLE, _MORE)),
    _rule(r"^(Here is one:|Did you know\?)", _one_of(chitchat.FUN_FACT, _MORE)),
    _rule(r"(story(, though| instead|, or ask me something| cheer you up)?|story\? Just say yes\.|another one|tell you one|one more|story\? Shall we do that)[?.]$", _story),
    _rule(r"(How are you( today| doing)?|How about you|how is your day|made you smile today)\?$", _feeling),
    _rule(r"(thank you|thanks)[.!].*And you\?$", _feeling),
    _rule(r"([Yy]our name\?|what is yours\?|name yet\. What is it\?|Brook.*And you\?)$", _telling("name")),
    _rule(r"(blue.*\?|favourite colour\?)$", _telling("colour")),
    _rule(r"(tokens.*\?|like to eat\. What is it\?)$", _telling("food")),
    _rule(r"(otter|kingfisher).*\?$", _telling("pet")),
    _rule(r"((telling|short) stories|good story|nice long chat).*\?$", _telling("hobby")),
    _rule(r"(your hobbies[?!]|like to do\?|hobby yet\. What is it\?)$", _telling("hobby")),
    _rule(r"([Ww]here (do you live|are you from|is it)\?)$", _telling("city")),
    _rule(r"([Ww]here you are\?|outside\?)$", _weather),
    _rule(r"(talk about( next)?|like to do|do next|do now|on your mind|do for you|do instead|like instead|talk about you|something about you(rself)?|up to today)[?.]$", _free),
    _rule(r"(you do|What do you|What is it like|do you do|Tell me more|Did you|Is it|Who goes|How long).*[?!.]$", _open),
]  # fmt: skip
