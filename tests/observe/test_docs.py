"""docs/observability.md says what the code says. `python -m tests.observe.test_docs` writes its table of metrics anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

from streamkv.engine.api import KV_STATES, Miss
from streamkv.engine.fake import fake_info
from streamkv.observe.exposition import Family, Histogram
from streamkv.observe.lag import LoopLag
from streamkv.observe.metrics import GATES, Metrics
from streamkv.text.events import Why

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"
BEGIN, END = "<!-- metrics: begin (generated: python -m tests.observe.test_docs) -->\n", "<!-- metrics: end -->"


def table() -> str:
    """Every metric, as it is called by default."""
    lines = ["| metric | kind | labels | what |", "|---|---|---|---|"]
    for name, family, common in Metrics(fake_info(), LoopLag()).families("vllm"):
        labels = ", ".join(f"`{label}`" for label in (*(name for name, _ in common), *family.labels))
        lines.append(f"| `{name}` | {family.kind} | {labels} | {family.text} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_the_codes():
    _, _, rest = PAGE.read_text().partition(BEGIN)
    assert rest.partition(END)[0].strip() == table().strip(), "run python -m tests.observe.test_docs"


def test_every_metric_says_what_it_is():
    families: list[Family] = [family for _, family, _ in Metrics(fake_info(), LoopLag()).families("vllm")]
    for family in families:
        assert family.text.endswith("."), family.name
        assert not isinstance(family, Histogram) or list(family.bounds) == sorted(set(family.bounds)), family.name


def test_every_word_of_why_and_of_the_map_is_explained():
    page = PAGE.read_text()
    for word in (*Why.__struct_fields__, *get_args(Miss), *GATES):
        assert f"`{word}`" in page, word
    assert ", ".join(f"{index} {state}" for index, state in enumerate(KV_STATES)) in page


def test_the_example_of_a_map_adds_up():
    page = PAGE.read_text()
    example = json.loads(re.search(r"(?s)    (\{\"t\": \"snapshot\".*?\]\]\})", page)[1])  # type: ignore[index]  # it is there
    assert sum(run[1] for run in example["runs"]) == example["blocks"] == sum(example["counts"].values())
    for index, state in enumerate(KV_STATES):
        assert sum(run[1] for run in example["runs"] if run[2] == index) == example["counts"][state]
    for request in example["requests"]:
        assert sum(run[1] for run in example["runs"] if run[3] == request["n"]) == request["blocks"]
    filled = sum(run[1] * (example["block_size"] - run[5]) for run in example["runs"] if run[2] == 2 and run[5] >= 0)
    assert filled == example["unused_slots"]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
