"""The demo model's tokenizer: byte-level BPE with single digits, and its chat template.

A dialogue is ``<|bos|>`` and then, for each message, ``<|role|>`` content ``<|end|>``. ``encode`` below and
the template say the same thing; a test holds them together.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from streamkv.demo.corpus import dialogues
from streamkv.demo.text import Message
from streamkv.demo.words import (
    BOYS,
    CITIES,
    COLOURS,
    FOODS,
    GIRLS,
    HEROES,
    HOBBIES,
    JOBS,
    PET_NAMES,
    PETS,
    PLACES,
    THINGS,
    TRAITS,
    TREATS,
    USER_NAMES,
)

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD_ID, BOS_ID, END_ID = 0, 1, 2
ROLE_IDS = {"system": 3, "user": 4, "assistant": 5}
VOCAB_SIZE = 3072

CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Words of everyday English that the corpus itself may lack, so that they do not fall into letters.
_EXTRA = (
    "about after again against almost already although animal answer because before begin believe better "
    "between business change children country course different during early enough example family father "
    "friend government happen however important information interest language letter machine matter money "
    "mother music nothing number office order other people person picture place please point problem program "
    "question reason school science second several should simple since something sometimes state student "
    "system thank thing think though through together tomorrow understand water without woman world would "
    "write yesterday movie video phone internet website weekend holiday birthday dinner lunch breakfast"
)


def build(seed: int, folder: Path) -> None:
    """Train the vocabulary on the corpus and write the tokenizer's files into ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[BOS_ID],
        eos_token=SPECIAL[END_ID],
        pad_token=SPECIAL[PAD_ID],
        additional_special_tokens=SPECIAL[3:],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def _texts(seed: int) -> Iterator[str]:
    """Yield corpus texts in a few spellings, so that lower case is no string of letters."""
    rng = random.Random(seed)
    for dialogue in islice(dialogues(seed), 20_000):
        for message in dialogue:
            # Stories would drown everything else.
            if len(message["content"]) < 300 or rng.random() < 0.1:
                yield message["content"]
    words = [*_EXTRA.split(), *HEROES, *PLACES, *THINGS, *GIRLS, *BOYS, *USER_NAMES, *PETS, *PET_NAMES, *CITIES]
    words += " ".join([*COLOURS, *FOODS, *HOBBIES, *JOBS, *TRAITS, *TREATS]).split()
    for _ in range(150):
        # Names and nouns are what the model must carry from the question into the answer: one token each.
        yield " ".join(["", *rng.sample(words, len(words))])
        yield " ".join(["", *(word.lower() for word in rng.sample(words, len(words) // 2))])


def encode(tokenizer: Tokenizer, dialogue: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return a dialogue's token ids, and for each whether the model is the one to write it."""
    token_ids, own = [BOS_ID], [False]
    for message in dialogue:
        content: list[int] = tokenizer.encode(message["content"], add_special_tokens=False).ids
        mine = message["role"] == "assistant"
        token_ids += [ROLE_IDS[message["role"]], *content, END_ID]
        own += [False, *[mine] * (len(content) + 1)]
    return token_ids, own
