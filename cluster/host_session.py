"""One front's epoch with an engine process: what a front may ask, and what it is told.

    CONNECTED --StartEngine (an epoch)--> SERVING --front gone, or a newer one--> CLOSED

A session owns its transfer node and both crafts; closing it ends every sequence and ticket of its
epoch, and the blocks are back before the next session starts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.engine_messages import engine_stats, error_message, refuse_draining, refuse_not_started
from decode_pool.worker import DecodeWorker
from engine.batch import LayerHook, StepPlan
from engine.block_log import BlockLog
from engine.errors import CapacityError, EngineError, InvalidRequestError
from engine.ipc import Send
from engine.scheduler import Emitted
from kv_transfer.group import TransferGroup
from kv_transfer.layout import KVLayout
from kv_transfer.node import TransferNode
from kv_transfer.ticket import KVTicket
from prefill_pool.worker import PrefillWorker
from protos import worker_pb2 as pb

if TYPE_CHECKING:
    from cluster.engine_host import EngineHost

log = logging.getLogger(__name__)

LOOP_CALL_TIMEOUT_S = 60.0
"""Bound of a wait for the engine loop to come round between two steps."""


class HostSession:
    """One front's epoch with the engine."""

    def __init__(self, host: EngineHost, send: Send) -> None:
        self._host = host
        self._engine = host.engine
        self._send = send
        self._identity = pb.WorkerIdentity()
        self._node: TransferNode | TransferGroup | None = None
        self._prefill: PrefillWorker | None = None
        self._decode: DecodeWorker | None = None
        self._outbox: dict[str, list[pb.TokenOutput]] = {}
        self._in_step = False
        self._close_lock = threading.Lock()

    def handle(self, command: pb.EngineCommand) -> None:
        """Take one command; calls that touch sequences run on the engine loop's thread."""
        kind = command.WhichOneof("command")
        if kind == "start":
            self._answer(command.call_id, lambda: pb.EngineReply(description=self._start(command.start)))
            return
        if kind == "renew":
            if self._node is not None and command.renew.router_id:
                self._node.renew(command.renew.router_id)
            if command.call_id:
                self._reply(command.call_id, pb.EngineReply(stats=self.stats(), pairs=self.pairs()))
            return
        if kind == "meet":
            self._answer(command.call_id, lambda: self._meet(command.meet))
            return
        self._engine.loop.post(lambda: self._on_loop(command))

    def close(self) -> None:
        """End everything of this epoch; the blocks are back when this returns."""
        with self._close_lock:
            if self._node is None or self._prefill is None or self._decode is None:
                return
            node = self._node
            try:
                self._engine.loop.call(self._prefill.close).result(LOOP_CALL_TIMEOUT_S)
                self._engine.loop.call(self._decode.close).result(LOOP_CALL_TIMEOUT_S)
            finally:
                node.stop()
            self._engine.loop.call(self._leave_loop).result(LOOP_CALL_TIMEOUT_S)
            self._node = None

    def stats(self) -> pb.WorkerStats:
        """Counters and gauges of the engine and of this epoch's transfers; any thread may ask."""
        stats, node, prefill, decode = engine_stats(self._engine), self._node, self._prefill, self._decode
        if node is not None and prefill is not None and decode is not None:
            transfer = node.stats()
            stats.open_tickets = transfer.open_tickets
            stats.sent_bytes = transfer.sent_bytes
            stats.received_bytes = transfer.received_bytes
            stats.digest_mismatches = transfer.digest_mismatches
            stats.num_reserved = decode.num_reserved
            stats.num_waiting += prefill.num_waiting
            stats.open_sends = transfer.open_sends
            stats.num_pairs = transfer.pairs
            stats.lost_peers = transfer.lost_peers
            stats.slow_pairs = transfer.slow_pairs
            stats.retired_pairs = transfer.retired_pairs
            room = decode.room_left
            stats.free_places, stats.unpromised_blocks = room.places, room.blocks
            stats.expected_answer_tokens = room.expected_answer_tokens
        return stats

    def pairs(self) -> list[pb.PairInfo]:
        """The pairs of this epoch, in either direction; any thread may ask."""
        node = self._node
        return [info.to_proto() for info in node.pair_infos()] if node is not None else []

    def num_open(self) -> int:
        """Requests of any phase that this epoch still has."""
        return sum(worker.num_open() for worker in (self._prefill, self._decode) if worker is not None)

    def _start(self, start: pb.StartEngine) -> pb.WorkerDescription:
        identity, host = start.identity, self._host
        if self._node is not None:
            raise EngineError("this front has already started an epoch")
        self._identity = identity
        node = self._start_transfers(identity)
        self._prefill = PrefillWorker(self._engine, node, emit=self._emit)
        self._decode = DecodeWorker(
            self._engine,
            node,
            host.decode,
            max_running=host.max_running,
            name=f"{identity.worker_id}.{identity.epoch}",
            emit=self._emit,
            on_room=lambda: self._flush(is_news=True),
        )
        self._node = node
        if start.HasField("role"):
            self._engine.loop.call(lambda: host.set_role(start.role)).result(LOOP_CALL_TIMEOUT_S)
        self._engine.loop.call(self._take_loop).result(LOOP_CALL_TIMEOUT_S)
        return self._describe()

    def _describe(self) -> pb.WorkerDescription:
        assert self._node is not None
        host, config = self._host, self._engine.runner.config
        return pb.WorkerDescription(
            identity=self._identity,
            role=host.role,
            model_name=host.model_name,
            layout=host.layout().to_proto(),
            num_blocks=self._engine.pool.num_blocks,
            max_model_len=self._engine.max_model_len,
            max_running=host.max_running,
            vocab_size=config.vocab_size,
            architecture=config.architecture,
            control_addresses=self._node.addresses,
            paced=self._engine.is_paced,
        )

    def _start_transfers(self, identity: pb.WorkerIdentity) -> TransferNode | TransferGroup:
        """This epoch's transfers, on every rank."""
        host, ranks = self._host, self._engine.ranks
        node = TransferNode(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            layout=host.layout(),
            memory=self._engine.runner.kv_cache,
            config=host.transfer,
            secret=host.secret,
        )
        node.on_granted = lambda ticket: self._engine.loop.post(lambda: self._granted(ticket))
        if ranks is None:
            node.start()
            return node
        group = TransferGroup(node, ranks.size, ranks.order)
        ranks.on_report = group.hear
        group.start()
        return group

    def _granted(self, ticket: KVTicket) -> None:
        if self._prefill is not None:
            self._prefill.granted(ticket)

    def _meet(self, meet: pb.MeetRequest) -> pb.EngineReply:
        """Begin the pairs to another worker; the node does not wait for them."""
        if self._node is None:
            return refuse_not_started()
        try:
            layout = KVLayout.from_proto(meet.layout)
        except ValueError as error:
            raise InvalidRequestError(str(error), field="layout") from error
        self._node.meet(meet.worker.worker_id, meet.worker.epoch, meet.control_addresses, layout)
        return pb.EngineReply(meet=pb.MeetReply())

    def _take_loop(self) -> None:
        assert self._prefill is not None
        assert self._decode is not None
        self._engine.scheduler.is_held = self._prefill.must_pause
        self._engine.scheduler.give_back = self._decode.give_back
        self._engine.pool.log = BlockLog(self._engine.pool.contents())
        self._engine.loop.step_hook = self._before_step
        self._engine.loop.on_step = self._after_step
        self._flush(is_news=True)

    def _leave_loop(self) -> None:
        self._engine.pool.log = None
        self._check_closed()

    def _check_closed(self) -> None:
        """Every block of the epoch is back, or the engine says which is not."""
        if self._prefill is not None and self._decode is not None:
            self._engine.check_integrity([*self._prefill.holders(), *self._decode.holders()])

    # ---- on the engine loop's thread ----

    def hand_back(self, reason: str) -> None:
        """Give the routers back what generates, or is about to."""
        if self._decode is None:
            return
        self._in_step = True  # all of it is one message
        try:
            self._decode.hand_back(reason)
        finally:
            self._in_step = False
            self._flush(is_news=True)

    def tell_draining(self) -> None:
        """Have the front know."""
        if self._decode is not None:
            self._flush(is_news=True)

    def _before_step(self, plan: StepPlan) -> LayerHook | None:
        return self._prefill.step_hook(plan) if self._prefill is not None else None

    def _after_step(self, emitted: list[Emitted]) -> None:
        assert self._prefill is not None
        assert self._decode is not None
        self._in_step = True
        try:
            for sequence, output in emitted:
                (self._prefill if sequence.prefill_only else self._decode).on_output(sequence, output)
        finally:
            self._in_step = False
            self._flush(is_news=any(sequence.prefill_only for sequence, _ in emitted))

    def _emit(self, router_id: str, output: pb.TokenOutput) -> None:
        self._outbox.setdefault(router_id, []).append(output)
        if not self._in_step:
            self._flush()

    def _flush(self, *, is_news: bool = False) -> None:
        """Say what there is to say, and the statistics with it; `is_news`: those in any case."""
        blocks = self._engine.pool.log.take() if self._engine.pool.log is not None else None
        if self._outbox or is_news or blocks is not None:
            if self._decode is not None:
                self._decode.look_for_room()
            outputs = [pb.RouterOutputs(router_id=name, outputs=items) for name, items in self._outbox.items()]
            self._outbox = {}
            step = pb.StepEvent(outputs=outputs, stats=self.stats(), blocks=blocks, draining=self._host.draining)
            self._send(pb.EngineEvent(step=step))

    def _on_loop(self, command: pb.EngineCommand) -> None:
        prefill, decode = self._prefill, self._decode
        if prefill is None or decode is None:
            self._answer(command.call_id, refuse_not_started)
            return
        kind, call_id = command.WhichOneof("command"), command.call_id
        if self._host.draining and kind in ("reserve", "prefill"):
            self._answer(call_id, refuse_draining)
        elif kind == "reserve":
            self._answer(call_id, lambda: pb.EngineReply(reserve=decode.reserve(command.reserve)))
        elif kind == "prefill":
            self._start_prefill(prefill, command)
        elif kind == "ticket":
            prefill.take_ticket(command.ticket)
        elif kind in ("abort_decode", "abort_prefill"):
            worker, abort = (
                (decode, command.abort_decode) if kind == "abort_decode" else (prefill, command.abort_prefill)
            )
            found = worker.abort(abort.request_id, abort.attempt, abort.reason)
            self._reply(call_id, pb.EngineReply(abort=pb.AbortReply(found=found)))
            self._flush(is_news=found)
        elif kind == "adopt":
            self._answer(call_id, lambda: pb.EngineReply(adopt=pb.AdoptReply(found=decode.adopt(command.adopt))))
        elif kind == "router_gone":
            prefill.router_gone(command.router_gone.router_id)
            decode.router_gone(command.router_gone.router_id)
            self._flush(is_news=True)
        elif kind == "drain":  # the front takes nothing new: all it ever asked for is counted here
            self._reply(call_id, pb.EngineReply(stats=self.stats()))
        elif kind == "check":
            self._answer(call_id, self._check)
        elif kind == "hand_back":
            self.hand_back(command.hand_back.reason)
            self._reply(call_id, pb.EngineReply(stats=self.stats()))
        elif kind == "set_role":
            self._host.set_role(command.set_role)
            self._reply(call_id, pb.EngineReply(description=self._describe()))

    def _start_prefill(self, prefill: PrefillWorker, command: pb.EngineCommand) -> None:
        def answer(result: pb.PrefillReply | Exception) -> None:
            if isinstance(result, Exception):
                self._reply(command.call_id, pb.EngineReply(error=error_message(result)))
            else:
                self._reply(command.call_id, pb.EngineReply(prefill=result))

        try:
            prefill.prefill(command.prefill, answer)
        except Exception as error:
            answer(error)

    def _check(self) -> pb.EngineReply:
        assert self._node is not None
        self._check_closed()
        self._node.check_integrity()
        return pb.EngineReply(stats=self.stats())

    # ---- answers ----

    def _answer(self, call_id: int, function: Callable[[], pb.EngineReply]) -> None:
        try:
            reply = function()
        except Exception as error:
            if not isinstance(error, CapacityError | InvalidRequestError):
                log.exception("a command of the front failed")
            reply = pb.EngineReply(error=error_message(error))
        self._reply(call_id, reply)

    def _reply(self, call_id: int, reply: pb.EngineReply) -> None:
        if call_id:
            reply.call_id = call_id
            self._send(pb.EngineEvent(reply=reply))
