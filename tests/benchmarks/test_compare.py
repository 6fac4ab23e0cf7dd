"""The parts of `benchmarks.compare` that decide: figures, limits, ratios, aims, whose token is wrong, how a peer ends."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("benchmarks.compare", reason="benchmarks are not there beside an installed wheel")

from benchmarks.compare import agreement, report
from benchmarks.compare.adapters import Served
from benchmarks.compare.aims import LIMIT, ratio
from benchmarks.compare.apart import PeerError, apart
from benchmarks.compare.ceiling import Ceiling, Machine, ModelShape
from benchmarks.compare.charts import Bar, Bars, bars, curves
from benchmarks.compare.contestants import PEERS, find_llama_server, streamkv, versions
from benchmarks.compare.convert import converted, neighbours
from benchmarks.compare.rounds import AGAIN, Measured, Rounds, figures
from benchmarks.workloads import WORKLOADS, Job, jobs

# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_one_request():
    served = Served(2.0, [[1, 2, 3]], [[0.5, 1.0, 2.0]])
    assert figures([Job([7] * 10, 3)], served) == {"seconds": 2.0, "rate": 1.5, "ttft": 0.5, "prompt": 20.0, "decode": 2 / 1.5}


def test_decoding_is_timed_while_all_streams_decode():
    served = Served(9.0, None, [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0, 9.0]])
    found = figures([Job([1], 4), Job([1], 4)], served)
    # From 2.0, when the second has begun, to 4.0, when the first is done: 3.0, 4.0 and 3.0.
    assert found["decode"] == 3 / 2.0
    assert "prompt" not in found


def test_streams_that_never_decode_together_have_no_decode_rate():
    assert "decode" not in figures([Job([1], 2), Job([1], 2)], Served(4.0, None, [[1.0, 2.0], [3.0, 4.0]]))


# -- limits -----------------------------------------------------------------------------------------------------------

SHAPE = ModelShape(body=100, head=10, width=2, weight_width=2, kv_width=4, query_width=3)
READS = Ceiling(SHAPE, Machine(bandwidth=1.0, peak=1e30))  # seconds are bytes
COMPUTES = Ceiling(SHAPE, Machine(bandwidth=1e30, peak=1.0))  # seconds are operations


def test_a_step_reads_weights_once_and_the_cache_of_each_stream():
    assert READS.step_s([5, 7]) == 2 * (110 + 4 * 12)


def test_quantised_weights_are_read_as_they_are_kept_and_the_cache_as_before():
    reads = replace(READS, shape=replace(SHAPE, weight_width=0.5))
    assert reads.step_s([5, 7]) == 0.5 * 110 + 2 * 4 * 12
    assert reads.prefill_s([Job([1, 2], 1)]) == 0.5 * 110


def test_a_prefix_that_all_share_is_read_once():
    assert READS.step_s([5, 7], shared=5) == 2 * (110 + 4 * (5 + 0 + 2))


def test_a_step_computes_every_weight_for_every_stream():
    assert COMPUTES.step_s([5, 7]) == 2 * 110 * 2 + 4 * 3 * 12


def test_prompts_are_computed_once_where_they_are_equal():
    together = [Job([1, 2, 3, 4], 1), Job([1, 2, 3, 5], 1)]
    apart_ = [Job([1, 2, 3, 4], 1), Job([6, 2, 3, 5], 1)]
    attention = 4 * 3 * (1 + 2 + 3 + 4)
    assert COMPUTES.prefill_s(apart_) == 2 * 10 * 2 + 2 * (2 * 100 * 4 + attention)
    assert COMPUTES.prefill_s(together) == 2 * 10 * 2 + 2 * 100 * 5 + 4 * 3 * (1 + 2 + 3 + 4 + 4)
    assert COMPUTES.prefill_s(together, cached=True) == 2 * 10 * 2 + 2 * (2 * 100 + 4 * 3 * 4)


def test_streams_that_are_done_cost_nothing():
    assert READS.decode_s([Job([1], 2), Job([2], 3)]) == READS.step_s([2, 2]) + READS.step_s([3])


def test_the_size_of_the_model_is_that_of_its_weights(tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from benchmarks.workloads import make_config

    config = make_config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        dtype="float32",
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    matrices = {name: each.numel() for name, each in model.named_parameters() if each.dim() == 2 and "embed" not in name}
    shape = ModelShape.of(tmp_path)
    assert shape.body == sum(size for name, size in matrices.items() if name != "lm_head.weight")
    assert shape.head == matrices["lm_head.weight"]
    assert (shape.width, shape.kv_width, shape.query_width) == (4, 2 * 2 * 16, 2 * 32)
    assert shape.weight_bytes == 4 * sum(matrices.values())
    assert ModelShape.of(tmp_path, weight_bits=4.5) == replace(shape, weight_width=4.5 / 8)


def test_who_has_quantised_weights_has_limits_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelShape, "of", lambda folder, weight_bits: replace(SHAPE, weight_width=(weight_bits or 16) / 8))
    measured = Measured()
    rounds = SimpleNamespace(folder=None)
    rounds._most = Rounds._most.__get__(rounds)
    Rounds._limits(rounds, {"single": measured}, [Job([1], 2)], streamkv(["auto"]), READS.machine)
    assert measured.limits == [{"rate": 2 / (220 + 236), "prompt": 1 / 220, "decode": 1 / 236}]
    assert {name: 1 / each["prompt"] for name, (each,) in measured.limits_of.items()} == {
        "streamkv-int8": pytest.approx(110),
        "streamkv-int4": pytest.approx(110 * 4.5 / 8),
    }


# -- ratios and aims --------------------------------------------------------------------------------------------------


def _measured(**rounds: list[float]) -> Measured:
    return Measured(
        rounds={name: [{"rate": value} for value in values] for name, values in rounds.items()},
        limits=[{"rate": 100.0, "decode": 100.0}] * 3,
        machine=[Machine(4e10, 9e11)] * 3,
    )


def test_a_ratio_pairs_figures_of_the_same_round():
    measured = {"single": _measured(streamkv=[10.0, 40.0, 90.0], openvino=[10.0, 20.0, 30.0])}
    assert ratio(measured, "single", "rate", "streamkv", "openvino") == 2.0
    assert ratio(measured, "single", "rate", "streamkv", LIMIT) == 0.4


def test_a_share_of_the_limit_is_that_of_its_own_weights():
    measured = {"single": _measured(streamkv=[40.0], int8=[120.0])}
    measured["single"].limits_of["int8"] = [{"rate": 200.0}]
    assert ratio(measured, "single", "rate", "streamkv", LIMIT) == 0.4
    assert ratio(measured, "single", "rate", "int8", LIMIT) == 0.6


def test_who_was_too_slow_for_more_rounds_is_paired_in_those_it_had():
    measured = {"single": _measured(streamkv=[10.0, 40.0], openvino=[5.0])}
    assert ratio(measured, "single", "rate", "streamkv", "openvino") == 2.0


@pytest.mark.parametrize(
    ("workload", "peer", "why"),
    [("mixed32", "openvino", "was not run"), ("single", "generate", "no figure of generate"), ("single", "openvino", "failed")],
)
def test_a_ratio_that_cannot_be_had_says_why(workload: str, peer: str, why: str):
    measured = {"single": _measured(streamkv=[1.0])}
    measured["single"].failures["openvino"] = "died of SIGFPE"
    found = ratio(measured, workload, "rate", "streamkv", peer)
    assert isinstance(found, str)
    assert why in found


def test_aims_are_met_or_not_or_unknown():
    measured = {"single": _measured(streamkv=[11.0, 11.0], openvino=[10.0, 10.0], generate=[5.0, 5.0])}
    found = {each["what"]: each for each in report.aims(measured, 4.01)}
    assert found["*single* to OpenVINO"]["met"] is True
    assert found["*single* to `generate`"] == {
        "what": "*single* to `generate`",
        "aim": "≥ 2.5 ×",
        "measured": "2.20 ×",
        "met": False,
    }
    assert found["*mixed32*, backend torch, to `generate`"]["met"] is None
    assert found["KV slots unfilled, *mixed32*, pool full"]["met"] is False


def test_what_has_no_aim_is_shown_and_not_judged(capsys: pytest.CaptureFixture[str]):
    measured = {"single": _measured(**{"streamkv": [10.0], "streamkv-int4": [25.0]})}
    report.print_aims(report.aims(measured, None))
    assert "| int4 *single* to our own bfloat16 | no aim | 2.50 × |  |" in capsys.readouterr().out


def test_tables_name_everybody_and_what_failed(capsys: pytest.CaptureFixture[str]):
    measured = {"single": _measured(streamkv=[11.0, 12.0, 13.0], openvino=[10.0])}
    measured["single"].failures["generate"] = "died of SIGFPE"
    titles = {"streamkv": "StreamKV", "openvino": "OpenVINO", "generate": "transformers"}
    report.print_workload("single", measured, titles)
    printed = capsys.readouterr().out
    assert "| StreamKV | 12.0 | 11.0–13.0 | 1.00 × | 12 % |" in printed
    assert "| OpenVINO | 10.0 | 10.0–10.0 | 1.10 × | 10 % |" in printed
    assert "transformers failed: died of SIGFPE" in printed


# -- tokens -----------------------------------------------------------------------------------------------------------


class Judge:
    """Knows how far from the best each token is, wherever it stands."""

    def __init__(self, deficits: dict[int, float], error: float) -> None:
        self.deficits = deficits
        self.error = error
        self.asked: list[Any] = []

    def ask(self, message: Any, timeout_s: float) -> list[Any]:
        self.asked.append(message)
        return [[[self.deficits[token] for token in candidates], self.error] for _, candidates in message[1]]


def _agreement(judge: Judge, ours: list[int], theirs: list[int]) -> agreement.Agreement:
    rounds = SimpleNamespace(timeout_s=1.0)
    outputs = {"streamkv": [ours], "peer": [theirs]}
    (found,) = agreement._workload(judge, rounds, "single", [Job([9, 9], len(ours))], outputs)
    return found


def test_equal_tokens_need_no_judge():
    judge = Judge({}, 1.0)
    found = _agreement(judge, [1, 2, 3], [1, 2, 3])
    assert (found.tokens, found.agreed, found.differences, found.ok) == (3, 3, 0, True)
    assert not judge.asked


def test_only_the_first_difference_counts_and_is_judged_where_it_stands():
    judge = Judge({2: 0.0, 5: 0.3}, error=0.1)
    found = _agreement(judge, [1, 2, 3], [1, 5, 8])
    assert judge.asked == [[[9, 9, 1, 2, 3], [[3, [2, 5]]]]]
    assert (found.agreed, found.differences) == (1, 1)
    assert found.worst == pytest.approx(3.0)
    assert found.ok


@pytest.mark.parametrize("wrong", [2, 5])
def test_a_token_that_no_rounding_explains_is_a_mistake_whoever_made_it(wrong: int):
    found = _agreement(Judge({2: 0.0, 5: 0.0} | {wrong: 0.5}, error=0.1), [1, 2, 3], [1, 5, 8])
    assert not found.ok
    assert (found.worst, found.worst_reference) == pytest.approx((5.0, 0.0) if wrong == 5 else (0.0, 5.0))


# -- peers ------------------------------------------------------------------------------------------------------------


def test_a_peer_that_cannot_be_imported_says_what_is_missing(tmp_path: Path):
    with (
        pytest.raises(PeerError, match=r"ModuleNotFoundError.*no_such_engine.*; see .*none\.log"),
        apart("none", sys.executable, "no_such_engine", {"threads": 1}, tmp_path),
    ):
        pass


def test_a_peer_that_dies_is_told_by_its_signal(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -FPE $$\n")
    python.chmod(0o755)
    with pytest.raises(PeerError, match="died of SIGFPE"), apart("dies", str(python), "limits", {"threads": 1}, tmp_path):
        pass


def test_versions_are_those_of_the_interpreter():
    found = versions(sys.executable, ["pytest", "no-such-package"])
    assert found == {"pytest": pytest.__version__, "no-such-package": None}


def test_a_llama_server_that_is_not_there_is_not_taken(tmp_path: Path):
    assert find_llama_server(tmp_path / "llama-server", sys.executable) is None


def test_contestants_have_names_of_their_own_and_known_workloads():
    everybody = [*streamkv(["auto", "torch"]), *PEERS]
    assert len({each.name for each in everybody}) == len(everybody)
    assert {name for each in everybody for name in each.workloads} <= set(WORKLOADS)
    assert all(each.install for each in PEERS if each.elsewhere or each.program)


def test_quantised_forms_are_made_of_the_plain_one_and_kept(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$3 of $(basename "$4")" > "$5"\n')
    python.chmod(0o755)
    for _ in range(2):
        assert converted("gguf-q4_k_m", tmp_path / "model", str(python)).read_text() == "gguf-q4_k_m of model.gguf\n"
        assert (tmp_path / "model.gguf").read_text() == "gguf of model\n"
        python.unlink(missing_ok=True)  # nothing is made a second time


def test_tokens_are_new_in_every_round_and_lengths_are_not():
    for workload in WORKLOADS:
        first, second = (jobs(workload, seed, vocab_size=32_000) for seed in (0, 1))
        assert [(len(job.prompt), job.max_tokens) for job in first] == [(len(job.prompt), job.max_tokens) for job in second]
        assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))


def test_rotated_neighbours_score_as_rotated_halves():
    """What llama.cpp computes of reordered projections is what transformers computes of the others."""
    source, heads, size, inputs = np.random.default_rng(0), 3, 8, 5
    queries, keys = source.normal(size=(2, heads * size, inputs))
    token, other = source.normal(size=(2, inputs))
    angles = 7 * 10_000.0 ** (-2 * np.arange(size // 2) / size)

    def turned(vectors: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Rotate pairs (first, second) of each head's dimensions."""
        result = vectors.copy()
        result[:, first] = vectors[:, first] * np.cos(angles) - vectors[:, second] * np.sin(angles)
        result[:, second] = vectors[:, first] * np.sin(angles) + vectors[:, second] * np.cos(angles)
        return result

    halves = np.arange(size // 2), np.arange(size // 2, size)
    pairs = np.arange(0, size, 2), np.arange(1, size, 2)
    plain = turned((queries @ token).reshape(heads, size), *halves) * (keys @ other).reshape(heads, size)
    moved = turned((neighbours(queries, heads) @ token).reshape(heads, size), *pairs)
    moved *= (neighbours(keys, heads) @ other).reshape(heads, size)
    np.testing.assert_allclose(moved.sum(1), plain.sum(1))


# -- plots ------------------------------------------------------------------------------------------------------------


def test_pictures_are_svg_with_every_name_in_it():
    bar = bars("a < b", [Bars("single", "tok/s", [Bar("StreamKV", 10.0, 9.0, 11.0), Bar("A & B", 5.0, 5.0, 5.0)], 12.0)])
    curve = curves("c", "x", "y", {"one": [(1.0, 2.0), (10.0, 30.0)], "most": [(1.0, 1.0), (10.0, 10.0)]}, limits=["most"])
    for picture, names in ((bar, {"a < b", "A & B", "StreamKV", "limit 12 tok/s"}), (curve, {"one", "- - most"})):
        texts = {element.text for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}
        assert names <= texts


def test_a_second_time_is_about_the_prefix_workload():
    assert report.what(AGAIN) == "32 at once, shared prefix of 1,024 tokens and 32 own, output 32; the same tokens once more"
