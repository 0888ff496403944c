"""The controller's mind against a real Valkey and a world without Ray."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.cluster_store import ClusterStore, Decision
from cluster.config import ClusterConfig, PoolConfig, ScalingConfig, to_plain
from cluster.members import Phase
from cluster.overseer import Overseer
from engine.config import ModelOptions
from tests.cluster.fake_hands import FakeHands
from tests.real_valkey import RealValkey


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """One controller after another over the same Redis and the same world."""

    def __init__(self, url: str) -> None:
        self.store = ClusterStore(url)
        self.hands = FakeHands()
        self.clock = Clock()
        self.overseer = self.new_life()

    def new_life(self) -> Overseer:
        self.overseer = Overseer(self.store, self.hands, on_gpu=False, clock=self.clock)
        self.overseer.take_up()
        return self.overseer

    def wish(self, config: ClusterConfig, *, turns: dict[str, int] | None = None, **sizes: int) -> None:
        wish = self.store.wish()
        wanted = {"prefill": config.prefill.workers, "decode": config.decode.workers, **sizes}
        decision = Decision(at=0.0, by="apply", what="test")
        self.store.change(wish.generation if wish else 0, decision, config=to_plain(config), sizes=wanted, turns=turns)

    def ticks(self, count: int = 30, step_s: float = 0.1) -> None:
        for _ in range(count):
            self.overseer.tick()
            self.clock.now += step_s

    def phases(self) -> dict[str, str]:
        return {member.member_id: member.phase.value for member in self.overseer.members}

    def ready(self, pool: str) -> int:
        return sum(it.pool == pool and it.phase is Phase.READY for it in self.overseer.members)

    @property
    def report(self) -> dict:
        report = self.store.report()
        assert report is not None
        return report


@pytest.fixture
def scene(valkey: RealValkey) -> Scene:
    return Scene(valkey.url)


def config(prefill: int = 1, decode: int = 1, tmp: Path | None = None, **more) -> ClusterConfig:
    return ClusterConfig(
        model=ModelOptions(path="demo"), prefill=PoolConfig(workers=prefill), decode=PoolConfig(workers=decode), **more
    )


def test_a_wish_becomes_true_and_is_told(scene: Scene) -> None:
    scene.wish(config(2, 1))
    scene.ticks()
    assert scene.phases() == dict.fromkeys(["prefill-0", "prefill-1", "decode-0", "router-0"], "ready")
    assert scene.report["settled"]
    assert scene.report["generation"] == 1
    assert scene.report["waiting"] == []
    assert scene.store.members() == {member.member_id: member for member in scene.overseer.members}
    assert scene.overseer.wait_ready("prefill-1", 0.1) == {"address": "prefill-1:1"}
    assert sum(entry.what.endswith(" started") for entry in scene.store.history()) == 4


def test_scaling_down_drains_the_idlest_first(scene: Scene) -> None:
    scene.wish(config(1, 3))
    scene.ticks()
    scene.hands.loads = {"decode-0": 4, "decode-1": 1, "decode-2": 7}
    scene.ticks(80)
    scene.wish(config(1, 2))
    scene.ticks()
    assert ("drain", "decode-1") in scene.hands.log
    assert set(scene.phases()) == {"prefill-0", "decode-0", "decode-2", "router-0"}


def test_a_new_life_goes_on_where_the_old_one_died(scene: Scene) -> None:
    scene.hands.stuck = {("start", "decode-1"), ("drain", "prefill-0")}
    scene.wish(config(2, 1))
    scene.ticks()
    scene.wish(config(1, 2))
    scene.hands.loads = {"prefill-1": 3}
    scene.hands.stuck.add(("role", "prefill-0"))
    scene.ticks(5)
    before = {member.member_id: member for member in scene.overseer.members}
    assert before["prefill-0"].pool == "decode"
    scene.hands.stuck.clear()
    scene.new_life()
    assert {member.member_id: member for member in scene.overseer.members} == before
    scene.ticks(100)
    assert scene.hands.roles["prefill-0"] == "decode"
    assert scene.report["settled"]
    assert (scene.ready("prefill"), scene.ready("decode")) == (1, 2)


@pytest.mark.parametrize("cut", range(1, 14))
def test_killed_at_any_tick_it_ends_as_wanted(scene: Scene, cut: int) -> None:
    scene.wish(config(1, 2, scaling=ScalingConfig(max_workers=3, role_change=False)))
    scene.ticks()
    scene.wish(config(2, 1, scaling=ScalingConfig(max_workers=3, role_change=False)))
    scene.ticks(cut)
    scene.new_life()
    scene.ticks()
    assert (scene.ready("prefill"), scene.ready("decode"), scene.report["settled"]) == (2, 1, True)
    assert scene.hands.most_workers == 3


def test_a_role_changes_under_a_full_budget_and_nobody_starts_anew(scene: Scene) -> None:
    scene.wish(config(2, 1, scaling=ScalingConfig(max_workers=3)))
    scene.ticks()
    starts = [entry for entry in scene.hands.log if entry[0] == "start"]
    scene.wish(config(1, 2, scaling=ScalingConfig(max_workers=3)))
    scene.ticks()
    assert (scene.ready("prefill"), scene.ready("decode")) == (1, 2)
    assert [entry for entry in scene.hands.log if entry[0] == "start"] == starts
    assert sorted(scene.hands.roles[name] for name in ("prefill-0", "prefill-1")) == ["decode", "prefill"]
    assert any(entry.what == "prefill-0 is decode now" for entry in scene.store.history())


def test_a_role_change_that_fails_is_made_good(scene: Scene) -> None:
    scene.wish(config(2, 1))
    scene.ticks()
    scene.hands.broken[("role", "prefill-0")] = RuntimeError("the front starts again")
    scene.wish(config(1, 2))
    scene.ticks(5)
    assert scene.hands.roles["prefill-0"] == "prefill"
    scene.hands.broken.clear()
    scene.ticks(120)
    assert scene.hands.roles["prefill-0"] == "decode"


def test_what_cannot_start_is_given_up_tried_again_later_and_told(scene: Scene) -> None:
    scene.wish(config(1, 1))
    scene.ticks()
    scene.hands.broken[("start", "decode-1")] = RuntimeError("no memory left")
    scene.wish(config(1, 2))
    scene.ticks(10)
    assert set(scene.phases()) == {"prefill-0", "decode-0", "router-0"}
    (text,) = scene.report["waiting"]
    assert "decode lacks 1" in text
    assert "no memory left" in text
    with pytest.raises(RuntimeError, match="no memory left"):
        scene.overseer.wait_ready("decode-1", 0.1)
    assert len([entry for entry in scene.hands.log if entry == ("start", "decode-1")]) == 1
    scene.hands.broken.clear()
    scene.ticks(60)
    assert scene.ready("decode") == 2
    assert scene.report["waiting"] == []


def test_without_a_node_it_waits_within_its_bound_and_holds_no_place(scene: Scene) -> None:
    scene.hands.room = 2
    scene.wish(config(1, 2, scaling=ScalingConfig(place_timeout_s=5.0)))
    scene.ticks(40)
    assert scene.phases()["decode-1"] == "placing"
    scene.ticks(20)
    assert "decode-1" not in scene.phases()
    assert any("no node with room" in text for text in scene.report["waiting"])
    scene.hands.room = 3
    scene.ticks(60)
    assert scene.ready("decode") == 2


def test_changed_settings_replace_one_after_the_other(scene: Scene) -> None:
    scene.wish(config(2, 2))
    scene.ticks()
    changed = ClusterConfig(
        model=ModelOptions(path="demo"), prefill=PoolConfig(workers=2), decode=PoolConfig(workers=2, threads=2)
    )
    scene.wish(changed)
    least = 2
    for _ in range(60):
        scene.ticks(1)
        least = min(least, scene.ready("decode"))
    assert least == 2
    assert scene.report["settled"]
    removed = [name for what, name in scene.hands.log if what == "remove"]
    assert sorted(removed) == ["decode-0", "decode-1"]
    assert len({member.digest for member in scene.overseer.members if member.pool == "decode"}) == 1


def test_a_turn_restarts_every_process_of_its_kind(scene: Scene) -> None:
    scene.wish(config(1, 1))
    scene.ticks()
    scene.wish(config(1, 1), turns={"router": 1, "decode": 1})
    scene.ticks(60)
    assert [entry for entry in scene.hands.log if entry[1] == "router-0"] == [
        ("start", "router-0"),
        ("drain", "router-0"),
        ("remove", "router-0"),
        ("start", "router-0"),
    ]
    assert ("remove", "decode-0") in scene.hands.log
    assert ("remove", "prefill-0") not in scene.hands.log
    assert scene.report["settled"]


def test_what_cannot_be_stopped_now_is_stopped_later_and_holds_nobody_back(scene: Scene) -> None:
    scene.wish(config(1, 2))
    scene.ticks()
    scene.hands.unremovable = True
    scene.wish(config(1, 1))
    scene.ticks(10)
    assert sorted(scene.phases().values()) == ["ready", "ready", "ready", "stopping"]
    scene.hands.unremovable = False
    scene.wish(config(1, 2))
    scene.ticks(10)
    assert scene.ready("decode") == 2


def test_a_drain_that_does_not_end_is_ended(scene: Scene) -> None:
    scene.wish(config(1, 2, drain_s=2.0))
    scene.ticks()
    scene.hands.stuck = {("drain", "decode-0")}
    scene.wish(config(1, 1, drain_s=2.0))
    scene.ticks(100)
    assert scene.phases()["decode-0"] == "draining"
    scene.ticks(100)
    assert "decode-0" not in scene.phases()
    assert any("not to its end" in entry.what for entry in scene.store.history())


def test_a_wish_that_cannot_be_used_leaves_the_old_one(scene: Scene) -> None:
    scene.wish(config(1, 1))
    scene.ticks()
    scene.store.change(1, Decision(at=0.0, by="apply", what="bad"), config={"mode": "sideways"})
    scene.ticks()
    assert scene.report["generation"] == 1
    assert len(scene.phases()) == 3


def test_without_redis_nothing_is_begun_and_nothing_ends(scene: Scene, valkey: RealValkey) -> None:
    scene.wish(config(1, 1))
    scene.ticks()
    log = list(scene.hands.log)
    valkey.kill()
    scene.ticks(3)
    assert scene.hands.log == log
    valkey.start()
    scene.wish(config(1, 2))
    scene.ticks()
    assert scene.ready("decode") == 2


def test_who_waits_for_a_member_is_woken(scene: Scene) -> None:
    scene.wish(config(1, 1))
    told: list[dict] = []
    waiter = threading.Thread(target=lambda: told.append(scene.overseer.wait_ready("decode-0", 10.0)))
    waiter.start()
    scene.ticks()
    waiter.join(5.0)
    assert told == [{"address": "decode-0:1"}]
    assert scene.new_life().wait_ready("decode-0", 0.1) == {}
    with pytest.raises(TimeoutError, match="not there any more"):
        scene.overseer.wait_ready("decode-9", 0.05)


def test_nodes_are_a_budget_too(scene: Scene) -> None:
    scene.hands.free_nodes = ["a", "b", "c", "b", "c"]
    scene.wish(config(1, 3, scaling=ScalingConfig(max_nodes=2, place_timeout_s=3.0)))
    scene.ticks(20)
    assert set(scene.hands.placed.values()) == {"a", "b"}
    assert (scene.ready("prefill"), scene.ready("decode")) == (1, 2)
    assert "placing" in scene.phases().values()
    scene.new_life()
    scene.ticks(60)
    assert set(scene.hands.placed.values()) == {"a", "b"}
    scene.hands.free_nodes.append("a")
    scene.ticks(150)
    assert scene.ready("decode") == 3
    assert set(scene.hands.placed.values()) == {"a", "b"}
