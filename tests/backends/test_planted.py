"""The contract rejects every planted fault, in each dtype that its cases have, and says what is wrong."""

from __future__ import annotations

import re

import pytest
import torch

from streamkv.attention import KVSpec
from streamkv_backends.contract import cases, check, check_refusals
from tests.backends.planted import PLANTED
from tests.backends.third_party.streamkv_pebble import PebbleBackend, PebblePool

CASES = cases(PebbleBackend().limits)


@pytest.mark.parametrize("name", PLANTED)
def test_fault_is_rejected(name: str) -> None:
    fault = PLANTED[name]
    chosen = [case for case in CASES if fault.cases in case.name]
    assert chosen, "the fault names no case"
    for dtype in {case.dtype for case in chosen}:
        sentences = []
        for case in [case for case in chosen if case.dtype == dtype][:3]:
            check(PebbleBackend(), case)  # the same backend without the fault passes, so it is the fault that is found
            try:
                check(fault.backend(), case)
            except AssertionError as error:
                sentences.append(str(error))
        assert sentences, f"{name} passes in {dtype}"
        assert all(re.search(fault.says, sentence) for sentence in sentences), sentences


class AcceptsAnything(PebbleBackend):
    def allocate_kv(self, spec: KVSpec) -> PebblePool:
        return PebblePool(spec)


class RefusesWithoutAWord(PebbleBackend):
    def allocate_kv(self, spec: KVSpec) -> PebblePool:
        raise ValueError


@pytest.mark.parametrize(
    ("backend", "says"),
    [(AcceptsAnything, "accepts int8, which its limits exclude"), (RefusesWithoutAWord, "without a sentence")],
)
def test_refusals_are_demanded(backend: type[PebbleBackend], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_refusals(backend())


def test_the_sentence_names_case_step_layer_and_sequence() -> None:
    case = next(case for case in CASES if case.dtype == torch.float32 and "decode, window 5" in case.name)
    with pytest.raises(AssertionError) as caught:
        check(PLANTED["IgnoresWindow"].backend(), case)
    assert re.fullmatch(
        r"float32, decode, window 5, head_dim 64, blocks of 16: step \d, layer 0, sequence \d \(\d+ new of \d+ tokens\): "
        r"the relative error is \S+, and \S+ is allowed: twice that of plain torch in this dtype",
        str(caught.value),
    )
