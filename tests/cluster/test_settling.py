"""The wait for a wish: what it shows, and how it ends."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from cluster.cluster_store import ClusterStore
from cluster.commands import settling
from cluster.commands.settling import Outcome, Settling
from tests.cluster.wanted_cluster import FakeController, WantedCluster, report
from tests.real_valkey import RealValkey


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


def waiter(wanted: WantedCluster, generation: int, shown: io.StringIO, *, terminal: bool = False) -> Settling:
    return Settling(wanted.store, generation, Console(file=shown, force_terminal=terminal, width=80))


def test_it_ends_when_reality_fits(wanted: WantedCluster, valkey: RealValkey, shown: io.StringIO) -> None:
    generation = wanted.up()
    with FakeController(valkey, takes_s=0.4):
        assert waiter(wanted, generation, shown).follow(10.0) is Outcome.SETTLED
    assert shown.getvalue().count("... decode-2: starting") == 1


def test_an_older_generation_is_not_what_was_asked_for(wanted: WantedCluster, shown: io.StringIO) -> None:
    generation = wanted.up()
    wanted.store.say(report(wanted.wish(), settled=True), ttl_s=30)
    assert waiter(wanted, generation + 1, shown).follow(0.3) is Outcome.TIMED_OUT
    assert shown.getvalue() == "  ... the controller takes it up\n"
    assert waiter(wanted, generation, shown).follow(0.3) is Outcome.SETTLED


def test_whoever_waits_may_leave(wanted: WantedCluster, shown: io.StringIO) -> None:
    assert waiter(wanted, wanted.up(), shown).follow(30.0, leave=lambda: True) is Outcome.LEFT


def test_a_silent_controller_is_told(
    wanted: WantedCluster, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "SILENT_AFTER_S", 0.1)
    assert waiter(wanted, wanted.up(), shown).follow(0.5) is Outcome.TIMED_OUT
    assert "the controller is silent; what was asked for stays" in shown.getvalue()


def test_a_terminal_has_one_line(wanted: WantedCluster, valkey: RealValkey, shown: io.StringIO) -> None:
    generation = wanted.up()
    with FakeController(valkey, takes_s=0.5):
        assert waiter(wanted, generation, shown, terminal=True).follow(10.0) is Outcome.SETTLED
    assert "decode-2: starting" in shown.getvalue()
    assert "  ..." not in shown.getvalue()


def test_a_redis_that_starts_again_is_waited_for(wanted: WantedCluster, valkey: RealValkey, shown: io.StringIO) -> None:
    generation = wanted.up()
    valkey.kill()

    def again() -> None:
        valkey.start()
        store = ClusterStore(valkey.url)
        wish = store.wish()
        assert wish is not None
        store.say(report(wish, settled=True), ttl_s=30)
        store.close()

    timer = threading.Timer(0.5, again)
    timer.start()
    began = time.process_time()
    assert waiter(wanted, generation, shown).follow(10.0) is Outcome.SETTLED
    assert time.process_time() - began < 2.0
    timer.join(10)
