from __future__ import annotations

import time

import pytest

from kv_transfer.errors import PeerLostError
from kv_transfer.watch import Watch


def test_a_wait_within_its_bound_is_let_be() -> None:
    watch = Watch()
    watch.check()
    with watch.waiting("a piece", 30.0):
        watch.check()
    watch.check()


def test_a_wait_beyond_its_bound_is_named() -> None:
    watch = Watch()
    with watch.waiting("piece 7 of prefill/1", 0.01):
        time.sleep(0.02)
        with pytest.raises(PeerLostError, match=r"waited 0\.01 s for piece 7 of prefill/1"):
            watch.check()
    watch.check()


def test_each_wait_begins_anew() -> None:
    watch = Watch()
    for _ in range(4):
        with watch.waiting("a piece", 0.5):
            time.sleep(0.01)
            watch.check()


def test_a_wait_that_fails_is_over() -> None:
    watch = Watch()
    with pytest.raises(ValueError), watch.waiting("a piece", 0.001):
        raise ValueError
    time.sleep(0.01)
    watch.check()
