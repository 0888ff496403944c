from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.errors import TicketError
from kv_transfer.jobs import Piece, SendJob
from kv_transfer.ticket import SendResult, TicketState
from kv_transfer.timers import Janitor
from tests.kv_transfer.conftest import FIRST, TICKET


@pytest.fixture
def janitor() -> Iterator[Janitor]:
    janitor = Janitor("test-janitor")
    janitor.start()
    yield janitor
    assert janitor.stop(5)


def new_job(janitor: Janitor, max_places: int = 1000) -> tuple[SendJob, SimpleQueue[SendResult]]:
    results: SimpleQueue[SendResult] = SimpleQueue()
    return SendJob(TICKET, results.put, janitor, max_places), results


def take(job: SendJob) -> list[Piece]:
    pieces = []
    while (piece := job.begin_gather()) is not None:
        pieces.append(piece)
        assert job.end_gather()
    return pieces


def plain(pieces: list[Piece]) -> list[tuple[int, int, int, list[int]]]:
    return [(piece.first_layer, piece.num_layers, piece.first_token, piece.slot_ids.tolist()) for piece in pieces]


def test_layers_go_one_by_one_unless_whole_pieces_are_better(janitor: Janitor) -> None:
    results: SimpleQueue[SendResult] = SimpleQueue()
    job = SendJob(TICKET, results.put, janitor, 100, by_piece=True)
    assert [job.layers_at_once(num_tokens) for num_tokens in (1, 30, 50, 100, 101)] == [100, 3, 2, 1, 1]
    assert new_job(janitor, 100)[0].layers_at_once(10) == 1


def test_layers_of_a_chunk_are_joined(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    slot_ids = np.arange(100, 116)
    for layer in range(3):
        job.push(layer, 1, 0, slot_ids)
    assert plain(take(job)) == [(0, 3, 0, list(range(100, 116)))]


def test_chunks_of_the_same_layers_are_joined(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    job.push(0, 3, 0, np.array([10, 11]))
    job.push(0, 3, 2, np.array([30]))
    assert plain(take(job)) == [(0, 3, 0, [10, 11, 30])]


@pytest.mark.parametrize(
    "other",
    [(1, 1, 8, [1, 2]), (2, 1, 0, [1, 2]), (0, 1, 3, [3]), (1, 1, 0, [1, 3])],
    ids=["other tokens", "a layer between", "a token between", "other slots"],
)
def test_what_is_not_adjacent_stays_apart(janitor: Janitor, other: tuple[int, int, int, list[int]]) -> None:
    job, _ = new_job(janitor)
    job.push(0, 1, 0, np.array([1, 2]))
    job.push(*other[:3], np.array(other[3]))
    assert plain(take(job)) == [(0, 1, 0, [1, 2]), other]


def test_a_join_stays_within_the_limit(janitor: Janitor) -> None:
    job, _ = new_job(janitor, max_places=32)
    for layer in range(3):
        job.push(layer, 1, 0, np.arange(16))
    assert [piece.num_layers for piece in take(job)] == [2, 1]


@given(
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    run=st.integers(1, 3),
    max_places=st.integers(1, 70),
)
def test_every_place_is_sent_exactly_once_within_the_limit(chunks: list[int], run: int, max_places: int) -> None:
    job, _ = new_job(Janitor("not started"), max_places)
    start = 0
    for size in chunks:
        for layer in range(0, 3, run):
            job.push(layer, min(run, 3 - layer), start, np.arange(500 + start, 500 + start + size))
        start += size
    sent: set[tuple[int, int]] = set()
    for piece in take(job):
        assert 0 < piece.num_layers * piece.num_tokens <= max_places
        assert list(piece.slot_ids) == list(range(500 + piece.first_token, 500 + piece.first_token + piece.num_tokens))
        for layer in range(piece.first_layer, piece.first_layer + piece.num_layers):
            for token in range(piece.first_token, piece.first_token + piece.num_tokens):
                assert (layer, token) not in sent
                sent.add((layer, token))
    assert sent == {(layer, token) for layer in range(3) for token in range(start)}


def test_the_first_token_follows_the_last_piece_once(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    pair = Told()
    job.attach(pair)
    job.push(0, 1, 0, np.array([1]))
    assert job.take_complete() is None
    job.finish(FIRST)
    assert job.take_complete() is None, "a piece still waits"
    assert job.has_work
    take(job)
    assert job.take_complete() is None, "the piece has not been announced"
    assert not pair.complete
    job.announced()
    assert pair.complete == [job]
    assert job.take_complete().first == FIRST
    assert job.take_complete() is None


class Told:
    """A pair that notes which jobs are complete."""

    is_backlogged = False

    def __init__(self) -> None:
        self.complete: list[SendJob] = []

    def notice(self, job: SendJob) -> None:
        pass

    def tell_complete(self, job: SendJob) -> None:
        self.complete.append(job)


def test_a_job_whose_pieces_have_all_left_is_complete_when_it_is_finished(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    pair = Told()
    job.attach(pair)
    job.push(0, 1, 0, np.array([1]))
    take(job)
    job.announced()
    assert not pair.complete
    job.finish(FIRST)
    assert pair.complete == [job]


def test_a_job_is_settled_once_and_forgets_its_pieces(janitor: Janitor) -> None:
    job, results = new_job(janitor)
    job.push(0, 1, 0, np.array([1]))
    job.abort("client left")
    job.abort("again")
    assert not job.settle(TicketState.LOST, "late")
    assert results.get(timeout=5) == SendResult("t", TicketState.ABORTED, "client left")
    assert take(job) == []
    job.push(1, 1, 0, np.array([1]))
    job.finish(FIRST)
    assert not job.has_work
    with pytest.raises(Empty):
        results.get(timeout=0.05)


def test_the_result_waits_for_the_gather_under_way(janitor: Janitor) -> None:
    job, results = new_job(janitor)
    job.push(0, 1, 0, np.array([1]))
    assert job.begin_gather() is not None
    thread = threading.Thread(target=job.abort, args=["client left"])
    thread.start()
    thread.join(5)
    with pytest.raises(Empty):
        results.get(timeout=0.05)
    assert not job.end_gather()
    assert results.get(timeout=5).state is TicketState.ABORTED


@pytest.mark.parametrize(
    ("push", "message"),
    [
        ((0, 1, 60, [1, 2, 3, 4, 5]), r"tokens \[60, 65\)"),
        ((0, 1, -1, [1]), "outside the ticket's"),
        ((0, 1, 0, []), r"tokens \[0, 0\)"),
        ((2, 2, 0, [1]), r"layers \[2, 4\)"),
        ((0, 0, 0, [1]), r"layers \[0, 0\)"),
    ],
)
def test_a_push_outside_the_ticket_is_refused(
    janitor: Janitor, push: tuple[int, int, int, list[int]], message: str
) -> None:
    job, _ = new_job(janitor)
    with pytest.raises(TicketError, match=message):
        job.push(*push[:3], np.array(push[3]))


def test_nothing_may_follow_finish(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    job.finish(FIRST)
    with pytest.raises(TicketError, match="after finish"):
        job.push(0, 1, 0, np.array([1]))
    with pytest.raises(TicketError, match="twice"):
        job.finish(FIRST)


@dataclass
class Backlog:
    """A pair, seen from its job."""

    is_backlogged: bool = True
    noticed: int = 0

    def notice(self, job: SendJob) -> None:
        self.noticed += 1


def test_room_is_told_once_to_who_paused_last(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    told: list[int] = []
    assert not job.must_pause(lambda: told.append(0)), "no pair, no backlog"
    pair = Backlog()
    job.attach(pair)
    job.made_room()
    assert job.must_pause(lambda: told.append(1))
    assert job.must_pause(lambda: told.append(2))
    assert pair.noticed == 2, "so that room is told although the job has nothing to send"
    job.made_room()
    job.made_room()
    assert told == [2]
    pair.is_backlogged = False
    assert not job.must_pause(lambda: told.append(3))


def test_a_settled_job_never_pauses(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    job.attach(Backlog())
    job.abort("client left")
    assert not job.must_pause(lambda: None)


@dataclass
class Computed:
    """An event of the engine's."""

    done: bool = False

    def query(self) -> bool:
        return self.done


def test_only_what_is_written_waits_to_be_sent(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    later = Computed()
    job.push(0, 1, 0, np.arange(4))
    job.push(1, 1, 0, np.arange(4), later)
    assert job.waiting_places() == 4, "a layer that is being computed is no backlog"
    later.done = True
    assert job.waiting_places() == 8


def test_layers_of_one_step_are_one_piece_ready_with_its_last(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    events = [Computed() for _ in range(3)]
    slot_ids = np.arange(4)
    for layer, event in enumerate(events):
        job.push(layer, 1, 0, slot_ids, event)
    assert not job.is_written
    events[2].done = True
    assert job.is_written
    (piece,) = take(job)
    assert (piece.num_layers, piece.ready) == (3, events[2])


def test_what_is_written_does_not_wait_for_what_is_not(janitor: Janitor) -> None:
    job, _ = new_job(janitor)
    later = Computed()
    job.push(0, 2, 0, np.arange(4))
    job.push(2, 1, 0, np.arange(4), later)
    assert job.is_written
    piece = job.begin_gather()
    assert piece is not None
    assert piece.num_layers == 2
    assert job.end_gather()
    assert not job.is_written
