"""Generated traffic measures what the traces measure: lengths, arrivals, and what a cache could save."""

from __future__ import annotations

import statistics
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest

from streamkv.bench.arrivals import gamma, mmpp, poisson
from streamkv.bench.lengths import Table
from streamkv.bench.profiles import PROFILES, fixed
from streamkv.bench.results import percentile
from streamkv.bench.trace import BLOCK, TraceRequest, ideal_hit_ratio, prompt_of, read_trace, shrink, write_trace
from streamkv.errors import ConfigError

COUNT = 8000

# Measured on the public traces: (mean, p50, p95) of prompts and of answers, requests per second, variation of the gaps between
# them, and the share of blocks that a cache without end would have had.
MEASURED = {
    "chat": ((1155, 1020, 4083), (211, 129, 451), 5.53, 1.09, 0.0),
    "code": ((2048, 1469, 7303), (28, 13, 90), 2.57, 13.2, 0.0),
    "agent": ((15326, 11587, 48905), (149, 69, 519), 3.91, 1.01, 0.64),
    "long-chat": ((12035, 6909, 39550), (343, 350, 698), 3.40, 1.0, 0.366),
}


def of_lengths(lengths: list[int]) -> tuple[float, float, float]:
    return statistics.mean(lengths), percentile(lengths, 0.5), percentile(lengths, 0.95)


def variation(times: list[float]) -> float:
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return statistics.pstdev(gaps) / statistics.mean(gaps)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", MEASURED)
def test_a_profile_measures_what_its_trace_does(name: str, seed: int):
    prompts, answers, _, _, hits = MEASURED[name]
    requests = PROFILES[name].generate(COUNT, seed)
    assert of_lengths([request.input_length for request in requests]) == pytest.approx(prompts, rel=0.05)
    assert of_lengths([request.output_length for request in requests]) == pytest.approx(answers, rel=0.05)
    assert ideal_hit_ratio(requests) == pytest.approx(hits, abs=0.03)


@pytest.mark.parametrize("name", MEASURED)
def test_requests_come_as_in_the_trace(name: str):
    _, _, rate, spread, _ = MEASURED[name]
    # The pauses of `code` are rare and long: it takes many for their variation to show.
    times = list(islice(PROFILES[name].arrivals(Random(3)), 200_000 if name == "code" else 20_000))
    assert len(times) / times[-1] == pytest.approx(rate, rel=0.05)
    assert variation(times) == pytest.approx(spread, rel=0.10)


def test_groups_share_their_prompt_and_nothing_else():
    requests = PROFILES["b2b"].generate(3000, 1)
    prefixes = {request.hash_ids[:11] for request in requests}
    assert len(prefixes) == 150
    assert {request.input_length for request in requests} == {7200}
    # 11 of 15 blocks, but for the first request of each group.
    assert ideal_hit_ratio(requests) == pytest.approx(11 / 15 * (1 - 150 / 3000), abs=1e-9)
    times = list(islice(PROFILES["b2b"].arrivals(Random(1)), 20_000))
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("name", PROFILES)
def test_the_seed_decides_everything_and_each_prompt_has_its_blocks(name: str):
    requests = PROFILES[name].generate(300, 5)
    assert requests == PROFILES[name].generate(300, 5)
    assert requests != PROFILES[name].generate(300, 6)
    assert requests[0].timestamp == 0
    assert [request.timestamp for request in requests] == sorted(request.timestamp for request in requests)
    for request in requests:
        assert len(request.hash_ids) == -(-request.input_length // BLOCK)
        assert len(set(request.hash_ids)) == len(request.hash_ids)


@pytest.mark.parametrize("scale", [1, 4, 128])
def test_prompts_share_exactly_the_tokens_of_their_common_blocks(scale: int):
    one = TraceRequest(0, 1200, 64, (7, 8, 9))
    other = TraceRequest(0, 1030, 64, (7, 8, 3))
    prompts = [prompt_of(request, scale, seed=1) for request in (one, other)]
    assert [len(prompt) for prompt in prompts] == [shrink(one, scale)[0], shrink(other, scale)[0]]
    assert len(prompts[0]) == -(-1200 // scale) or scale > 1
    common = 2 * BLOCK // scale
    assert prompts[0][:common] == prompts[1][:common]
    assert prompts[0][common:] != prompts[1][common : len(prompts[0])]
    assert prompt_of(one, scale, seed=2)[:common] != prompts[0][:common]
    assert all(32 <= token < 256 for prompt in prompts for token in prompt)


def test_scaled_prompts_keep_their_number_of_blocks():
    for request in PROFILES["agent"].generate(500, 1):
        prompt, answer = shrink(request, 64)
        assert -(-prompt // (BLOCK // 64)) == len(request.hash_ids)
        assert answer >= 1


def test_the_ideal_hit_ratio_counts_prefixes_only():
    requests = [TraceRequest(0, 1, 1, ids) for ids in [(1, 2, 3), (1, 2, 4), (9, 2, 3), (1, 2, 4, 5)]]
    assert ideal_hit_ratio(requests) == (0 + 2 + 0 + 3) / 13


def test_a_trace_survives_being_written(tmp_path: Path):
    requests = PROFILES["long-chat"].generate(50, 1)
    write_trace(tmp_path / "t.jsonl", requests)
    assert read_trace(tmp_path / "t.jsonl") == requests


def test_lines_of_mooncakes_traces_are_read_in_the_order_of_time(tmp_path: Path):
    lines = [
        '{"timestamp": 3000, "input_length": 513, "output_length": 5, "hash_ids": [0, 1]}',
        "",
        '{"timestamp": 0, "input_length": 512, "output_length": 500, "hash_ids": [0]}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert [request.timestamp for request in read_trace(tmp_path / "t.jsonl")] == [0, 3000]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no request"),
        ("{", "is no trace"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [0]}', "line 1"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 5, "hash_ids": []}', "line 1"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_trace(tmp_path / "t.jsonl")
    with pytest.raises(ConfigError, match="is no trace"):
        read_trace(tmp_path / "missing.jsonl")


def test_arrival_processes_have_their_rate_and_variation():
    for process, rate, spread in ((poisson(50.0), 50.0, 1.0), (gamma(5.0, 0.25), 5.0, 2.0)):
        times = list(islice(process(Random(1)), 20_000))
        assert len(times) / times[-1] == pytest.approx(rate, rel=0.05)
        assert variation(times) == pytest.approx(spread, rel=0.10)


def test_two_states_take_turns():
    times = list(islice(mmpp((100.0, 1.0), (2.0, 6.0))(Random(1)), 40_000))
    assert len(times) / times[-1] == pytest.approx((100 * 2 + 1 * 6) / 8, rel=0.10)


def test_a_table_goes_through_its_percentiles():
    table = Table(1, 10, 1000, percentiles=(0.0, 50.0, 100.0))
    assert [table.at(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([1, 10**0.5, 10, 100, 1000])
    for values in ((1, 2), (0, 1, 2), (3, 2, 4)):
        with pytest.raises(ValueError, match="ascending"):
            Table(*values, percentiles=(0.0, 50.0, 100.0))


def test_fixed_lengths_are_fixed():
    requests = fixed(100, 7, 20.0).generate(50, 1)
    assert {(request.input_length, request.output_length) for request in requests} == {(100, 7)}
    assert ideal_hit_ratio(requests) == 0
