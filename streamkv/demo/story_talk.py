# ruff: noqa: E501 - a template reads best on one line
"""Asking for stories, and talking about the story just told."""

import random

from streamkv.demo.stories import Story, pick_pair, tell
from streamkv.demo.text import Split, article, choose
from streamkv.demo.words import HEROES, PLACES, THINGS

_TELL = "{tell me|can you tell me|please tell me|write|write me|make up|I want|I'd like|I would like|give me|could you tell me|tell|can you write}"
_ASK_BOTH = [
    _TELL
    + " {a story|a short story|a little story|a tale|a bedtime story} {about|with|of} <a_hero> and <a_second>{|.|, please|?}",
    _TELL + " {a story|a short story} about {the|a brave|a little|a small|an old} <hero> and {the|an old|a} <second>{|?}",
    "{a story|story|short story|bedtime story} {about|with} <a_hero> and <a_second>{|, please|!}",
    "{story|a story}: <hero>, <second>",
    "<hero> and <second>{|!|, a story please}",
]
_ASK_PLACE = [
    _TELL
    + " {a story|a bedtime story|a short story} about {<a_hero>|the <hero>} who {gets lost in|lives in|finds|lived near|wants to see|falls in love with|saves|dreams of|travels to} {the|a} <second>{|.|?}",
    _TELL + " {a story|a short story} about <a_hero> {in|at|near|who goes to|who visits|from} {the|a} <second>{|?}",
    "{a story|story} about <a_hero> {in|at} the <second>",
]
_ASK_THING = [
    _TELL
    + " {a story|a short story} about <a_hero> {who finds|who lost|who wants|who has|with|and its|who makes} <a_second>{|?}",
    "{a story|story} about <a_hero> {with|who wants} <a_second>",
]
_ASK_HERO = [
    _TELL + " {a story|a short story|a tale|a bedtime story} about {<a_hero>|a little <hero>|<hero>s|the <hero>}{|.|, please|?}",
    "{a story|story|something|tell me} about <a_hero>{|, please}",
]
_ASK_ANY = [
    _TELL + " {a story|a short story|a bedtime story|a tale|a fairy tale|any story|something nice}{|.|, please|?}",
    "{story please|a story|story|tell a story|a story please|do you know a story|do you know any stories|read me a story|let's hear a story|story time}{|!|?}",
]
_AGAIN = [
    "{another one|another story|one more|tell me another one|one more story|another|again|more stories|can I have another one|tell me another story|one more please}{|, please|!|?}"
]
_INSTEAD = [
    "{and|now} one about <a_hero>{|?}",
    "{now|and} {a story|one} about <a_hero> and <a_second>{|, please}",
    "{can you tell one|do one|another one|one more|another story} about <a_hero>{|?}",
]
_LEAD = ["", "", "", "Here is {a|your} story. ", "Gladly! ", "Of course. ", "All right, here is {a|your} story. "]

_FOLLOW = [
    (["{what was|what is|what's} the {hero's name|name of the <hero>|name of the hero|<hero>'s name}?", "what was {the <hero>|the hero} called?", "who was the story about?", "who {was|is} the {hero|main character}?"],
     ["The <hero> was called <name>.", "The name of the <hero> was <name>.", "It was about <name>, the <hero>."]),
    (["who {helped|helps} {<name>|the <hero>|<him>}?", "who {was|is} <helper_name>?", "who was the {helper|friend}?"],
     ["It was <helper_name>, the <helper>.", "<helper_name> did, the <helper>.", "<helper_name> was the <helper> in the story."]),
    (["{what is|what's|what was} the {moral|lesson|point}{| of the story| of it}?", "what did <name> learn?", "what does the story {mean|teach}?", "what can {I|we} learn from {it|the story}?"],
     ["The {lesson|moral} is that <moral>.", "<name> learned that <moral>.", "It says that <moral>."]),
    (["{nice|lovely|good|great|beautiful|sweet|wonderful|cool|what a nice|that was a nice|I liked the|I like this|good} story{|!|.}", "{I liked it|that was nice|I love it|that was beautiful|very nice}{|!}"],
     ["Thank you! {I am glad that you liked it.|Shall I tell you another one?|I liked the <helper> best.|Would you like to hear one more?}"]),
    (["{did they live happily|what happened next|what happened then|and then|how does it go on|what happened to <name>|is there more|what happens next}{|?}", "did <name> {stay happy|come back}?"],
     ["<name> and <helper_name> {stayed friends|are still friends} and {lived happily|had many more adventures} together.", "After that, <name> and <helper_name> {met every week|had tea together every Sunday} and {talked about old times|told the story to their friends}."]),
    (["is {it|the story|that} {true|real}?", "did {you|somebody} {make it up|make that up|write it|write this}?", "where {is|did you get} {it|the story|this story} from?"],
     ["No, I made it up{| just now|, with a little help from chance}.", "It is not true, I made it up. {Did you like it?|But the lesson is true.}"]),
    (["{can you|please} {sum it up|summarise it|make it shorter|sum up the story}{|?}", "what was the story about?", "in short?"],
     ["It is about <name>, <a_hero>, who was helped by <helper_name> and learned that <moral>."]),
    (["why {did|was} {<name>|the <hero>} {sad|do that|go there}?", "why?", "was <name> {brave|happy|sad}?", "why did <helper_name> help?"],
     ["Because <name> had a {good heart|big wish}, and {that makes even a <hero> brave|<helper_name> could see it}."]),
]  # fmt: skip


def turns(rng: random.Random, split: Split) -> list[tuple[str, str]]:
    """Ask for a story, talk about it, perhaps ask for another one."""
    request, story = ask(rng, split)
    out = [(request, choose(rng, [rng.choice(_LEAD)]) + story.text)]
    for questions, answers in rng.sample(_FOLLOW, rng.choice((0, 0, 1, 1, 2, 3))):
        slots = _slots(story)
        out.append((choose(rng, questions, slots), choose(rng, answers, slots)))
    if rng.random() < 0.15:
        request, story = again(rng, split)
        out.append((request, choose(rng, [rng.choice(_LEAD)]) + story.text))
    return out


def ask(rng: random.Random, split: Split) -> tuple[str, Story]:
    """Return a request for a story and the story that answers it."""
    draw = rng.random()
    if draw < 0.15:
        return choose(rng, _ASK_ANY), tell(rng, split)
    about_place = rng.random() < 0.5
    hero, second = pick_pair(rng, split, PLACES if about_place else THINGS)
    slots = {"hero": hero, "a_hero": article(hero), "second": second, "a_second": article(second)}
    if draw < 0.35:
        return choose(rng, _ASK_HERO, slots), tell(rng, split, hero=hero)
    if draw < 0.42:
        return choose(rng, _ASK_HERO, {"hero": second, "a_hero": article(second)}), _told(rng, split, None, second, about_place)
    templates = _ASK_BOTH + (_ASK_PLACE if about_place else _ASK_THING)
    return choose(rng, templates, slots), _told(rng, split, hero, second, about_place)


def again(rng: random.Random, split: Split) -> tuple[str, Story]:
    """Return a request for a further story and the story."""
    if rng.random() < 0.5:
        return choose(rng, _AGAIN), tell(rng, split)
    about_place = rng.random() < 0.5
    hero, second = pick_pair(rng, split, PLACES if about_place else THINGS)
    template = rng.choice(_INSTEAD)
    slots = {"a_hero": article(hero), "a_second": article(second)}
    if "<a_second>" in template:
        return choose(rng, [template], slots), _told(rng, split, hero, second, about_place)
    return choose(rng, [template], slots), tell(rng, split, hero=hero)


def _told(rng: random.Random, split: Split, hero: str | None, second: str, about_place: bool) -> Story:
    hero = hero or rng.choice([noun for noun in HEROES if noun != second])
    return tell(rng, split, hero, second, None) if about_place else tell(rng, split, hero, None, second)


def _slots(story: Story) -> dict[str, str]:
    return {
        "hero": story.hero,
        "a_hero": article(story.hero),
        "name": story.name,
        "him": "her" if story.pronoun == "she" else "him",
        "helper": story.helper,
        "helper_name": story.helper_name,
        "moral": story.moral,
    }
