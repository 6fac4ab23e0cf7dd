# ruff: noqa: E501 - a template reads best on one line
"""Talk that depends on earlier turns: what the person told, and what was said before."""

import random
from dataclasses import dataclass, field

from streamkv.demo.text import Split, choose, held_out
from streamkv.demo.words import CITIES, COLOURS, FOODS, HOBBIES, JOBS, PET_NAMES, PETS, USER_NAMES


@dataclass
class Memory:
    """What a dialogue has told so far. Written by the exchanges of this module and by the corpus."""

    known: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # what the user typed, oldest first


@dataclass(frozen=True)
class Topic:
    """One thing a person may tell: how it is told, how the model reacts, how it is recalled."""

    tell: list[str]
    react: list[str]
    ask: list[str]
    recall: list[str]
    unknown: list[str]
    values: list[str]


TOPICS: dict[str, Topic] = {
    "name": Topic(
        ["{my name is|I am|I'm|im|call me|this is|the name is|hi, my name is|hello, I am|hi I'm|you can call me|my name's|I am called|people call me} <name>{|.|!|. And you?|, nice to meet you| by the way|, by the way}", "<name>{|.}", "I am <name>, who are you?"],
        ["{Nice|Good|Lovely} to meet you, <name>! {I am Brook.|How are you today?|What would you like to talk about?|How can I help you?}", "Hello, <name>! {What a nice name.|How are you?|I am Brook.} {What shall we talk about?|What can I do for you?}"],
        ["{what is|what's|whats|do you know|do you remember|can you remember|remember} my name{|, please}?", "who am I?", "{say|tell me} my name"],
        ["Your name is <name>.", "You are <name>, {of course|you told me}.", "You told me that your name is <name>."],
        ["You have not told me your name yet. {What is it?|What is your name?}", "I do not know your name yet. {What is it?|Please tell me.}"],
        USER_NAMES,
    ),
    "pet": Topic(
        ["I have a <pet>{| called <pet_name>| named <pet_name>|, <pet_name>}", "my <pet> is called <pet_name>", "{my <pet>'s name is|I got a new <pet>, its name is} <pet_name>"],
        ["<Pet>s are {lovely|wonderful|great company}! {How old is your <pet>?|What does your <pet> like to do?|Does your <pet> like to play?}", "A <pet>, how nice! {Is your <pet> friendly?|Tell me more about your <pet>.}"],
        ["{what|which} pet do I have?", "do you remember my pet?", "do I have a pet?", "what animal do I have?"],
        ["You have a <pet>.", "You told me that you have a <pet>."],
        ["You have not told me about a pet. {Do you have one?|Which one do you have?}"],
        PETS,
    ),
    "hobby": Topic(
        ["{I like|I love|I enjoy|my hobby is|I really like|I am into|in my free time I like|my favourite hobby is} <hobby>{|.|!}", "I do a lot of <hobby>", "<hobby>{|.|!}"],
        ["<Hobby> sounds {fun|great|like a good hobby}! {How long have you been doing it?|What do you like about it?|Do you do it often?|How did you start?}", "I see, you like <hobby>. {Is it hard to learn?|What do you like most about it?|That is a fine hobby.}"],
        ["what {is my hobby|do I like to do|do I like|do I enjoy}?", "do you {remember|know} my hobby?"],
        ["You like <hobby>.", "You told me that you like <hobby>.", "Your hobby is <hobby>."],
        ["You have not told me your hobby yet. {What do you like to do?|What is it?}"],
        HOBBIES,
    ),
    "city": Topic(
        ["{I live in|I am from|I'm from|I come from|I am in|my home is} <city>{|.|!}", "I just moved to <city>", "<city>"],
        ["<city> {sounds like a nice place|must be nice|is a place I would like to see}! {Do you like it there?|What is it like there?|How is the weather in <city>?}", "So you {live in|are in} <city>. {Do you like it?|Have you been there long?}"],
        ["where {do I live|am I from|am I|do I come from}?", "do you {remember|know} where I live?", "which city do I live in?"],
        ["You are from <city>.", "You told me that you live in <city>.", "In <city>, you told me."],
        ["You have not told me where you live. {Where is it?|Where are you from?}"],
        CITIES,
    ),
    "colour": Topic(
        ["my {favourite|favorite} {colour|color} is <colour>", "I like {|the colour }<colour>", "{<colour>|mine is <colour>}"],
        ["<Colour> is a {lovely|beautiful|fine} colour! {What else do you like?|Why do you like it?}", "Oh, <colour> is nice. {I like blue myself.|Do you have many things in <colour>?}"],
        ["what is my {favourite|favorite} {colour|color}?", "{which|what} colour do I like?"],
        ["Your favourite colour is <colour>.", "You like <colour>."],
        ["You have not told me your favourite colour. {Which is it?}"],
        COLOURS,
    ),
    "food": Topic(
        ["{I like|I love|my {favourite|favorite} food is|I like to eat|today I ate|I am eating|I had|for dinner I want} <food>{|.|!| a lot}", "<food>{|.}"],
        ["{Mm, <food>|<Food>}! {That sounds tasty.|I cannot eat, but it sounds delicious.|Do you cook it yourself?|Enjoy your meal!}", "I have heard that <food> can be very good. {Do you eat that often?|Did you make it yourself?}"],
        ["what {is my {favourite|favorite} food|do I like to eat|food do I like}?", "what {did I eat|food did I tell you about}?"],
        ["You like <food>.", "You told me about <food>."],
        ["You have not told me what you like to eat. {What is it?|Do tell me!}"],
        FOODS,
    ),
    "job": Topic(
        ["{I am|I'm|I work as|my job is to be|I am working as} <a_job>{|.}", "I am <a_job>, and you?"],
        ["<A_job>, how interesting! {Do you like your work?|What is the best part of it?|Is it hard work?}", "So you are <a_job>. {Do you enjoy it?|How long have you done that?|That must be interesting.}"],
        ["what is my {job|work|profession}?", "what do I do{| for a living| for work}?", "do you remember my job?"],
        ["You are <a_job>.", "You told me that you are <a_job>."],
        ["You have not told me what your job is. {What do you do?}"],
        JOBS,
    ),
}  # fmt: skip

_REPLY = [
    "{yes|yes I do|yeah|a bit|sometimes|yes, very much|I do|yep|of course|sure}{|!|.}",
    "{no|not really|no, not at all|nope|I don't know|not yet|no I don't|not often}{|.}",
    "{since last year|for two years|a few years|very long|since I was a child|many years|two years|every day|three}",
    "{it is fun|it makes me happy|it relaxes me|I like it a lot|it is great|because it is fun|it is nice|it is beautiful}{|!|.}",
]
_REPLIED = [
    "{That is good to hear!|That sounds nice.|How nice!} {What else do you like?|Tell me more, if you like.|What else is new?}",
    "{I see. Thank you for telling me.|I see.|That is all right.} {What else would you like to talk about?|Shall we talk about something else?}",
    "{A long time!|That is a good while.|Well done!} {You must be good at it.|What else is new?}",
    "{That is a good reason.|I am happy for you.|That is what counts.} {What else makes you happy?|Thank you for telling me.}",
]

_WHAT_ASKED = [
    "what did I {just |}{ask|say}?",
    "what was my {last|previous} {question|message}?",
    "repeat my {last |}question",
    "what did I ask you{| before}?",
]
_FIRST_ASKED = ["what was my first {question|message}?", "what did I {ask|say} first?", "how did we start?"]


def turns(rng: random.Random, memory: Memory, split: Split) -> list[tuple[str, str]]:
    """Tell something, or ask about something told before; remembers what is told in ``memory``."""
    draw = rng.random()
    if draw < 0.12 and memory.asked and len(memory.asked[-1]) < 90:
        return [
            (choose(rng, _WHAT_ASKED), choose(rng, ["You asked: ", "You said: ", "Your last message was: "]) + memory.asked[-1])
        ]
    if draw < 0.16 and memory.asked and len(memory.asked[0]) < 90:
        return [(choose(rng, _FIRST_ASKED), f"Your first message was: {memory.asked[0]}")]
    if draw < 0.48 and memory.known:
        return [recall(rng, memory, rng.choice([key for key in TOPICS if key in memory.known]))]
    key = rng.choice(["name", "name", "name", "pet", "hobby", "hobby", "city", "colour", "food", "job"])
    if key in memory.known or draw > 0.94:
        return [recall(rng, memory, key)]
    out = [told(rng, memory, key, split)]
    if key not in ("name", "colour") and rng.random() < 0.45:
        out.append(reply(rng))
    elif rng.random() < 0.3:
        out.append(recall(rng, memory, key))
    return out


def reply(rng: random.Random) -> tuple[str, str]:
    """Answer a question that the model asked back, in a word or two."""
    kind = rng.randrange(len(_REPLY))
    return choose(rng, [_REPLY[kind]]), choose(rng, [_REPLIED[kind]])


def recall(rng: random.Random, memory: Memory, key: str) -> tuple[str, str]:
    """Ask for what was told under ``key``; the model says so when nothing was."""
    topic = TOPICS[key]
    if key not in memory.known:
        return choose(rng, topic.ask), choose(rng, topic.unknown)
    if key == "pet" and "pet_name" in memory.known and rng.random() < 0.5:
        slots = {"pet": memory.known["pet"], "pet_name": memory.known["pet_name"]}
        return choose(rng, ["{what is|what's} {my <pet>'s name|the name of my <pet>|my <pet> called}?"], slots), choose(
            rng, ["Your <pet> is called <pet_name>.", "Its name is <pet_name>."], slots
        )
    return choose(rng, topic.ask), choose(rng, topic.recall, slots_for(key, memory.known[key]))


def slots_for(key: str, value: str) -> dict[str, str]:
    """Return the slots ``<key>``, ``<Key>``, ``<a_key>`` and ``<A_key>`` for a value."""
    an = f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
    upper = value[:1].upper() + value[1:]
    return {key: value, key.capitalize(): upper, f"a_{key}": an, f"A_{key}": an.capitalize()}


def told(rng: random.Random, memory: Memory, key: str, split: Split) -> tuple[str, str]:
    """Tell the model something new of kind ``key``; it is remembered in ``memory``."""
    topic = TOPICS[key]
    pet_name = rng.choice(PET_NAMES)
    while True:
        template, value = rng.choice(topic.tell), rng.choice(topic.values)
        if held_out("tell", template, value) == (split == "heldout"):
            break
    slots = slots_for(key, value) | {"pet_name": pet_name}
    text = choose(rng, [template], slots)
    memory.known[key] = value
    if key == "pet":
        memory.known.pop("pet_name", None)
        if pet_name in text:
            memory.known["pet_name"] = pet_name
            return text, choose(
                rng,
                [
                    *topic.react,
                    "<pet_name> is a {fine|lovely|good} name for a <pet>! {Is <pet_name> friendly?|How old is <pet_name>?}",
                ],
                slots,
            )
    return text, choose(rng, topic.react, slots)
