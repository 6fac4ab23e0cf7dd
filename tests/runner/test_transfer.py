"""Arrays that go to the device together come apart as they were."""

from __future__ import annotations

import numpy as np
import torch

from streamkv.runner.transfer import packed, upload


def test_arrays_of_any_kind_are_packed_and_come_apart() -> None:
    arrays = [
        np.arange(5),
        np.array([[1.5, -2.0, 0.25]], np.float32),
        np.zeros(0, np.int32),
        np.array([True, False, True]),
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.array([1e300, np.nan]),
    ]
    whole, parts = packed(arrays)
    assert len(whole) % 16 == 0
    for array, (begin, end, dtype, shape) in zip(arrays, parts, strict=True):
        assert begin % 16 == 0
        assert np.array_equal(whole[begin:end].view(dtype).view(shape).numpy(), array, equal_nan=array.dtype.kind == "f")


def test_on_a_processor_they_stay_where_they_are() -> None:
    array = np.arange(6).reshape(2, 3)
    first, second = upload([array, array.T], torch.device("cpu"))
    assert first.data_ptr() == array.ctypes.data
    assert second.is_contiguous()
    assert second.tolist() == array.T.tolist()
