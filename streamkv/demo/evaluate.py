"""Measure the demo model and write the tables: ``python -m streamkv.demo.evaluate``.

Everything measured here is on the held-out side of the corpus, except the copied 8-grams, which ask how
much of what the model says stands word for word in the training dialogues.
"""

import argparse
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from streamkv.demo import arithmetic, model_path, report
from streamkv.demo.corpus import dialogues
from streamkv.demo.scripts import SAMPLES, THREE_TURNS
from streamkv.demo.stories import pick_pair
from streamkv.demo.text import Message, article
from streamkv.demo.tokenizer import encode
from streamkv.demo.words import BOYS, GIRLS, PLACES, THINGS

TEMPERATURE, TOP_P = 0.7, 0.9
MIN_STORY_TOKENS = 200
MIN_DISTINCT = 0.85  # share of distinct word trigrams below which a story counts as repetitive
TRAINING_DIALOGUES = 40_000  # read for the copied 8-grams; about as many as the run has seen


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    num_tokens: int
    ended: bool  # by its end token, not by the limit


class Talker:
    """The model and its tokenizer, answering many dialogues at once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()

    def answer(self, histories: Sequence[list[Message]], greedy: bool, max_tokens: int = 480) -> list[Answer]:
        """Return the next message of each dialogue."""
        texts = [self.tokenizer.apply_chat_template(h, tokenize=False, add_generation_prompt=True) for h in histories]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        with torch.no_grad():
            rows: Tensor = self.model.generate(**inputs, max_new_tokens=max_tokens, **how)
        return [self._answer(row[inputs["input_ids"].shape[1] :].tolist()) for row in rows]

    def _answer(self, token_ids: list[int]) -> Answer:
        end = self.tokenizer.eos_token_id
        ended = end in token_ids
        kept = token_ids[: token_ids.index(end)] if ended else token_ids
        return Answer(str(self.tokenizer.decode(kept)), len(kept), ended)

    def play(self, scripts: Sequence[Sequence[str]], greedy: bool) -> list[list[Message]]:
        """Play scripts of user messages to their ends, all side by side."""
        histories: list[list[Message]] = [[] for _ in scripts]
        for turn in range(max(map(len, scripts))):
            live = [i for i, script in enumerate(scripts) if turn < len(script)]
            for i in live:
                histories[i].append({"role": "user", "content": scripts[i][turn]})
            for i, answer in zip(live, self.answer([histories[i] for i in live], greedy), strict=True):
                histories[i].append({"role": "assistant", "content": answer.text})
        return histories

    def perplexity(self, items: Iterable[list[Message]]) -> float:
        """Return the perplexity per token of what the assistant says in these dialogues."""
        total, count = 0.0, 0
        for item in items:
            ids, own = encode(self.tokenizer.backend_tokenizer, item)
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids[:4096]])).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:4096]), reduction="none")
            mask = torch.tensor(own[1:4096])
            total, count = total + float(losses[mask].sum()), count + int(mask.sum())
        return math.exp(total / count)


@dataclass(frozen=True)
class StoryScore:
    """The checks that one story passed."""

    long_enough: bool
    hero: bool
    second: bool
    ended: bool
    varied: bool
    names: bool

    @property
    def all(self) -> bool:
        """Whether every check passed."""
        return all(vars(self).values())


def score_story(answer: Answer, hero: str, second: str) -> StoryScore:
    """Check one story; names are consistent when hero and helper are the only two, and the first comes back."""
    words = re.findall(r"[\w']+", answer.text)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    names = [word.removesuffix("'s") for word in words if word.removesuffix("'s") in {*GIRLS, *BOYS}]
    lower = answer.text.lower()
    return StoryScore(
        long_enough=answer.num_tokens >= MIN_STORY_TOKENS,
        hero=lower.count(hero) >= 1,
        second=lower.count(second) >= 2,
        ended=answer.ended,
        varied=len(set(trigrams)) >= MIN_DISTINCT * max(1, len(trigrams)),
        names=0 < len(set(names)) <= 2 and names.count(names[0]) >= 3,
    )


def stories(talker: Talker, number: int, seed: int) -> tuple[list[StoryScore], list[Answer]]:
    """Ask for stories about pairs that no training dialogue holds."""
    rng = random.Random(seed)
    pairs = [pick_pair(rng, "heldout", PLACES if i % 2 else THINGS) for i in range(number)]
    asked: list[list[Message]] = [
        [{"role": "user", "content": f"Tell me a story about {article(hero)} and {article(second)}."}] for hero, second in pairs
    ]
    answers = talker.answer(asked, greedy=False)
    return [score_story(a, *pair) for a, pair in zip(answers, pairs, strict=True)], answers


def sums(talker: Talker, number: int, seed: int) -> dict[str, tuple[int, int]]:
    """Return (right, asked) by operator for sums that no training dialogue holds, answered greedily."""
    rng = random.Random(seed)
    problems = [arithmetic.problem(rng, "heldout") for _ in range(number)]
    asked: list[list[Message]] = [
        [{"role": "user", "content": f"what is {a} {arithmetic.WORD[op]} {b}?"}] for a, op, b in problems
    ]
    out = dict.fromkeys(arithmetic.WORD, (0, 0))
    for (a, op, b), answer in zip(problems, talker.answer(asked, greedy=True, max_tokens=40), strict=True):
        numbers = re.findall(r"\d+", answer.text)
        right, seen = out[op]
        out[op] = right + (str(arithmetic.result_of(a, op, b)) in numbers[-1:]), seen + 1
    return out


def on_topic(talker: Talker, greedy: bool) -> tuple[int, int, list[list[Message]]]:
    """Return the turns on topic, the dialogues on topic in all three turns, and the dialogues."""
    played = talker.play([[typed for typed, _ in script] for script in THREE_TURNS], greedy)
    passed = [
        [
            bool(re.search(pattern, said["content"], re.IGNORECASE | re.DOTALL))
            for (_, pattern), said in zip(script, talk[1::2], strict=True)
        ]
        for script, talk in zip(THREE_TURNS, played, strict=True)
    ]
    return sum(map(sum, passed)), sum(map(all, passed)), played


def eight_grams(texts: Iterable[str]) -> list[int]:
    """Return the hash of every run of eight words, case and punctuation ignored, within each text."""
    out: list[int] = []
    for text in texts:
        words = re.findall(r"[\w']+", text.lower())
        # The hash stays inside this process, so Python's own will do.
        out += [hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)]
    return out


def copied(generated: Iterable[str], known: set[int]) -> float:
    """Return the share of generated 8-grams that the training dialogues hold."""
    found = eight_grams(generated)
    return sum(gram in known for gram in found) / max(1, len(found))


def said(talks: Iterable[list[Message]]) -> list[str]:
    """Return what the assistant says in these dialogues."""
    return [m["content"] for talk in talks for m in talk if m["role"] == "assistant"]


def main() -> None:
    """Measure everything and write it into the page."""
    parser = argparse.ArgumentParser(description="Evaluate StreamKV's demo model.")
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--page", type=Path, default=Path("docs/demo-model.md"), help="page whose generated part is renewed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stories", type=int, default=60)
    parser.add_argument("--sums", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(given.seed)
    talker = Talker(given.model)
    scores, tales = stories(talker, given.stories, given.seed)
    samples = talker.play(SAMPLES, greedy=False)
    turns, talks, played = on_topic(talker, greedy=True)
    sampled_turns, sampled_talks, _ = on_topic(talker, greedy=False)
    known = set(eight_grams(said(islice(dialogues(7), TRAINING_DIALOGUES))))
    results = report.Results(
        perplexity=talker.perplexity(islice(dialogues(given.seed, "heldout"), 300)),
        training_perplexity=talker.perplexity(islice(dialogues(7), 300)),
        stories={check: sum(getattr(s, check) for s in scores) for check in (*vars(scores[0]), "all")},
        num_stories=len(scores),
        story_tokens=sum(tale.num_tokens for tale in tales) / len(tales),
        sums=sums(talker, given.sums, given.seed),
        three_turns={"greedy": (turns, talks), "sampled": (sampled_turns, sampled_talks)},
        num_scripts=len(THREE_TURNS),
        copied_stories=copied([tale.text for tale in tales], known),
        copied_answers=copied([t for t in said(samples) + said(played) if len(t) < 400], known),
        copied_held_out=copied([t for t in said(islice(dialogues(given.seed, "heldout"), 2000)) if len(t) > 600], known),
        training_dialogues=TRAINING_DIALOGUES,
        samples=samples,
        num_parameters=talker.model.num_parameters(),
        num_bytes=(given.model / "model.safetensors").stat().st_size,
    )
    report.write(given.page, results)
    print(report.tables(results))


if __name__ == "__main__":
    main()
