"""The weights in the box: their size, their shape, and that they answer sensibly."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from streamkv.demo import model_path
from streamkv.demo.text import Message


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((model_path() / "config.json").read_text(encoding="utf-8"))
    return read


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(model_path()).eval(), AutoTokenizer.from_pretrained(model_path())


def test_the_weights_fit_the_box() -> None:
    assert (model_path() / "model.safetensors").stat().st_size <= 12_000_000


def test_the_shape_is_a_plain_llama(config: dict[str, Any]) -> None:
    assert config["model_type"] == "llama"
    assert config["head_dim"] == 64
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 4096
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert "auto_map" not in config


def test_asking_for_the_path_imports_nothing_heavy() -> None:
    code = "import sys, streamkv.demo as d; d.model_path(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def answer(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], talk: list[Message]) -> str:
    model, tokenizer = loaded
    inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=80)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("hello", r"hello|hi\b"),
        ("What is your name?", r"brook"),
        ("what is 2 plus 3?", r"\b5\b"),
        ("What is a block?", r"block.*(tokens|keys)"),
        ("thank you", r"welcome|pleasure|problem|any time|gladly"),
    ],
)
def test_plain_questions(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], question: str, expected: str) -> None:
    said = answer(loaded, [{"role": "user", "content": question}])
    assert re.search(expected, said, re.IGNORECASE), said


def test_it_remembers_a_name(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    talk: list[Message] = [{"role": "user", "content": "my name is Emma"}]
    talk.append({"role": "assistant", "content": answer(loaded, talk)})
    talk.append({"role": "user", "content": "what is my name?"})
    assert "Emma" in answer(loaded, talk)
