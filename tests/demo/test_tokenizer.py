"""The tokenizer in the box: exact on any text, and one voice with the chat template."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from streamkv.demo import model_path
from streamkv.demo.corpus import dialogues
from streamkv.demo.text import Message
from streamkv.demo.tokenizer import BOS_ID, END_ID, PAD_ID, ROLE_IDS, SPECIAL, encode


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path())
    return loaded


RAW = Tokenizer.from_file(str(model_path() / "tokenizer.json"))


@given(st.text().filter(lambda text: not any(name in text for name in SPECIAL)))
def test_any_text_comes_back(text: str) -> None:
    assert RAW.decode(RAW.encode(text, add_special_tokens=False).ids) == text


def test_special_tokens_have_their_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.convert_tokens_to_ids(name) for name in SPECIAL] == list(range(len(SPECIAL)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD_ID, BOS_ID, END_ID)
    assert all(tokenizer.convert_tokens_to_ids(f"<|{role}|>") == token_id for role, token_id in ROLE_IDS.items())


def test_digits_stand_alone() -> None:
    assert [token for token in RAW.encode("1234").tokens if token.isdigit()] == ["1", "2", "3", "4"]


def test_the_template_and_the_trainer_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    for dialogue in islice(dialogues(11), 100):
        ids = tokenizer.apply_chat_template(dialogue, return_dict=True)["input_ids"]
        assert ids == encode(RAW, dialogue)[0]


def test_a_generation_prompt_opens_the_assistants_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    talk: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "bye"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>hello<|end|><|assistant|>Hi!<|end|><|user|>bye<|end|><|assistant|>"
