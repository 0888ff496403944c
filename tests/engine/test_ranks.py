"""A worker of several ranks answers as one rank does, and the loss of any rank is noticed within a bound."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.api import FinishReason
from engine.config import EngineOptions
from engine.engine import Engine, tokens_of
from engine.errors import RankLostError
from engine.follower import Follower
from engine.ranks import GroupState, RankGroup
from engine.sequence import Sequence
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.engine.rank_child import EXIT_LOST, RankChild
from tests.engine.ranked import CPU, RankedEngine, cache_options, engine_options, model_options
from tests.engine.test_overlap import answers, check_logprobs, make_request, mixed_requests, stripped

STOP = 7
SHORT_S = 2.0
"""Silence after which the tests' ranks are taken for lost."""
NOTICE_S = 15.0
"""Bound of the tests for that, on a busy machine."""


@pytest.fixture(scope="module")
def one_kv_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("one"), CheckpointFamily.QWEN3, tied=False, num_kv_heads=1)


def expected(path: Path, **cache: Any) -> list[list[Any]]:
    with Engine(model_options(path), cache_options(**cache), engine_options(1)) as engine:
        return answers(engine, mixed_requests(STOP))


@pytest.mark.parametrize(
    ("size", "overlap", "heads", "num_blocks"),
    [(2, "off", 2, 40), (2, "on", 2, 40), (2, "on", 1, 400), (4, "off", 1, 400), (4, "on", 2, 40)],
)
def test_several_ranks_give_the_tokens_of_one(
    tiny_llama: Path, one_kv_head: Path, tmp_path: Path, size: int, overlap: str, heads: int, num_blocks: int
) -> None:
    path = tiny_llama if heads == 2 else one_kv_head
    alone = expected(path, num_blocks=num_blocks)
    with RankedEngine(path, tmp_path, engine_options(size, overlap=overlap), cache_options(num_blocks=num_blocks)) as w:
        for _turn in ("computed", "prefixes found"):
            found = answers(w.engine, mixed_requests(STOP))
            for request, one, several in zip(mixed_requests(STOP), alone, found, strict=True):
                assert stripped(several) == stripped(one), request.request_id
                check_logprobs(request, one, several)
        assert any(outputs[-1].num_cached_tokens for outputs in found)
        stats = w.engine.scheduler.stats()
        assert (stats.preemptions > 0) == (num_blocks == 40)
    assert [follower.num_steps for follower in w.followers] == [stats.steps] * (size - 1)


def test_an_abort_leaves_nothing_at_any_rank(tiny_llama: Path, tmp_path: Path) -> None:
    last = make_request("last", 9, max_tokens=3)
    alone = expected_answer(tiny_llama, last)
    with RankedEngine(tiny_llama, tmp_path, engine_options(2, overlap="on"), cache_options()) as w:
        loop, scheduler = w.engine.loop, w.engine.scheduler
        heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        loop.on_step = lambda emitted: [heard.put(sequence.request.request_id) for sequence, _ in emitted]
        endless = [Sequence.from_request(make_request(name, 20, max_tokens=250), 0.0) for name in "ab"]
        for sequence in endless:
            loop.call(lambda sequence=sequence: scheduler.add(sequence)).result(10.0)
        while {heard.get(timeout=10.0) for _ in range(6)} != {"a", "b"}:
            pass
        for sequence in endless:
            loop.call(lambda sequence=sequence: scheduler.abort(sequence)).result(10.0)
        assert tokens(answers(w.engine, [last])[0]) == alone
        assert w.group.num_mirrored() <= 1
    assert [follower.num_mirrored() for follower in w.followers] == [w.group.num_mirrored()]


def expected_answer(path: Path, request: Any) -> list[int]:
    with Engine(model_options(path), cache_options(), engine_options(1)) as engine:
        return tokens(answers(engine, [request])[0])


def tokens(outputs: list[Any]) -> list[int]:
    return list(tokens_of(outputs))


def test_ranks_with_different_room_agree_on_the_least(tiny_llama: Path, tmp_path: Path) -> None:
    class Smaller(RankedEngine):
        def _follow(self, follower: Follower) -> None:
            self._cache = cache_options(num_blocks=17)
            super()._follow(follower)

    with Smaller(tiny_llama, tmp_path, engine_options(2), cache_options(num_blocks=40)) as worker:
        assert worker.engine.pool.num_blocks == 17
        assert worker.runners[1].kv_cache.num_blocks == 17


def test_a_step_with_impossible_logits_fails_its_requests_and_the_ranks_go_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank finds the same; none of them ends."""
    good = make_request("good", 20, max_tokens=10)
    alone = expected_answer(tiny_llama, good)
    with RankedEngine(tiny_llama, tmp_path, engine_options(2, overlap="on"), cache_options()) as worker:
        assert tokens(answers(worker.engine, [good])[0]) == alone
        spoilt = [worker.engine.runner, *worker.runners.values()]
        for runner in spoilt:
            spoil(runner._decoder, monkeypatch)
        failed = answers(worker.engine, [make_request("bad", 12, max_tokens=10)])[0]
        assert failed[-1].finish_reason is FinishReason.FAILED
        assert "not finite" in failed[-1].reason
        monkeypatch.undo()
        assert tokens(answers(worker.engine, [good])[0]) == alone
        assert worker.group.state is GroupState.MET


def spoil(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model give logits that are not numbers."""
    forward = decoder.forward

    def spoilt(*args: Any) -> Any:
        found = forward(*args)
        if found.logits is not None:
            found.logits.fill_(float("nan"))
        return found

    monkeypatch.setattr(decoder, "forward", spoilt)


@pytest.mark.parametrize("where", ["rank 0", "another rank"])
def test_a_launch_that_fails_at_one_rank_ends_the_worker(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    lost: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def broken(*_args: Any) -> None:
        raise MemoryError("no room")

    options, cache = engine_options(2), cache_options()
    with RankedEngine(tiny_llama, tmp_path, options, cache, timeout_s=SHORT_S, lost=True) as worker:
        worker.group.on_lost = lambda rank, reason: lost.put((rank, reason))
        answers(worker.engine, [make_request("good", 20, max_tokens=10)])
        runner = worker.engine.runner if where == "rank 0" else worker.runners[1]
        monkeypatch.setattr(runner, "launch", broken)
        failed = worker.engine.generate([make_request("x", 20, max_tokens=10)], timeout_s=60.0)[0]
        assert failed[-1].finish_reason is FinishReason.FAILED
        rank, reason = lost.get(timeout=10.0)
        assert rank == (0 if where == "rank 0" else 1)
        assert "no room" in reason
        again = worker.engine.generate([make_request("y", 20, max_tokens=10)], timeout_s=60.0)[0]
        assert "its epoch is over" in again[-1].reason
    assert isinstance(worker.endings[0], RankLostError if where == "rank 0" else MemoryError)


# ---- ranks that do not come ----


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    group = RankGroup(str(tmp_path / "r.sock"), 3, gather_timeout_s=0.2)
    with pytest.raises(RankLostError, match=r"ranks \[1, 2\] did not connect to .*r\.sock within 0\.2 s"):
        group.connect(CPU)
    follower = Follower(str(tmp_path / "r.sock"), 1, 3)
    with pytest.raises(RankLostError, match=r"rank 0 did not listen at .*r\.sock within 0\.2 s"):
        follower.connect(CPU, timeout_s=0.2)
    follower.close()


def test_a_model_that_one_rank_cannot_load_ends_the_other(tiny_llama: Path, tmp_path: Path) -> None:
    class Broken(RankedEngine):
        def _follow(self, follower: Follower) -> None:
            self._path = tmp_path / "missing"
            super()._follow(follower)

    with pytest.raises(RankLostError, match="rank 1"):
        Broken(tiny_llama, tmp_path, engine_options(2), cache_options())


def test_rank_timeouts_are_bounded() -> None:
    with pytest.raises(ValueError, match="rank_timeout_s must be more than 0"):
        EngineOptions(rank_timeout_s=0)


# ---- processes that die or stop ----

Children = Callable[[int, int], RankChild]


@pytest.fixture
def children(tiny_llama: Path, tmp_path: Path) -> Iterator[Children]:
    made: list[RankChild] = []

    def start(rank: int, size: int) -> RankChild:
        made.append(RankChild(str(tmp_path / "ranks.sock"), tiny_llama, rank, size, SHORT_S))
        return made[-1]

    yield start
    for child in made:
        child.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_ends_the_epoch(
    tiny_llama: Path, tmp_path: Path, children: Children, how: signal.Signals
) -> None:
    child = children(1, 2)
    group = RankGroup(str(tmp_path / "ranks.sock"), 2, timeout_s=SHORT_S)
    lost: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    group.on_lost = lambda rank, reason: lost.put((rank, reason))
    with Engine(model_options(tiny_llama), cache_options(), engine_options(2), ranks=group) as engine:
        child.event("ready")
        request = make_request("before", 20, max_tokens=10)
        assert tokens(engine.generate([request], timeout_s=30.0)[0]) == expected_answer(tiny_llama, request)
        engine.loop.post(lambda: child.process.send_signal(how))
        began = time.monotonic()
        outputs = engine.generate([make_request("during", 20, max_tokens=250, ignore_eos=True)], timeout_s=60.0)[0]
        assert outputs[-1].finish_reason is FinishReason.FAILED
        assert lost.get(timeout=NOTICE_S)[0] == 1
        assert time.monotonic() - began < NOTICE_S
        assert child.wait(NOTICE_S) == -signal.SIGKILL  # also the one that was stopped
    assert lost.empty()


def test_rank_0_that_is_killed_ends_the_others(children: Children) -> None:
    ranks = [children(rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.event("ready")
    ranks[0].process.kill()
    assert ranks[1].wait(NOTICE_S) == EXIT_LOST
    assert ranks[1].event("lost")


def test_rank_0_that_is_stopped_is_killed_and_ends_the_others(children: Children) -> None:
    ranks = [children(rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.event("ready")
    ranks[0].process.send_signal(signal.SIGSTOP)
    assert ranks[1].wait(NOTICE_S) == EXIT_LOST
    assert ranks[0].wait(NOTICE_S) == -signal.SIGKILL
