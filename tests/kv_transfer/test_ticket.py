from __future__ import annotations

import pytest

from kv_transfer.ticket import KVTicket, TicketState
from protos import worker_pb2
from tests.kv_transfer.conftest import LAYOUT

TICKET = KVTicket("t", "r", 2, "w", 5, ("127.0.0.1:1", "127.0.0.1:2"), (4, 9), 8, 20, LAYOUT, 30.0)


def test_the_wire_form_keeps_everything() -> None:
    data = TICKET.to_proto().SerializeToString()
    assert KVTicket.from_proto(worker_pb2.KVTicket.FromString(data)) == TICKET


def test_a_ticket_without_a_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers"):
        KVTicket.from_proto(worker_pb2.KVTicket(ticket_id="t"))


def test_states_travel_by_their_names() -> None:
    assert {state.value for state in TicketState} == {state.name for state in TicketState}
