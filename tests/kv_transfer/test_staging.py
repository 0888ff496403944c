from __future__ import annotations

import pytest
import torch

from kv_transfer.errors import ProtocolError, TransferIntegrityError
from kv_transfer.staging import StagingPool, as_piece, slots_of
from tests.kv_transfer.conftest import LAYOUT


def test_the_quota_bounds_what_is_lent() -> None:
    pool = StagingPool(quota_bytes=100, piece_bytes=40)
    first, second = pool.acquire(40), pool.acquire(10)
    assert first is not None
    assert second is not None
    assert pool.acquire(10) is None
    pool.release(first)
    assert pool.acquire(30) is first
    assert pool.num_lent == 2


def test_a_larger_piece_takes_the_place_of_free_buffers() -> None:
    pool = StagingPool(quota_bytes=100, piece_bytes=40)
    buffers = [pool.acquire(40), pool.acquire(40)]
    for buffer in buffers:
        assert buffer is not None
        pool.release(buffer)
    large = pool.acquire(90)
    assert large is not None
    assert large.numel() == 90
    assert pool.acquire(1) is None


def test_a_piece_over_the_quota_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="does not fit"):
        StagingPool(quota_bytes=100, piece_bytes=40).acquire(101)


def test_a_buffer_is_released_once() -> None:
    pool = StagingPool(quota_bytes=100, piece_bytes=40)
    buffer = pool.acquire(1)
    assert buffer is not None
    pool.release(buffer)
    with pytest.raises(TransferIntegrityError, match="twice"):
        pool.release(buffer)


def test_bytes_and_pieces_are_two_views_of_one_memory() -> None:
    data = torch.zeros(2 * 5 * LAYOUT.bytes_per_token_layer, dtype=torch.uint8)
    piece = as_piece(data, LAYOUT, 2, 5, 2)
    assert piece.shape == (2, 2, 5, 2, 4)
    piece[1, 1, 4, 1, 3] = 1.0
    assert data[-4:].any()
    assert not data[:-4].any()


def test_slots_follow_the_blocks() -> None:
    assert slots_of([5, 2], 4, 0, 6).tolist() == [20, 21, 22, 23, 8, 9]
    assert slots_of((5, 2, 7), 4, 3, 2).tolist() == [23, 8]
    assert slots_of([5, 2, 7], 4, 5, 7).tolist() == [9, 10, 11, 28, 29, 30, 31]
