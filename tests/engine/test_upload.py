from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.upload import ALIGNMENT, Download, offsets_of, upload, upload_together

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 50)))
def test_arrays_lie_in_order_aligned_without_overlap_and_without_waste(sizes: list[int]) -> None:
    starts = offsets_of(sizes)
    assert len(starts) == len(sizes) + 1
    assert starts[0] == 0
    for size, start, following in zip(sizes, starts, starts[1:], strict=False):
        assert following % ALIGNMENT == 0
        assert start + size <= following < start + size + ALIGNMENT


def test_arrays_of_any_shape_and_type_of_number_arrive_as_int32() -> None:
    arrays = [
        np.array([3, -1, 2**31 - 1], dtype=np.int64),
        np.zeros(0, dtype=np.int32),
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.arange(10, dtype=np.int16)[::2],
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
    ]
    there = upload_together(arrays, CPU)
    for tensor, array in zip(there, arrays, strict=True):
        assert tensor.dtype == torch.int32
        assert tuple(tensor.shape) == array.shape
        assert tensor.tolist() == array.tolist()
        assert tensor.is_contiguous()
    assert {tensor.untyped_storage().data_ptr() for tensor in there} == {there[0].untyped_storage().data_ptr()}


def test_nothing_is_uploaded_as_nothing() -> None:
    assert upload_together([], CPU) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[], [1, 2, 3], [[0.5], [2.5]]])
def test_numbers_become_a_tensor_of_the_type_asked_for(values: list[float], dtype: torch.dtype) -> None:
    found = upload(values, dtype, CPU)
    assert found.dtype == dtype
    assert torch.equal(found, torch.tensor(values, dtype=dtype))


def test_a_download_keeps_what_was_there_when_it_began() -> None:
    """The next step overwrites its choices before they are read."""
    tensor = torch.arange(6).view(3, 2)
    download = Download(tensor[:2])
    tensor.zero_()
    assert download.wait().tolist() == [[0, 1], [2, 3]]
