from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from kv_transfer.errors import TransportError
from kv_transfer.rendezvous import MAX_KEYS, pair_store


def test_a_value_reaches_the_other_end() -> None:
    there = pair_store(lambda key, value: None, 5.0)
    here = pair_store(there.put, 5.0)
    timer = threading.Timer(0.05, here.set, ["k", "value"])
    timer.start()
    there.wait(["k"], timedelta(seconds=5))
    timer.join()
    assert there.get("k") == b"value" == here.get("k")
    assert there.check(["k"])
    assert not there.check(["k", "other"])


def test_a_wait_is_bounded_and_names_what_is_missing() -> None:
    store = pair_store(lambda key, value: None, 0.05)
    store.put("a", b"")
    with pytest.raises(TransportError, match=r"waited 0\.05 s for the other end to set b"):
        store.wait(["a", "b"])


def test_closing_wakes_a_wait() -> None:
    store = pair_store(lambda key, value: None, 30.0)
    timer = threading.Timer(0.05, store.close, ["peer lost"])
    timer.start()
    start = time.monotonic()
    with pytest.raises(TransportError, match="the rendezvous with the other end ended: peer lost"):
        store.get("k")
    timer.join()
    assert time.monotonic() - start < 10
    store.close("its thread ended")
    with pytest.raises(TransportError, match="the rendezvous with the other end ended: peer lost"):
        store.wait(["k"])


def test_a_peer_cannot_fill_the_memory() -> None:
    store = pair_store(lambda key, value: None, 1.0)
    for number in range(MAX_KEYS):
        store.put(str(number), b"")
    store.put("0", b"again")
    with pytest.raises(TransportError, match="misbehaves"):
        store.put("one more", b"")


def test_others_hear_of_its_end_even_if_they_ask_late() -> None:
    store, heard = pair_store(lambda key, value: None, 5.0), threading.Event()
    store.when_closed(heard.set)
    assert not heard.is_set()
    store.close("the pair was closed")
    assert heard.is_set()
    late = threading.Event()
    store.when_closed(late.set)
    assert late.is_set()
