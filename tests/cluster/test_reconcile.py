"""What the controller does next, decided purely; driven to its end against a world in which things fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.members import Member, Phase
from cluster.reconcile import Cancel, ChangeRole, Drain, Plan, Start, Want, after, is_settled, plan

NEW = {"prefill": "p1", "decode": "d1", "router": "r1"}


def want(prefill: int = 1, decode: int = 1, routers: int = 1, **more) -> Want:
    return Want(**{"sizes": {"prefill": prefill, "decode": decode}, "routers": routers, "digests": NEW, **more})


def worker(name: str, pool: str = "", phase: Phase = Phase.READY, digest: str = "", gpus: float = 0.0) -> Member:
    born = name.partition("-")[0]
    return Member(
        member_id=name,
        kind="worker",
        pool=pool or born,
        born=born,
        phase=phase,
        digest=digest or NEW[born],
        gpus=gpus,
    )


def router(number: int, phase: Phase = Phase.READY, digest: str = NEW["router"]) -> Member:
    return Member(member_id=f"router-{number}", kind="router", pool="", born="", phase=phase, digest=digest)


def actions(wanted: Want, *members: Member, **more) -> list[object]:
    return plan(wanted, members, **more).actions


def test_an_empty_cluster_gets_all_it_wants():
    assert [(type(it), it.member_id) for it in actions(want(2, 1, 2))] == [
        (Start, "prefill-0"),
        (Start, "prefill-1"),
        (Start, "decode-0"),
        (Start, "router-0"),
        (Start, "router-1"),
    ]


def test_a_cluster_as_wanted_is_left_alone_and_settled():
    there = [worker("prefill-0"), worker("decode-0"), router(0)]
    assert plan(want(), there) == Plan([], [])
    assert is_settled(want(), there)
    assert not is_settled(want(decode=2), there)
    assert not is_settled(want(), [*there[:2], router(0, Phase.STARTING)])


def test_the_idlest_of_a_surplus_drains():
    there = [worker("prefill-0"), worker("decode-0"), worker("decode-1"), worker("decode-2"), router(0)]
    found = actions(want(), *there, load={"decode-0": 5.0, "decode-1": 9.0, "decode-2": 7.0})
    assert [(type(it), it.member_id) for it in found] == [(Drain, "decode-0"), (Drain, "decode-2")]


def test_of_a_surplus_those_that_never_served_go_first():
    there = [worker("prefill-0"), worker("decode-0"), worker("decode-1", phase=Phase.STARTING), router(0)]
    assert actions(want(), *there) == [Cancel("decode-1", "decode is to have 1")]


def test_a_worker_too_many_here_and_one_too_few_there_changes_its_role():
    there = [worker("prefill-0"), worker("prefill-1"), worker("decode-0"), router(0)]
    (found,) = actions(want(1, 2, can_change_role=True), *there, load={"prefill-0": 1.0})
    assert found == ChangeRole("prefill-1", "decode", "prefill has one too many, decode lacks one")
    changed = after(found, there[1], want())
    assert (changed.pool, changed.born, changed.digest) == ("decode", "prefill", "p1")
    assert is_settled(want(1, 2), [there[0], changed, there[2], router(0)])
    assert [type(it) for it in actions(want(1, 2), *there)] == [Drain, Start]


def test_who_was_born_in_the_other_pool_goes_back_first():
    there = [worker("prefill-0"), worker("decode-0", pool="prefill"), worker("decode-1"), router(0)]
    (found,) = actions(want(1, 2, can_change_role=True), *there, load={"decode-0": 9.0})
    assert found.member_id == "decode-0"


def test_a_budget_that_is_full_lets_one_go_before_the_other_comes():
    there = [worker("prefill-0", gpus=1.0), worker("prefill-1", gpus=1.0), worker("decode-0", gpus=1.0), router(0)]
    wanted = want(1, 2, max_gpus=3.0, gpus={"prefill": 1.0, "decode": 1.0})
    found = plan(wanted, there)
    assert found.actions == [Drain("prefill-0", "prefill is to have 1")]
    assert found.waiting == ["decode lacks 1: it needs 1 GPUs, and 3 of a budget of 3 are in use"]
    there[0] = replace(there[0], phase=Phase.STOPPING)
    assert plan(wanted, there).actions == []
    assert [type(it) for it in plan(wanted, there[1:]).actions] == [Start]


def test_what_failed_to_start_is_not_tried_again_at_once():
    found = plan(want(1, 2), [worker("prefill-0"), worker("decode-0"), router(0)], held_back={"decode": "no node"})
    assert found == Plan([], ["decode lacks 1: no node"])


def test_old_settings_are_replaced_one_at_a_time_the_new_one_first():
    old = [worker("decode-0", digest="d0"), worker("decode-1", digest="d0")]
    there = [worker("prefill-0"), *old, router(0)]
    (found,) = actions(want(1, 2), *there)
    assert (type(found), found.member_id) == (Start, "decode-2")
    coming = worker("decode-2", phase=Phase.STARTING)
    assert actions(want(1, 2), *there, coming) == []
    (found,) = actions(want(1, 2), *there, worker("decode-2"))
    assert found == Drain("decode-0", "its settings have changed")
    going = replace(old[0], phase=Phase.DRAINING)
    assert actions(want(1, 2), there[0], going, old[1], worker("decode-2"), router(0)) == []


def test_without_room_for_one_more_an_old_one_goes_first_but_never_the_last():
    tight = want(1, 2, max_workers=3)
    there = [worker("prefill-0"), worker("decode-0", digest="d0"), worker("decode-1", digest="d0"), router(0)]
    (found,) = actions(tight, *there)
    assert isinstance(found, Drain)
    found = plan(want(1, 1, max_workers=2), [there[0], there[1], router(0)])
    assert found.actions == []
    assert "decode-0 is to be replaced" in found.waiting[0]
    assert "budget of 2" in found.waiting[0]


def test_nothing_goes_while_a_replacement_cannot_come():
    there = [worker("prefill-0"), worker("decode-0", digest="d0"), worker("decode-1", digest="d0"), router(0)]
    assert actions(want(1, 2), *there, held_back={"decode": "the last one failed"}) == []


def test_old_settings_that_never_served_are_cancelled():
    there = [worker("prefill-0"), worker("decode-0", phase=Phase.STARTING, digest="d0"), router(0)]
    found = actions(want(), *there)
    assert [(type(it), it.member_id) for it in found] == [(Cancel, "decode-0"), (Start, "decode-1")]


def test_a_changed_role_keeps_the_settings_of_its_birth():
    assert actions(want(), worker("prefill-0"), worker("prefill-1", pool="decode"), router(0)) == []


def test_routers_are_replaced_one_after_the_other_each_on_its_port():
    base = [worker("prefill-0"), worker("decode-0")]
    assert actions(want(routers=2), *base, router(0, digest="r0"), router(1, digest="r0")) == [
        Drain("router-0", "its settings have changed")
    ]
    assert actions(want(routers=2), *base, router(0, Phase.DRAINING, "r0"), router(1, digest="r0")) == []
    (found,) = actions(want(routers=2), *base, router(1, digest="r0"))
    assert (type(found), found.member_id) == (Start, "router-0")
    assert actions(want(routers=2), *base, router(0, Phase.STARTING), router(1, digest="r0")) == []
    assert actions(want(routers=2), *base, router(0), router(1, digest="r0")) == [
        Drain("router-1", "its settings have changed")
    ]
    assert actions(want(routers=1), *base, router(0), router(1)) == [Drain("router-1", "1 routers are wanted")]


class World:
    """Carries out what is planned; steps end, or fail, when the test says so."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.most_workers = 0
        self.most_gpus = 0.0

    def act(self, wanted: Want) -> None:
        for action in plan(wanted, list(self.members.values())).actions:
            assert isinstance(action, Start) != (action.member_id in self.members)
            self.members[action.member_id] = after(action, self.members.get(action.member_id), wanted)
        workers = [it for it in self.members.values() if it.kind == "worker"]
        self.most_workers = max(self.most_workers, len(workers))
        self.most_gpus = max(self.most_gpus, sum(it.gpus for it in workers))

    def move(self, name: str, *, fails: bool) -> None:
        member = self.members[name]
        if member.phase is Phase.STOPPING:
            del self.members[name]
        elif member.phase is Phase.DRAINING or (fails and member.phase is not Phase.READY):
            self.members[name] = replace(member, phase=Phase.STOPPING)
        elif member.phase is Phase.PLACING:
            self.members[name] = replace(member, phase=Phase.STARTING)
        elif member.phase is Phase.STARTING:
            self.members[name] = replace(member, phase=Phase.READY)

    def ready(self, pool: str) -> int:
        return sum(it.pool == pool and it.phase is Phase.READY for it in self.members.values())


sizes = st.integers(1, 4)


@settings(max_examples=150, deadline=None)
@given(
    wishes=st.lists(st.tuples(sizes, sizes, st.integers(1, 2), st.sampled_from("ab")), min_size=1, max_size=4),
    max_workers=st.integers(2, 9) | st.none(),
    can_change_role=st.booleans(),
    luck=st.randoms(use_true_random=False),
)
def test_any_change_ends_as_wanted_within_the_budget_and_never_without_a_server(
    wishes, max_workers, can_change_role, luck
):
    world = World()
    served = False
    for prefill, decode, routers, settings_name in wishes:
        if max_workers is not None and prefill + decode > max_workers:
            continue
        wanted = want(
            prefill,
            decode,
            routers,
            digests={name: f"{name}{settings_name}" for name in NEW},
            gpus={"prefill": 1.0, "decode": 2.0},
            max_workers=max_workers,
            can_change_role=can_change_role,
        )
        for _ in range(luck.randint(0, 30)):
            world.act(wanted)
            if world.members:
                world.move(luck.choice(sorted(world.members)), fails=luck.random() < 0.2)
            if served:
                assert min(world.ready("prefill"), world.ready("decode")) >= 1
            served = served or min(world.ready("prefill"), world.ready("decode")) >= 1
        last = wanted
    if not world.members:
        return
    for _ in range(400):
        world.act(last)
        if is_settled(last, list(world.members.values())):
            break
        for name in sorted(world.members):
            world.move(name, fails=False)
    else:
        waiting = plan(last, list(world.members.values())).waiting
        assert any("is to be replaced" in text and "budget" in text for text in waiting), waiting
    if max_workers is not None:
        assert world.most_workers <= max_workers


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.STOPPING])
def test_what_goes_still_counts_against_the_budget(phase):
    there = [worker("prefill-0"), worker("decode-0"), worker("decode-1", phase=phase), router(0)]
    found = plan(want(1, 2, max_workers=3), there)
    assert found.actions == []
    assert any("budget of 3" in text for text in found.waiting)
