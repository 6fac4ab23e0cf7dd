"""What a process that serves sockets asks of the interpreter."""

from __future__ import annotations

import gc

import pytest

from streamkv.engine.thread import FULL_COLLECTION_AFTER, make_full_collections_rare


@pytest.mark.parametrize("own", [10, 5000])
def test_full_collections_are_made_rarer_than_by_default_and_never_more_frequent(own: int):
    before = gc.get_threshold()
    gc.set_threshold(700, 10, own)
    try:
        make_full_collections_rare()
        assert gc.get_threshold() == (700, 10, max(own, FULL_COLLECTION_AFTER))
    finally:
        gc.set_threshold(*before)
