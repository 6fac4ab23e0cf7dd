"""The corpus: the same for the same seed, well formed, and split cleanly."""

import random
import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamkv.demo import arithmetic
from streamkv.demo.corpus import dialogues
from streamkv.demo.facts_cache import FACTS as CACHE_FACTS
from streamkv.demo.facts_serving import FACTS as SERVING_FACTS
from streamkv.demo.stories import pick_pair, tell
from streamkv.demo.text import Split, casual, expand, held_out
from streamkv.demo.words import PLACES, THINGS

SPLITS: list[Split] = ["train", "heldout"]


@pytest.mark.parametrize("split", SPLITS)
def test_equal_seeds_give_equal_dialogues(split: Split) -> None:
    assert list(islice(dialogues(3, split), 200)) == list(islice(dialogues(3, split), 200))
    assert list(islice(dialogues(3, split), 20)) != list(islice(dialogues(4, split), 20))


@pytest.mark.parametrize("split", SPLITS)
def test_dialogues_alternate_and_leave_no_template_behind(split: Split) -> None:
    for dialogue in islice(dialogues(5, split), 2000):
        spoken = [message for message in dialogue if message["role"] != "system"]
        assert [message["role"] for message in spoken] == ["user", "assistant"] * (len(spoken) // 2)
        for message in dialogue:
            assert message["content"].strip()
            assert not re.search(r"[{}<>]", message["content"]), message["content"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seconds", [PLACES, THINGS], ids=["places", "things"])
def test_story_pairs_stay_on_their_side(split: Split, seconds: list[str]) -> None:
    rng = random.Random(0)
    for _ in range(500):
        assert held_out(*pick_pair(rng, split, seconds)) == (split == "heldout")


@pytest.mark.parametrize("split", SPLITS)
def test_sums_stay_on_their_side(split: Split) -> None:
    rng = random.Random(0)
    for _ in range(500):
        assert held_out(*arithmetic.problem(rng, split)) == (split == "heldout")


def test_the_held_out_side_is_neither_empty_nor_large() -> None:
    share = sum(held_out(a, "+", b) for a in range(100) for b in range(100)) / 10_000
    assert 0.06 < share < 0.11


@given(seed=st.integers(0, 2**32))
def test_a_story_speaks_of_what_was_asked_for(seed: int) -> None:
    story = tell(random.Random(seed), "train", hero="fox", place="lighthouse")
    assert story.name in story.text
    assert "fox" in story.text
    assert story.text.count("lighthouse") >= 2
    assert len(story.text.split()) >= 150


def test_sixty_facts_each_with_ways_to_ask() -> None:
    facts = CACHE_FACTS + SERVING_FACTS
    assert len(facts) >= 60
    assert all(fact.questions and fact.answers and fact.more for fact in facts)


@given(st.text(), st.integers(0, 1000))
def test_casual_takes_any_text(text: str, seed: int) -> None:
    assert casual(random.Random(seed), text) is not None


def test_expand_fills_slots_and_nested_alternatives() -> None:
    seen = {expand(random.Random(i), "{a|b{c|d}} <x>", {"x": "!"}) for i in range(50)}
    assert seen == {"a !", "bc !", "bd !"}
    with pytest.raises(KeyError):
        expand(random.Random(0), "<missing>", {})
