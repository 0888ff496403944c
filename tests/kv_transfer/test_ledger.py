from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from kv_transfer.errors import TicketError, TransferIntegrityError
from kv_transfer.ledger import TicketLedger
from kv_transfer.ticket import ReceivedKV, TicketGrant, TicketState
from kv_transfer.timers import Janitor
from protos.transfer_pb2 import PieceAnnounced
from protos.worker_pb2 import TokenOutput
from tests.kv_transfer.conftest import LAYOUT

BOUND_S = 5.0


@dataclass(eq=False)
class Pair:
    """A holder that remembers what it should tell."""

    heads: range = range(2)
    told: list[tuple[str, TicketState, str]] = field(default_factory=list)

    def tell_settled(self, ticket_id: str, state: TicketState, reason: str) -> None:
        self.told.append((ticket_id, state, reason))


@dataclass
class Book:
    """A ledger with one granted ticket: tokens [8, 21) in blocks 5 and 2."""

    ledger: TicketLedger
    ends: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    pair: Pair = field(default_factory=Pair)

    def grant(self, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "ticket_id": "t",
            "request_id": "r",
            "attempt": 1,
            "owner": "router",
            "block_ids": (5, 2),
            "first_token": 8,
            "num_tokens": 21,
            "after": "the event",
            "on_ready": self.ends.put,
            "on_end": lambda state, reason: self.ends.put((state, reason)),
        }
        self.ledger.grant(TicketGrant(**(fields | changes)))

    def write(self, piece: PieceAnnounced) -> list[int] | None:
        write = self.ledger.begin_write(self.pair, piece)
        if write is None:
            return None
        assert write.after == "the event"
        self.ledger.end_write(piece, len(self.pair.heads), 0.25)
        return write.slot_ids.tolist()

    def complete(self, request_id: str = "r") -> None:
        self.ledger.complete(self.pair, "t", TokenOutput(request_id=request_id, token_ids=[1]), 0.0)

    def end(self) -> Any:
        return self.ends.get(timeout=BOUND_S)


def piece(first_layer: int, num_layers: int, first_token: int, num_tokens: int, **changes: Any) -> PieceAnnounced:
    num_bytes = num_layers * num_tokens * LAYOUT.bytes_per_token_layer
    fields = {"ticket_id": "t", "num_bytes": num_bytes} | changes
    return PieceAnnounced(
        first_layer=first_layer, num_layers=num_layers, first_token=first_token, num_tokens=num_tokens, **fields
    )


@pytest.fixture
def janitor() -> Iterator[Janitor]:
    janitor = Janitor("test-janitor")
    janitor.start()
    yield janitor
    assert janitor.stop(BOUND_S)


@pytest.fixture
def book(janitor: Janitor) -> Iterator[Book]:
    book = Book(TicketLedger(LAYOUT, janitor, lease_s=30.0))
    yield book
    book.ledger.check_integrity(idle=False)
    assert book.ends.empty(), "an end was told twice"


def test_a_ticket_is_delivered_when_everything_is_home(book: Book) -> None:
    book.grant()
    assert book.write(piece(0, 2, 8, 13)) == [*range(40, 48), *range(16, 21)]
    assert book.write(piece(2, 1, 15, 6)) == [47, *range(16, 21)]
    book.ledger.check_integrity(idle=False)
    assert book.write(piece(2, 1, 8, 7)) == list(range(40, 47))
    book.complete()
    received = book.end()
    assert isinstance(received, ReceivedKV)
    assert received.busy_s == 0.75
    assert received.num_bytes == 39 * LAYOUT.bytes_per_token_layer
    assert book.pair.told == [("t", TicketState.DELIVERED, "")]
    book.ledger.check_integrity(idle=True)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (piece(0, 1, 7, 2), r"tokens \[7, 9\) are outside"),
        (piece(0, 1, 20, 2), r"tokens \[20, 22\) are outside"),
        (piece(0, 1, -3, 2), "outside the ticket's"),
        (piece(2, 2, 8, 1), r"layers \[2, 4\) are outside"),
        (piece(-1, 1, 8, 1), r"layers \[-1, 0\) are outside"),
        (piece(0, 0, 8, 1), "an empty piece"),
        (piece(0, 1, 8, 0), "an empty piece"),
        (piece(0, 1, 8, 1, num_bytes=65), "are 64 bytes, 65 came"),
        (piece(0, 2, 9, 2), r"tokens \[9, 11\) of layers \[0, 2\) came twice"),
    ],
)
def test_a_piece_that_does_not_fit_ends_the_ticket_and_writes_nothing(
    book: Book, wrong: PieceAnnounced, reason: str
) -> None:
    book.grant()
    assert book.write(piece(1, 1, 10, 3)) is not None
    assert book.write(wrong) is None
    state, told = book.end()
    assert state is TicketState.ABORTED
    assert re.search(reason, told)
    assert book.write(piece(0, 1, 8, 1)) is None, "the ticket has ended"
    book.ledger.check_integrity(idle=True)


def test_completion_with_kv_missing_is_an_abort(book: Book) -> None:
    book.grant()
    book.write(piece(0, 3, 8, 12))
    book.complete()
    assert book.end() == (TicketState.ABORTED, "KV of 3 (layer, token) places never came")


def test_the_first_token_of_another_request_is_an_abort(book: Book) -> None:
    book.grant()
    book.write(piece(0, 3, 8, 13))
    book.complete(request_id="other")
    state, reason = book.end()
    assert state is TicketState.ABORTED
    assert "of request other" in reason


def test_an_abort_waits_for_the_write_under_way(book: Book) -> None:
    book.grant()
    first = piece(0, 1, 8, 13)
    assert book.ledger.begin_write(book.pair, first) is not None
    assert book.ledger.end("t", TicketState.ABORTED, "client left")
    assert not book.ledger.end("t", TicketState.ABORTED, "again")
    with pytest.raises(Empty):
        book.ends.get(timeout=0.05)
    book.ledger.end_write(first, 2, 0.1)
    assert book.end() == (TicketState.ABORTED, "client left")
    assert book.pair.told == [("t", TicketState.ABORTED, "client left")]


def test_a_failed_write_is_an_abort(book: Book) -> None:
    book.grant()
    first = piece(0, 1, 8, 13)
    assert book.ledger.begin_write(book.pair, first) is not None
    book.ledger.end_write(first, 2, 0.1, "disk on fire")
    assert book.end() == (TicketState.ABORTED, "disk on fire")


def test_the_blocks_of_an_ended_ticket_can_be_granted_again_and_its_name_cannot(book: Book) -> None:
    book.grant()
    book.ledger.end("t", TicketState.ABORTED, "client left")
    book.end()
    book.grant(ticket_id="t2")
    with pytest.raises(TicketError, match="granted before"):
        book.grant(block_ids=(8, 9))
    book.ledger.end_all("over")
    book.end()


def test_late_pieces_and_questions_get_the_true_verdict(book: Book) -> None:
    book.grant()
    book.ledger.end("t", TicketState.EXPIRED, "lease")
    assert book.end() == (TicketState.EXPIRED, "lease")
    assert book.write(piece(0, 1, 8, 1)) is None
    book.complete()
    assert book.write(piece(0, 1, 8, 1, ticket_id="never heard of")) is None
    assert book.pair.told == [
        ("t", TicketState.EXPIRED, "lease"),
        ("t", TicketState.EXPIRED, "lease"),
        ("never heard of", TicketState.ABORTED, "no such ticket"),
    ]


def test_only_one_pair_may_bring_a_ticket(book: Book) -> None:
    book.grant()
    assert book.write(piece(0, 1, 8, 1)) is not None
    other = Pair()
    assert book.ledger.begin_write(other, piece(1, 1, 8, 1)) is None
    assert other.told[0][:2] == ("t", TicketState.ABORTED)
    assert book.ledger.end("t", TicketState.ABORTED, "lost")
    assert book.end() == (TicketState.ABORTED, "lost")
    assert book.pair.told == [("t", TicketState.ABORTED, "lost")]
    assert len(other.told) == 1, "it holds nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_token": 4}, "multiple of the block size 8, got 4"),
        ({"first_token": 24}, r"no token to receive in \[24, 21\)"),
        ({"block_ids": (1,)}, "2 blocks are needed for the tokens, got 1"),
        ({"block_ids": (1, 1)}, "distinct"),
        ({"block_ids": (1, -1)}, "not negative"),
        ({"ticket_id": "t2", "block_ids": (7, 5)}, r"blocks \[5\] belong to another open ticket"),
    ],
)
def test_a_grant_that_cannot_be_kept_is_refused(book: Book, changes: dict[str, Any], message: str) -> None:
    book.grant()
    with pytest.raises(TicketError, match=message):
        book.grant(**({"ticket_id": "t3"} | changes))
    book.ledger.check_integrity(idle=False)
    book.ledger.end_all("over")
    assert book.end() == (TicketState.ABORTED, "over")


def test_a_lease_ends_unless_its_owner_renews_it(janitor: Janitor) -> None:
    book = Book(TicketLedger(LAYOUT, janitor, lease_s=0.5))
    book.grant()
    book.grant(ticket_id="kept", block_ids=(8, 9), owner="other router")
    start = time.monotonic()
    while book.ends.empty():
        book.ledger.renew("other router")
        assert time.monotonic() - start < BOUND_S
        threading.Event().wait(0.02)
    state, reason = book.end()
    assert state is TicketState.EXPIRED
    assert "0.5 s" in reason
    assert time.monotonic() - start >= 0.5
    book.ledger.check_integrity(idle=False)
    assert book.ledger.num_open == 1, "the renewed ticket lives"
    assert book.end()[0] is TicketState.EXPIRED, "until nobody renews it"
    assert time.monotonic() - start >= 0.95
    book.ledger.check_integrity(idle=True)


def test_an_open_ticket_is_not_idle(book: Book) -> None:
    book.grant()
    with pytest.raises(TransferIntegrityError, match="open on an idle node"):
        book.ledger.check_integrity(idle=True)
    book.ledger.end_all("over")
    book.end()


def test_another_rank_waits_once_for_a_grant(janitor: Janitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.ledger.GRANT_WAIT_S", 0.2)
    book = Book(TicketLedger(replace(LAYOUT, num_kv_heads=4, tp_rank=1, tp_size=2), janitor, lease_s=30.0))
    janitor.call_at(time.monotonic() + 0.05, book.grant)
    assert book.write(piece(0, 1, 8, 1)) is not None, "its grant was on the way"
    book.ledger.end_all("over")
    book.end()
    start = time.monotonic()
    for _ in range(10):
        assert book.write(piece(0, 1, 8, 1, ticket_id="never granted")) is None
    assert 0.2 <= time.monotonic() - start < 1.0
    assert book.pair.told[-1] == ("never granted", TicketState.ABORTED, "no such ticket")
    with pytest.raises(TicketError, match="granted before"):
        book.grant(ticket_id="never granted")


# -- a ticket whose heads come over two pairs


@pytest.fixture
def halves(book: Book) -> tuple[Pair, Pair]:
    """Two pairs with a head each, on rank 0."""
    book.grant()
    return Pair(heads=range(1)), Pair(heads=range(1, 2))


def half_piece(first_layer: int, num_layers: int) -> PieceAnnounced:
    return piece(first_layer, num_layers, 8, 13, num_bytes=num_layers * 13 * LAYOUT.bytes_per_head)


def write_half(book: Book, half: Pair, first_layer: int = 0, num_layers: int = 3) -> None:
    part = half_piece(first_layer, num_layers)
    assert book.ledger.begin_write(half, part) is not None
    book.ledger.end_write(part, 1, 0.25)


def test_it_is_delivered_when_both_are_complete(book: Book, halves: tuple[Pair, Pair]) -> None:
    for half in reversed(halves):
        write_half(book, half)
    book.ledger.check_integrity(idle=False)
    book.ledger.complete(halves[1], "t", None, 0.0)
    assert book.ledger.num_open == 1
    assert book.ends.empty()
    book.ledger.complete(halves[0], "t", TokenOutput(request_id="r", token_ids=[1]), 0.0)
    received = book.end()
    assert isinstance(received, ReceivedKV)
    assert received.num_bytes == 39 * LAYOUT.bytes_per_token_layer
    assert [half.told for half in halves] == [[("t", TicketState.DELIVERED, "")]] * 2


def test_one_that_completes_too_early_ends_it_for_both(book: Book, halves: tuple[Pair, Pair]) -> None:
    write_half(book, halves[0])
    write_half(book, halves[1], num_layers=2)
    book.ledger.complete(halves[1], "t", None, 0.0)
    state, reason = book.end()
    assert (state, reason) == (TicketState.ABORTED, "KV of 13 (layer, token) places never came")
    assert [half.told for half in halves] == [[("t", state, reason)]] * 2


def test_one_that_completes_twice_delivers_nothing_of_the_other(book: Book, halves: tuple[Pair, Pair]) -> None:
    write_half(book, halves[0])
    for _ in range(2):
        book.ledger.complete(halves[0], "t", TokenOutput(request_id="r", token_ids=[1]), 0.0)
    assert book.end() == (TicketState.ABORTED, "a sender said twice that all of its part was announced")


def test_the_first_token_comes_with_the_first_heads(book: Book, halves: tuple[Pair, Pair]) -> None:
    write_half(book, halves[0])
    book.ledger.complete(halves[0], "t", None, 0.0)
    assert book.end() == (TicketState.ABORTED, "the first token never came")


def test_whoever_ends_it_tells_both(book: Book, halves: tuple[Pair, Pair]) -> None:
    for half in halves:
        write_half(book, half, num_layers=1)
    assert book.ledger.end("t", TicketState.ABORTED, "peer lost")
    assert book.end() == (TicketState.ABORTED, "peer lost")
    assert [half.told for half in halves] == [[("t", TicketState.ABORTED, "peer lost")]] * 2


def test_a_pair_that_comes_while_the_ticket_is_ending_hears_its_end(book: Book, halves: tuple[Pair, Pair]) -> None:
    first = half_piece(0, 1)
    assert book.ledger.begin_write(halves[0], first) is not None
    book.ledger.end("t", TicketState.ABORTED, "client left")
    assert book.ledger.begin_write(halves[1], half_piece(0, 1)) is None
    assert halves[1].told == []
    book.ledger.end_write(first, 1, 0.1)
    assert book.end() == (TicketState.ABORTED, "client left")
    assert [half.told for half in halves] == [[("t", TicketState.ABORTED, "client left")]] * 2
