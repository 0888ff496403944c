"""The transfers of a rank other than 0: it does what rank 0 orders, and reports how each ticket ended.

    STOPPED --start--> STARTED --stop, or a start of a newer epoch--> STOPPED

Orders and step notes come on the rank's step thread, in order with the steps; reports leave from transfer threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kv_transfer.config import TransferConfig
from kv_transfer.errors import TransferError
from kv_transfer.fan_out import Outlet
from kv_transfer.layout import KVLayout
from kv_transfer.node import TransferNode
from kv_transfer.staging import KVMemory, SlotIds, slots_of
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult, TicketGrant, TicketState
from protos.transfer_pb2 import (
    NodeStart,
    NodeStarted,
    PushNote,
    RankGrant,
    RankOrder,
    RankReport,
    RankSend,
    RankTicketEnded,
)

_log = logging.getLogger(__name__)

NO_LEASE_S = 10 * 365 * 86400.0
"""Rank 0 watches the leases."""
NO_EPOCH = "this rank's epoch is over"
OnLayer = Callable[[int, Any], None]


class RankTransfer:
    """One rank's node, driven by rank 0."""

    def __init__(
        self,
        *,
        layout: KVLayout,
        memory: KVMemory,
        config: TransferConfig,
        secret: bytes,
        report: Callable[[bytes], None],
        mark: Callable[[], Any],
    ) -> None:
        """`report` brings a message to rank 0; `mark` gives the event behind all the engine has enqueued."""
        self._layout = layout
        self._memory = memory
        self._config = replace(config, ticket_lease_s=NO_LEASE_S)
        self._secret = secret
        self._send_report = report
        self._mark = mark
        self._node: TransferNode | None = None
        self._outlets: dict[str, Outlet] = {}

    def obey(self, payload: bytes) -> None:
        """Do what one RankOrder says."""
        order = RankOrder.FromString(payload)
        kind = order.WhichOneof("order")
        if kind == "start":
            self._start(order.start)
        elif kind == "stop":
            self.stop()
        elif kind == "grant":
            self._grant(order.grant)
        elif kind == "open_send":
            self._open_send(order.open_send)
        elif kind == "end" and self._node is not None:
            self._node.abort(order.end.ticket_id, order.end.reason)
        elif kind == "meet" and self._node is not None:
            meet = order.meet
            layout = KVLayout.from_proto(meet.layout)
            self._node.meet(meet.worker.worker_id, meet.worker.epoch, list(meet.control_addresses), layout)
        elif kind == "finish_send":
            if (outlet := self._outlets.pop(order.finish_send, None)) is not None:
                outlet.finish(None)
        elif kind == "abort_send" and (outlet := self._outlets.pop(order.abort_send.ticket_id, None)) is not None:
            outlet.abort(order.abort_send.reason)

    def hook(self, payload: bytes) -> OnLayer | None:
        """What to push as a step's layers are written, from its PushNote; what is there already is pushed at once."""
        size = self._layout.block_size
        pushes: list[tuple[Outlet, int, SlotIds]] = []
        for push in PushNote.FromString(payload).pushes:
            outlet = self._outlets.get(push.ticket_id)
            if outlet is None:
                continue
            slot_ids = slots_of(push.block_ids, size, push.first_token % size, push.num_tokens)
            if push.is_there:
                outlet.push(0, self._layout.num_layers, push.first_token, slot_ids)
            else:
                pushes.append((outlet, push.first_token, slot_ids))
        if not pushes:
            return None

        def on_layer(layer: int, event: Any) -> None:
            for outlet, first_token, slot_ids in pushes:
                outlet.push(layer, 1, first_token, slot_ids, event)

        return on_layer

    def stop(self) -> None:
        """End the epoch."""
        self._outlets.clear()
        node, self._node = self._node, None
        if node is not None:
            node.stop()

    def _start(self, start: NodeStart) -> None:
        self.stop()
        node = TransferNode(
            worker_id=start.identity.worker_id,
            epoch=start.identity.epoch,
            layout=self._layout,
            memory=self._memory,
            config=self._config,
            secret=self._secret,
        )
        try:
            started = NodeStarted(address=node.start(), epoch=start.identity.epoch)
            self._node = node
        except TransferError as error:
            started = NodeStarted(error=str(error), epoch=start.identity.epoch)
        self._report(RankReport(started=started))

    def _grant(self, grant: RankGrant) -> None:
        ticket_id = grant.ticket_id
        if self._node is None:  # rank 0 granted while it stopped
            self._ended(ticket_id, TicketState.ABORTED, NO_EPOCH)
            return
        try:
            self._node.grant(
                TicketGrant(
                    ticket_id=ticket_id,
                    request_id=grant.request_id,
                    attempt=grant.attempt,
                    owner="rank 0",
                    block_ids=tuple(grant.block_ids),
                    first_token=grant.first_token,
                    num_tokens=grant.num_tokens,
                    after=self._mark(),
                    on_ready=self._ready,
                    on_end=lambda state, reason: self._ended(ticket_id, state, reason),
                )
            )
        except TransferError as error:
            _log.exception("ticket %s could not be granted on this rank", ticket_id)
            self._ended(ticket_id, TicketState.ABORTED, str(error))

    def _open_send(self, send: RankSend) -> None:
        ticket = KVTicket.from_proto(send.ticket)
        if self._node is None:
            self._settled(SendResult(ticket.ticket_id, TicketState.ABORTED, NO_EPOCH))
            return
        try:
            self._outlets[ticket.ticket_id] = self._node.open_send(ticket, self._settled)
        except TransferError as error:
            self._settled(SendResult(ticket.ticket_id, TicketState.ABORTED, str(error)))

    # -- from transfer threads

    def _ready(self, received: ReceivedKV) -> None:
        ended = RankTicketEnded(
            ticket_id=received.ticket_id,
            state=TicketState.DELIVERED.value,
            busy_s=received.busy_s,
            num_bytes=received.num_bytes,
            last_home=received.last_home,
        )
        self._report(RankReport(ticket_ended=ended))

    def _ended(self, ticket_id: str, state: TicketState, reason: str) -> None:
        self._report(RankReport(ticket_ended=RankTicketEnded(ticket_id=ticket_id, state=state.value, reason=reason)))

    def _settled(self, result: SendResult) -> None:
        settled = RankTicketEnded(ticket_id=result.ticket_id, state=result.state.value, reason=result.reason)
        self._report(RankReport(send_settled=settled))

    def _report(self, report: RankReport) -> None:
        self._send_report(report.SerializeToString())
