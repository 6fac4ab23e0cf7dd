# ruff: noqa: E501, SIM905 - a template reads best on one line, a word list as text
"""Talk about anything: statements and questions with an open slot, answered by taking the slot up.

A small model cannot know what a person will mention, but it can learn to pick the word up and ask back.
"""

import random

from streamkv.demo.text import Split, article, capital, choose, held_out
from streamkv.demo.words import CITIES, FOODS, HEROES, HOBBIES, PLACES, THINGS

_ANIMALS = HEROES[:45]
_RELATIVES = "mother father brother sister friend son daughter wife husband uncle aunt cousin grandmother neighbour boss teacher mum dad girlfriend boyfriend colleague".split()
_SUBJECTS = (
    "trees flowers stars planets trains cars boats computers phones music films books history geography "
    "biology chemistry physics football cooking painting mountains oceans rivers dinosaurs robots space "
    "dragons politics money cats dogs birds horses whales insects weather school holidays christmas art "
    "philosophy religion economics medicine law science languages poetry architecture fashion coffee tea"
).split()
_STARTS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w z".split()
_MIDDLES = "a e i o u ai ea oo ar en ol im un".split()
_ENDS = "b ck d ff g l m n nd p r s st t x z lo na ra mi to ba".split()

# (user templates, assistant templates); <n> is a noun, <a_n> with its article, <rel> a relative.
_THING_SAID = [
    (
        [
            "{I bought|I got|I found|I lost|I broke|I need|I want|I would like|I am looking for|I made|I just bought|I want to buy|I have} <a_n>{| today| yesterday| for my <rel>}"
        ],
        [
            "<A_n>, how {nice|interesting}! {What will you do with it?|Tell me more about the <n>.|What does it look like?}",
            "I see, <a_n>. {Is it for you?|Do you like it?|What is it like?|Shall I tell you a story about <a_n>?}",
        ],
    ),
    (
        ["{my <rel> gave me|my <rel> has|my <rel> bought|my <rel> wants|my <rel> lost} <a_n>"],
        [
            "Your <rel> has <a_n>? {How nice.|That is interesting.} {Do you like it?|What is it like?}",
            "<A_n>, I see. {Say hello to your <rel> from me!|Is your <rel> happy with it?}",
        ],
    ),
]
_ANIMAL_SAID = [
    (
        [
            "{I saw|we saw|there is|I met|I found|I dreamed of|I am afraid of|there was} <a_n>{| today| yesterday| in the garden| in the street| on my way home|}"
        ],
        [
            "<A_n>! {What did it do?|Was it big?|How exciting!|Where was that?}",
            "Oh, <a_n>! {Shall I tell you a story about <a_n>?|Do you like animals?|What did it look like?}",
        ],
    ),
    (
        [
            "do you like <n>s?",
            "what do you think {of|about} <n>s?",
            "are <n>s {nice|dangerous|clever|friendly|big}?",
            "I {love|like|hate} <n>s",
        ],
        [
            "I have never met <a_n>, but I like stories about them. {Do you like <n>s?|Shall I tell you one?}",
            "<N>s are interesting. {What do you like about them?|Have you ever seen one?|Shall I tell you a story about <a_n>?}",
        ],
    ),
]
_PLACE_SAID = [
    (
        [
            "{I went to|I am going to|I'm going to|we went to|I was at|we are going to|I want to go to|I will go to|let's go to|tomorrow I go to} the <n>{| today| tomorrow| yesterday| with my <rel>| next week| on Sunday}"
        ],
        [
            "The <n>, that sounds {nice|good|like fun}! {What is there to do at the <n>?|Who goes with you?|What do you like about the <n>?}",
            "To the <n>? {Have a good time!|Enjoy it!|That must be interesting.} {Tell me about it.|Is it far?|Do you go there often?}",
        ],
    ),
    (
        [
            "{have you ever been to|do you know|do you like|would you like to go to} {the <n>|<city>}?",
            "have you {seen|visited} {the <n>|<city>}?",
        ],
        ["No, I never leave this computer. {Have you been there?|What is it like there?|Tell me about it!}"],
    ),
    (
        [
            "{I am going to|I want to visit|I went to|I visited|I love|we are flying to|next week I go to|I was in} <city>{| next week| last year| in summer| with my <rel>|}"
        ],
        [
            "<city>! {That sounds wonderful.|How exciting!} {What will you see there?|What do you like about <city>?|Is it your first time?}",
            "To see <city> must be {nice|great}. {Tell me about it.|Who goes with you?}",
        ],
    ),
]
_PEOPLE_SAID = [
    (
        [
            "{me too|same here|I agree|exactly|that is right|you are right|right you are|so do I|I think so too}{|!|.}",
            "I have {two|three|four|many} {|of them}",
        ],
        ["{How nice!|Good to hear!|I am glad that we agree.} {What else would you like to talk about?|Tell me more.}"],
    ),
    (
        [
            "my <rel> is {nice|ill|sick|angry|happy|sad|coming to visit|getting married|very funny|tired|a doctor|a teacher|tall|here}",
            "{I have|I've got} a <rel>",
            "I {love|miss|called|visited|met} my <rel>{| today| yesterday}",
        ],
        [
            "Tell me more about your <rel>. {What do you do together?|What is your <rel> like?}",
            "I see. {How is your <rel>?|Do you see your <rel> often?|Please say hello to your <rel>.}",
        ],
    ),
]
_ASKED = [
    (
        [
            "{what is|what's|whats|what are|tell me about|explain|do you know about|what do you know about|what can you tell me about|describe|define} {<subject>|<a_n>|<word>|the <n>}{|?}",
            "{who is|who was|who's} <Word> <Word2>{|?}",
            "how does <a_n> work?",
            "how do I {make|use|find|repair|draw} <a_n>?",
            "where can I {find|buy} <a_n>?",
            "how {old|big|heavy|expensive} is {the|a} <n>?",
            "what does <word> mean?",
            "what colour is {the|a} <n>?",
        ],
        [
            "I do not know much about that. I am a small demo model. {I can tell you a story, though.|Ask me about StreamKV, or for a story.}",
            "I am afraid that I do not know. {I am only a small demo model.|My world is small: chats, stories, sums and StreamKV.}",
            "That is something I never learned. {Ask me about StreamKV, or let me tell you a story.|I am only a small model.}",
        ],
    ),
    (
        [
            "do you like <subject>?",
            "let's talk about <subject>",
            "can we talk about <subject>?",
            "I like <subject>",
            "I am {learning|studying|interested in|thinking about} <subject>",
            "I love <subject>",
        ],
        [
            "I know little about <subject>, but I like to listen. {What do you like about it?|Tell me more!}",
            "<Subject>, that is interesting. {What do you like most about it?|Please tell me more.|How did you come to like it?}",
        ],
    ),
]
_ACTIVITY = [
    (["{I am|I'm|I was|we are|I will be} <hobby>{| now| today| tomorrow| all day| with my <rel>| this weekend}", "{tomorrow|today|at the weekend|tonight} I {am going|go} <hobby>", "do you like <hobby>?", "{I hate|I don't like|I do not like} <hobby>"],
     ["<Hobby>, I see. {Do you do it often?|Is it fun?|What do you like about it?}", "I cannot do that myself, but <hobby> sounds {interesting|like fun}. {Tell me more.|Do you do it often?}"]),
    (["{I ate|I had|I am cooking|I made|we had|I want|I am eating} <food> {for dinner|for lunch|today|now|tonight|yesterday|for breakfast}", "do you like <food>?"],
     ["<Food>! {That sounds tasty.|I cannot eat, but it sounds good.} {Did you like it?|Do you eat that often?}", "Mm, <food>. {Enjoy your meal!|I hope that it tastes good.} {Do you cook often?|Is it your favourite?}"]),
]  # fmt: skip


def turn(rng: random.Random, split: Split) -> tuple[str, str]:
    """Return one statement or question about something, and an answer that takes it up."""
    nouns, table = rng.choice(
        [
            (THINGS, _THING_SAID),
            (_ANIMALS, _ANIMAL_SAID),
            (PLACES, _PLACE_SAID),
            (_ANIMALS, _PEOPLE_SAID),
            (THINGS, _ASKED),
            (HEROES, _ASKED),
            (THINGS, _ACTIVITY),
        ]
    )
    questions, answers = rng.choice(table)
    asked = rng.choice(questions)
    while True:
        slots = _slots(rng, rng.choice(nouns))
        if held_out("open", asked, slots["n"]) == (split == "heldout"):
            return choose(rng, [asked], slots), choose(rng, answers, slots)


def _slots(rng: random.Random, noun: str) -> dict[str, str]:
    hobby, food, subject = rng.choice(HOBBIES), rng.choice(FOODS), rng.choice(_SUBJECTS)
    word, word2 = _made_up(rng), _made_up(rng)
    return {
        "n": noun,
        "N": capital(noun),
        "a_n": article(noun),
        "A_n": capital(article(noun)),
        "rel": rng.choice(_RELATIVES),
        "city": rng.choice(CITIES),
        "hobby": hobby,
        "Hobby": capital(hobby),
        "food": food,
        "Food": capital(food),
        "subject": subject,
        "Subject": capital(subject),
        "word": word,
        "Word": capital(word),
        "Word2": capital(word2),
    }


def _made_up(rng: random.Random) -> str:
    """Return a word that does not exist, so that unknown words are a familiar sight."""
    return "".join(rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(rng.choice((1, 2)))) + rng.choice(_ENDS)
