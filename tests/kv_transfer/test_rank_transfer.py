"""A rank that obeys: every order of a ticket is answered by an end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kv_transfer.config import TransferConfig
from kv_transfer.rank_transfer import RankTransfer
from protos.transfer_pb2 import NodeStop, RankGrant, RankOrder, RankReport, RankSend
from tests.kv_transfer.conftest import LAYOUT, SECRET, TICKET, Memory


@pytest.mark.parametrize(
    ("order", "report"),
    [
        (RankOrder(grant=RankGrant(ticket_id="t", block_ids=[1], num_tokens=8)), "ticket_ended"),
        (RankOrder(open_send=RankSend(ticket=TICKET.to_proto())), "send_settled"),
    ],
)
def test_what_comes_behind_the_end_of_the_epoch_ends_at_once(
    config: TransferConfig, order: RankOrder, report: str
) -> None:
    reports: list[RankReport] = []
    layout = replace(LAYOUT, tp_rank=1, tp_size=2)
    rank = RankTransfer(
        layout=layout,
        memory=Memory(layout),
        config=config,
        secret=SECRET,
        report=lambda payload: reports.append(RankReport.FromString(payload)),
        mark=lambda: None,
    )
    rank.obey(RankOrder(stop=NodeStop()).SerializeToString())
    rank.obey(order.SerializeToString())
    (told,) = reports
    assert told.WhichOneof("report") == report
    ended = getattr(told, report)
    assert (ended.ticket_id, ended.state, ended.reason) == ("t", "ABORTED", "this rank's epoch is over")
