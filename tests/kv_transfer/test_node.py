"""Whole transfers between two nodes."""

from __future__ import annotations

import pytest
import torch

from tests.kv_transfer.conftest import Two, offer, send_all, slots


def test_kv_arrives(two: Two) -> None:
    delivery = offer(two.receiver, 21, [9, 4, 30])
    send_all(two.sender, delivery, [1, 2, 3])
    received = delivery.assert_delivered()
    two.assert_same([1, 2, 3], [9, 4, 30], 0, 21)
    assert received.num_bytes == 21 * 3 * 2 * 2 * 4 * 4
    assert list(received.first.token_ids) == [7]
    assert received.busy_s > 0
    assert received.tail_s >= 0
    untouched = sorted(set(range(two.target.kv.shape[2])) - set(slots([9, 4, 30], 0, 21)))
    assert not two.target.kv[:, :, untouched].any(), "only the ticket's slots may be written"


@pytest.mark.parametrize("num_tokens", [9, 16, 40])
def test_tokens_the_receiver_holds_do_not_travel(two: Two, num_tokens: int) -> None:
    source = [5, 6, 7, 8, 1]
    delivery = offer(two.receiver, num_tokens, range(20, 20 + (num_tokens - 1) // 8), first_token=8)
    send_all(two.sender, delivery, source, chunks=[1, num_tokens - 9] if num_tokens > 9 else [1])
    received = delivery.assert_delivered()
    two.assert_same(source, list(delivery.ticket.block_ids), 8, num_tokens)
    assert received.num_bytes == (num_tokens - 8) * 3 * 64
    assert torch.count_nonzero(two.target.kv).item() == received.num_bytes // 4
