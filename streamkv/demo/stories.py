"""Short stories from plot grammars: a hero, a wish, an obstacle, a helper, an end, a lesson.

A plot is a list of beats and a beat a list of alternatives; every beat speaks of the same hero, so any
choice of alternatives joins into one coherent story of 200 tokens or more.
"""

import random
from dataclasses import dataclass

from streamkv.demo.plots import CLOSINGS, OPENINGS, PLACE_PLOTS, THING_PLOTS
from streamkv.demo.text import Split, article, choose, held_out
from streamkv.demo.words import BOYS, GIRLS, HEROES, PLACES, THINGS, TRAITS, TREATS

SHE = {"hen", "cow", "queen", "princess", "girl", "grandmother", "witch", "mermaid", "fairy"}
HE = {"king", "prince", "boy", "grandfather", "fisherman", "postman", "snowman", "wizard"}


@dataclass(frozen=True)
class Story:
    """A told story and what later turns may ask about it."""

    text: str
    hero: str
    name: str
    pronoun: str
    helper: str
    helper_name: str
    place: str | None
    thing: str | None
    moral: str


def pick_pair(rng: random.Random, split: Split, seconds: list[str]) -> tuple[str, str]:
    """Draw a hero and a second noun whose combination lies on the asked side of the split."""
    while True:
        hero, second = rng.choice(HEROES), rng.choice(seconds)
        if hero != second and held_out(hero, second) == (split == "heldout"):
            return hero, second


def tell(
    rng: random.Random,
    split: Split,
    hero: str | None = None,
    place: str | None = None,
    thing: str | None = None,
) -> Story:
    """Tell a story about what is given; what is left open is drawn (on the asked side of the split)."""
    if place is None and thing is None:
        about_place = rng.random() < 0.5
        drawn_hero, second = pick_pair(rng, split, PLACES if about_place else THINGS)
        hero = hero or drawn_hero
        place, thing = (second, None) if about_place else (None, second)
    hero = hero or rng.choice([h for h in HEROES if h not in (place, thing)])
    return _write(rng, hero, place, thing)


def _write(rng: random.Random, hero: str, place: str | None, thing: str | None) -> Story:
    """Fill one plot; exactly one of ``place`` and ``thing`` is given, the other stays out of it."""
    slots = _cast(rng, hero)
    slots |= {"place": place or "", "thing": thing or "", "a_thing": article(thing or "thing")}
    beats, moral = rng.choice(PLACE_PLOTS if place else THING_PLOTS)
    moral = choose(rng, [moral])
    opening = choose(rng, OPENINGS, slots)
    body = [choose(rng, beat, slots) for beat in beats]
    closing = choose(rng, CLOSINGS, slots | {"moral": moral})
    middle = len(body) // 2
    paragraphs = [f"{opening} {body[0]}", " ".join(body[1:middle]), " ".join(body[middle:]), closing]
    return Story(
        text="\n\n".join(paragraph for paragraph in paragraphs if paragraph),
        hero=hero,
        name=slots["name"],
        pronoun=slots["he"],
        helper=slots["helper"],
        helper_name=slots["helper_name"],
        place=place,
        thing=thing,
        moral=moral,
    )


def _cast(rng: random.Random, hero: str) -> dict[str, str]:
    """Name the hero and a helper of another kind, with the pronouns that go with them."""
    helper = rng.choice([noun for noun in HEROES[:62] if noun != hero])
    female = hero in SHE or (hero not in HE and rng.random() < 0.5)
    helper_female = helper in SHE or rng.random() < 0.5
    name = rng.choice(GIRLS if female else BOYS)
    helper_name = rng.choice([n for n in (GIRLS if helper_female else BOYS) if n != name])
    return {
        "hero": hero,
        "a_hero": article(hero),
        "name": name,
        "he": "she" if female else "he",
        "He": "She" if female else "He",
        "him": "her" if female else "him",
        "his": "her" if female else "his",
        "helper": helper,
        "a_helper": article(helper),
        "helper_name": helper_name,
        "hhe": "she" if helper_female else "he",
        "hHe": "She" if helper_female else "He",
        "hhim": "her" if helper_female else "him",
        "hhis": "her" if helper_female else "his",
        "trait": rng.choice(TRAITS),
        "a_trait": article(rng.choice(TRAITS)),
        "treat": rng.choice(TREATS),
    }
