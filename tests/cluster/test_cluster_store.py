"""What outlives the controller, in a real Valkey."""

from __future__ import annotations

import threading

import pytest

from cluster.cluster_store import ClusterStore, ClusterStoreError, Decision, WishChangedError
from cluster.members import Member, Phase
from tests.real_valkey import RealValkey


@pytest.fixture
def url(valkey: RealValkey) -> str:
    return valkey.url


def decision(what: str, by: str = "up") -> Decision:
    return Decision(at=1.0, by=by, what=what, reason="because", details={"load": 0.5})


def test_a_wish_is_changed_only_by_who_read_it(url):
    store = ClusterStore(url)
    assert store.wish() is None
    first = store.change(0, decision("up"), config={"mode": "split"}, sizes={"prefill": 1, "decode": 1})
    second = store.change(first, decision("decode 1 -> 2", "scale"), sizes={"prefill": 1, "decode": 2})
    with pytest.raises(WishChangedError):
        store.change(first, decision("late"), sizes={"prefill": 9, "decode": 9})
    wish = store.wish()
    assert (wish.generation, wish.sizes, wish.config, wish.by) == (
        second,
        {"prefill": 1, "decode": 2},
        {"mode": "split"},
        "scale",
    )
    assert [entry.what for entry in store.history()] == ["decode 1 -> 2", "up"]
    assert store.history(1)[0] == decision("decode 1 -> 2", "scale")
    store.close()


def test_members_come_back_as_they_were(url):
    store = ClusterStore(url)
    member = Member(
        member_id="decode-0", kind="worker", pool="decode", born="prefill", phase=Phase.DRAINING, digest="abc", gpus=2.0
    )
    store.put(member)
    assert store.members() == {"decode-0": member}
    store.drop("decode-0")
    assert store.members() == {}
    store.close()


def test_a_waiter_is_woken_by_a_change(url):
    waiting, writing = ClusterStore(url), ClusterStore(url)
    waiting.wait(0.05)
    threading.Timer(0.1, lambda: writing.note(decision("x"))).start()
    assert any(waiting.wait(1.0) for _ in range(5))
    waiting.close()
    writing.close()


def test_a_report_is_forgotten_after_its_time(url):
    store = ClusterStore(url)
    store.say({"state": "deployed"}, ttl_s=60.0)
    assert store.report()["state"] == "deployed"
    store.forget()
    assert store.report() is None
    store.close()


def test_silence_has_an_error_with_a_name():
    store = ClusterStore("redis://127.0.0.1:1/0", timeout_s=0.2)
    with pytest.raises(ClusterStoreError, match="read the wish"):
        store.wish()
    store.close()
