from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kv_transfer.errors import TicketError
from kv_transfer.fan_out import FanOut, OnSettled
from kv_transfer.ticket import SendResult, TicketState
from protos.worker_pb2 import TokenOutput
from tests.kv_transfer.conftest import FIRST, TICKET


@dataclass
class Part:
    """A send job that remembers."""

    on_settled: OnSettled
    backlog: bool = False
    at_once: int = 4
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def layers_at_once(self, num_tokens: int) -> int:
        return self.at_once

    def push(self, *where: Any) -> None:
        self.calls.append(("push", *where))

    def finish(self, first: TokenOutput | None) -> None:
        self.calls.append(("finish", first))

    def abort(self, reason: str) -> None:
        self.calls.append(("abort", reason))

    def must_pause(self, on_room: Callable[[], None]) -> bool:
        return self.backlog

    def end(self, state: TicketState, reason: str = "") -> None:
        self.on_settled(SendResult("t", state, reason))


@dataclass
class Three:
    parts: list[Part] = field(default_factory=list)
    results: list[SendResult] = field(default_factory=list)

    def open(self, on_settled: OnSettled) -> Any:
        self.parts.append(Part(on_settled))
        return self.parts[-1]

    def fan_out(self) -> FanOut:
        return FanOut(TICKET, [self.open] * 3, self.results.append)


def test_the_part_of_the_smallest_pieces_says_how_many_layers_go_at_once() -> None:
    three = Three()
    outlet = three.fan_out()
    three.parts[1].at_once = 3
    assert outlet.layers_at_once(100) == 3


def test_everything_goes_to_every_part_and_the_first_token_to_one() -> None:
    three = Three()
    outlet = three.fan_out()
    slot_ids = np.arange(4)
    outlet.push(1, 2, 8, slot_ids, "event")
    outlet.finish(FIRST)
    outlet.abort("enough")
    first, *others = [part.calls for part in three.parts]
    assert first == [("push", 1, 2, 8, slot_ids, "event"), ("finish", FIRST), ("abort", "enough")]
    assert others == [[("push", 1, 2, 8, slot_ids, "event"), ("finish", None), ("abort", "enough")]] * 2


def test_it_is_delivered_when_the_last_part_is() -> None:
    three = Three()
    three.fan_out()
    for part in three.parts:
        assert three.results == []
        part.end(TicketState.DELIVERED)
    assert three.results == [SendResult("t", TicketState.DELIVERED, "")]


def test_the_first_failure_aborts_the_rest_and_is_the_result() -> None:
    three = Three()
    three.fan_out()
    three.parts[0].end(TicketState.DELIVERED)
    three.parts[2].end(TicketState.LOST, "no answer")
    assert three.parts[1].calls == [("abort", "another part ended LOST: no answer")]
    assert three.results == [], "a part still reads the sender's KV"
    three.parts[1].end(TicketState.ABORTED, "another part ended")
    assert three.results == [SendResult("t", TicketState.LOST, "no answer")]


def test_a_part_that_ends_while_the_others_are_opened() -> None:
    three = Three()

    def broken(on_settled: OnSettled) -> Any:
        part = three.open(on_settled)
        part.end(TicketState.ABORTED, "refused")
        return part

    FanOut(TICKET, [broken, three.open], three.results.append)
    assert ("abort", "another part ended ABORTED: refused") in three.parts[1].calls
    three.parts[1].end(TicketState.ABORTED, "x")
    assert three.results == [SendResult("t", TicketState.ABORTED, "refused")]


def test_a_part_that_cannot_be_opened_leaves_none_behind() -> None:
    three = Three()

    def refuse(on_settled: OnSettled) -> Any:
        raise TicketError("is being sent already")

    with pytest.raises(TicketError):
        FanOut(TICKET, [three.open, refuse], three.results.append)
    assert three.parts[0].calls == [("abort", "another part could not be opened: is being sent already")]
    three.parts[0].end(TicketState.ABORTED, "x")
    assert three.results == [], "whoever opened it has heard by the exception"


def test_it_pauses_for_the_part_that_is_behind() -> None:
    three = Three()
    outlet = three.fan_out()
    assert not outlet.must_pause(lambda: None)
    three.parts[2].backlog = True
    assert outlet.must_pause(lambda: None)
