"""Filter, score and pick, on workers that exist only as information."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from protos import worker_pb2
from router.info import WorkerInfo, WorkerState
from router.policies import Demand, choose

DEMAND = Demand(num_tokens=100)


def worker(worker_id: str, role: str, state: WorkerState = WorkerState.READY, **known: Any) -> WorkerInfo:
    layout = worker_pb2.Layout(model_hash=known.pop("model_hash", "m"), num_layers=2, block_size=16, dtype="float32")
    description = worker_pb2.WorkerDescription(
        layout=layout, num_blocks=known.pop("num_blocks", 100), max_model_len=4096, max_running=10
    )
    info = WorkerInfo(worker_id, 1, role, "x:1", state=state, connection=1, description=description)
    info.stats.CopyFrom(worker_pb2.WorkerStats(num_blocks=100, free_blocks=100, **known))
    return info


def picked(workers: list[WorkerInfo], demand: Demand = DEMAND, **choice: Any) -> tuple[str | None, str] | None:
    route = choose(workers, demand, **{"split": True, "policy": "least_loaded", "turn": 0, **choice})
    return None if route is None else (route.prefill.worker_id if route.prefill else None, route.decode.worker_id)


def test_only_ready_workers_of_the_role_are_used() -> None:
    workers = [
        worker("p0", "prefill", WorkerState.DRAINING),
        worker("p1", "prefill"),
        worker("d0", "decode", WorkerState.LOST),
        worker("d1", "decode"),
    ]
    assert picked(workers) == ("p1", "d1")
    assert picked(workers[:3]) is None
    assert picked(workers[2:]) is None
    assert picked(workers, split=False) == (None, "d1")


def test_worker_too_small_for_the_request_is_left_out() -> None:
    workers = [worker("p0", "prefill"), worker("d0", "decode", num_blocks=6), worker("d1", "decode", num_blocks=7)]
    for turn in range(3):
        assert picked(workers, turn=turn) == ("p0", "d1")


def test_least_loaded_by_batch_blocks_and_waiting_tokens() -> None:
    workers = [
        worker("p0", "prefill", waiting_tokens=500),
        worker("p1", "prefill", waiting_tokens=20),
        worker("d0", "decode", num_running=5),
        worker("d1", "decode", num_running=1, num_reserved=1),
    ]
    assert picked(workers) == ("p1", "d1")
    workers[3].stats.free_blocks = 10
    assert picked(workers) == ("p1", "d0")


def test_own_requests_count_before_statistics_tell_of_them() -> None:
    workers = [worker("p0", "prefill"), worker("p1", "prefill"), worker("d0", "decode"), worker("d1", "decode")]
    with workers[0].prefilling(100), workers[2].decoding():
        assert picked(workers) == ("p1", "d1")
    assert picked(workers) == ("p0", "d0")


def test_round_robin_takes_turns_whatever_the_load() -> None:
    workers = [worker(f"d{index}", "decode", num_running=index) for index in range(3)]
    counts = Counter(picked(workers, split=False, policy="round_robin", turn=turn) for turn in range(9))
    assert set(counts.values()) == {3}


def test_excluded_full_and_avoided() -> None:
    workers = [worker("d0", "decode"), worker("d1", "decode")]
    first, second = (frozenset({info.life}) for info in workers)
    for kind in ("excluded", "full", "avoided"):
        assert picked(workers, Demand(1, **{kind: first}), split=False) == (None, "d1")
    both = first | second
    assert picked(workers, Demand(1, excluded=both), split=False) is None
    assert picked(workers, Demand(1, full=both), split=False) is None
    assert picked(workers, Demand(1, avoided=both), split=False) == (None, "d0")
    workers[0].connection += 1
    assert picked(workers, Demand(1, excluded=both), split=False) == (None, "d0")


def test_pair_must_share_a_layout() -> None:
    workers = [
        worker("p0", "prefill", model_hash="new"),
        worker("d0", "decode"),
        worker("d1", "decode", model_hash="new"),
    ]
    assert picked(workers) == ("p0", "d1")
    assert picked(workers[:2]) is None


def test_workers_of_both_roles() -> None:
    alone = [worker("w0", "both")]
    assert picked(alone) == (None, "w0")
    for turn in range(4):
        route = picked([worker("w0", "both"), worker("w1", "both")], turn=turn)
        assert route is not None
        assert set(route) == {"w0", "w1"}


loads = st.lists(st.tuples(st.sampled_from(["prefill", "decode", "both"]), st.integers(0, 50)), max_size=6)


@given(
    loads=loads, turn=st.integers(0, 100), split=st.booleans(), policy=st.sampled_from(["round_robin", "least_loaded"])
)
def test_route_exists_exactly_when_the_roles_are_there(
    loads: list[tuple[str, int]], turn: int, split: bool, policy: str
) -> None:
    workers = [worker(f"w{index}", role, num_running=load) for index, (role, load) in enumerate(loads)]
    route = picked(workers, split=split, policy=policy, turn=turn)
    can_decode = any(info.can_decode for info in workers)
    can_prefill = any(info.can_prefill for info in workers)
    assert (route is not None) == (can_decode and (can_prefill or not split))
    if route is not None and split:
        assert route[0] is not None or len([info for info in workers if info.can_prefill]) == 1
