"""What others hang onto the ranks: orders and hooks in their place among the steps, and reports."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.batch import LayerHook, OnLayer, StepPlan
from engine.errors import EngineError
from engine.follower import Follower
from engine.loop import EngineLoop
from engine.ranks import GroupState, LeadingRunner, RankGroup
from engine.sequence import Sequence
from tests.engine.ranked import CPU, TIMEOUT_S
from tests.engine.toy import ToyRunner, expected_answer, make_request, make_scheduler

SIZE = 3


class ToyRanks:
    """A loop over toys at several ranks: no model, but real sockets."""

    def __init__(self, path: str, run_ahead: int) -> None:
        self.group = RankGroup(path, SIZE, timeout_s=5.0)
        self.followers = [Follower(path, rank, SIZE, timeout_s=5.0) for rank in range(1, SIZE)]
        self._threads = ThreadPoolExecutor(SIZE)
        self.futures = [self._threads.submit(self._follow, each, run_ahead) for each in self.followers]
        self.group.connect(CPU)
        self.group.settle()
        self.toy = ToyRunner(16, 4, run_ahead)
        self.loop = EngineLoop(make_scheduler(16), LeadingRunner(self.toy, self.group))
        self.outputs: queue.SimpleQueue = queue.SimpleQueue()
        self.loop.on_step = lambda emitted: [self.outputs.put(output) for _, output in emitted]

    def _follow(self, follower: Follower, run_ahead: int) -> None:
        try:
            follower.connect(CPU)
            follower.serve(ToyRunner(16, 4, run_ahead))
        finally:
            follower.close()

    def answer(self, name: str, prompt: list[int]) -> list[int]:
        sequence = Sequence.from_request(make_request(name, prompt), 0.0)
        self.loop.call(lambda: self.loop.scheduler.add(sequence)).result(TIMEOUT_S)
        tokens: list[int] = []
        while True:
            output = self.outputs.get(timeout=TIMEOUT_S)
            tokens += output.token_ids
            if output.finish_reason is not None:
                return tokens

    def close(self) -> None:
        self.loop.stop(TIMEOUT_S)
        self.group.close()
        for future in self.futures:
            future.exception(TIMEOUT_S)
        self._threads.shutdown()


@pytest.fixture(params=[0, 1], ids=["in step", "run ahead"])
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ToyRanks]:
    made = ToyRanks(str(tmp_path / "r.sock"), request.param)
    yield made
    made.close()


def test_orders_and_hooks_come_in_their_place_at_every_rank(ranks: ToyRanks) -> None:
    heard: list[list[object]] = [[] for _ in ranks.followers]
    threads: list[set[str]] = [set() for _ in ranks.followers]
    ours: list[int] = []

    def listen(index: int, follower: Follower) -> None:
        def on_order(payload: bytes) -> None:
            threads[index].add(threading.current_thread().name)
            heard[index].append(("order", payload))

        def make_hook(note: bytes) -> OnLayer | None:
            threads[index].add(threading.current_thread().name)
            heard[index].append(("note", note))
            return lambda layer, _event: heard[index].append(("layer", layer))

        follower.on_order, follower.make_hook = on_order, make_hook

    for index, follower in enumerate(ranks.followers):
        listen(index, follower)
    steps: list[StepPlan] = []

    def step_hook(plan: StepPlan) -> LayerHook | None:
        steps.append(plan)
        number = len(steps)
        ranks.group.order(b"before %d" % number)
        if number % 3 == 0:
            return None
        return LayerHook(lambda layer, _event: ours.append(layer), b"step %d" % number if number % 3 == 1 else b"")

    ranks.loop.step_hook = step_hook
    ranks.loop.start()
    assert ranks.answer("a", [1, 2, 3]) == expected_answer([1, 2, 3], 8)
    ranks.loop.call(lambda: ranks.group.order(b"the last")).result(TIMEOUT_S)
    ranks.close()
    wanted: list[object] = []
    for number in range(1, len(steps) + 1):
        wanted.append(("order", b"before %d" % number))
        if number % 3 == 1:
            wanted += [("note", b"step %d" % number), ("layer", 0)]
    assert heard == [[*wanted, ("order", b"the last")]] * len(ranks.followers)
    assert [len(names) for names in threads] == [1] * len(threads)
    assert len(ours) == len([number for number in range(1, len(steps) + 1) if number % 3])


def test_reports_say_which_rank_they_are_of(ranks: ToyRanks) -> None:
    reports: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
    ranks.group.on_report = lambda rank, payload: reports.put((rank, payload))
    ranks.loop.start()
    for follower in ranks.followers:
        follower.report(b"of %d" % follower.rank)
        assert reports.get(timeout=TIMEOUT_S) == (follower.rank, b"of %d" % follower.rank)


def test_a_rank_that_was_asked_to_end_asks_rank_0(ranks: ToyRanks) -> None:
    leaving: queue.SimpleQueue[int] = queue.SimpleQueue()
    ranks.group.on_leave = leaving.put
    ranks.loop.start()
    ranks.followers[1].leave()
    assert leaving.get(timeout=TIMEOUT_S) == 2


def test_an_order_that_cannot_be_followed_ends_the_epoch_with_its_reason(ranks: ToyRanks) -> None:
    def refuse(_payload: bytes) -> None:
        raise ValueError("nonsense")

    lost: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    ranks.group.on_lost = lambda rank, reason: lost.put((rank, reason))
    ranks.followers[1].on_order = refuse
    ranks.loop.start()
    ranks.group.order(b"this")
    rank, reason = lost.get(timeout=TIMEOUT_S)
    assert rank == 2
    assert "rank 2 cannot go on: ValueError: nonsense" in reason
    assert ranks.group.state is GroupState.LOST
    ranks.group.order(b"dropped")


class Reading:
    """A toy whose steps note when they are read, and may have failed."""

    def __init__(self, heard: list[str], run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self._heard = heard
        self._num_launched = 0

    def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> Reading:
        self._num_launched += 1
        return self

    def result(self) -> None:
        self._heard.append("read")
        raise EngineError("logits that are not numbers")


def test_a_failed_step_is_read_everywhere_before_its_blocks_have_new_owners(tmp_path: Path) -> None:
    """Reading is what cleans the blocks; rank 0 launches nothing more for a while."""
    group = RankGroup(str(tmp_path / "r.sock"), 2, timeout_s=5.0)
    follower = Follower(str(tmp_path / "r.sock"), 1, 2, timeout_s=5.0)
    heard: list[str] = []
    done = threading.Event()

    def on_order(payload: bytes) -> None:
        heard.append(payload.decode())
        done.set()

    def follow() -> None:
        follower.connect(CPU)
        follower.serve(Reading(heard, 1))  # type: ignore[arg-type]

    follower.on_order = on_order
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(follow)
        group.connect(CPU)
        loop = EngineLoop(make_scheduler(16), LeadingRunner(Reading([], 1), group))  # type: ignore[arg-type]
        loop.scheduler.add(Sequence.from_request(make_request("a", [1], max_tokens=1), 0.0))
        assert loop.step()
        assert loop.step()
        group.order(b"these blocks are granted")
        assert done.wait(TIMEOUT_S)
        assert heard == ["read", "these blocks are granted"]
        group.close()
        future.result(TIMEOUT_S)
    follower.close()


def test_a_step_that_hangs_ends_the_epoch(tmp_path: Path) -> None:
    """On a GPU nothing else would end it."""
    release = threading.Event()
    ranks = ToyRanks(str(tmp_path / "r.sock"), 0)
    lost: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    ranks.group.on_lost = lambda rank, reason: lost.put((rank, reason))

    class Hanging:
        run_ahead = 0

        def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> Hanging:
            return self

        def result(self) -> None:
            release.wait(TIMEOUT_S)
            raise RuntimeError("released")

    ranks.loop._runner = LeadingRunner(Hanging(), ranks.group, step_timeout_s=0.4)
    ranks.loop.start()
    sequence = Sequence.from_request(make_request("a", [1]), 0.0)
    ranks.loop.post(lambda: ranks.loop.scheduler.add(sequence))
    assert "a step was not done after 0.4 s" in lost.get(timeout=TIMEOUT_S)[1]
    release.set()
    ranks.close()
