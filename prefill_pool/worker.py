"""The prefill craft inside an engine process.

    WAITING --ticket--> COMPUTING --first token--> SENDING --ticket settled--> (gone)
       |                    '---------abort-----------'----> ENDING --ticket settled--> (gone)
       '--abort, or no ticket in time--> (gone)

A prompt may come before its ticket, and the ticket before its prompt: the decode worker sends it over the pair, and the
router behind the prompt; the first to come counts. Nothing is computed, and no block held, without one.
A transfer that fails is the prefill's answer; once the first token has been the answer, the failure goes
to the router's stream as an output. A task holds its sequence's blocks until its send job has settled,
whatever ended it, because the transfer reads from them until then. The engine loop's thread calls
everything here.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine import wire
from engine.api import FinishReason, TokenOutput
from engine.batch import LayerHook, StepPlan
from engine.engine import Engine
from engine.errors import CapacityError, EngineError, InvalidRequestError
from engine.sequence import Sequence
from kv_transfer.group import Transfers
from kv_transfer.ticket import KVTicket, SendResult, TicketState
from prefill_pool.kv_push import KVPush
from protos import worker_pb2 as pb
from protos.transfer_pb2 import PushNote

log = logging.getLogger(__name__)

TICKET_WAIT_S = 30.0
"""Longest wait of a prompt for its ticket; a router gives up on a decode worker long before."""
MAX_GRANTED = 1024
"""Most tickets kept whose prompt has not come; one that is dropped comes again from the router."""
Answer = Callable[[pb.PrefillReply | Exception], None]
Emit = Callable[[str, pb.TokenOutput], None]
"""emit(router_id, output): says something to a router beside the answers."""
Key = tuple[str, int]


class PrefillAborted(EngineError):
    """The router, or the loss of it, ended this prefill."""


class TaskState(enum.Enum):
    """Where a prefill is in its life."""

    COMPUTING = "computing"
    SENDING = "sending"
    ENDING = "ending"


@dataclass(slots=True)
class PrefillTask:
    """One prompt on its way through."""

    sequence: Sequence
    push: KVPush
    answer: Answer
    state: TaskState = TaskState.COMPUTING


@dataclass(slots=True)
class _Waiting:
    """A prompt whose ticket has not come."""

    sequence: Sequence
    answer: Answer


class PrefillWorker:
    """Computes prompts for other workers."""

    def __init__(self, engine: Engine, node: Transfers, *, emit: Emit) -> None:
        self._engine = engine
        self._node = node
        self._emit = emit
        self._tasks: dict[Key, PrefillTask] = {}
        self._waiting: dict[Key, _Waiting] = {}
        self._granted: OrderedDict[Key, KVTicket] = OrderedDict()
        """Tickets whose prompt has not come."""

    def prefill(self, message: pb.PrefillRequest, answer: Answer) -> None:
        """Queue a prompt; `answer` gets the reply with its first token, or the error that ended it."""
        request = wire.request_from_wire(message.request)
        self._engine.validate(request)
        key = (request.request_id, request.attempt)
        if key in self._tasks or key in self._waiting:
            raise CapacityError(f"attempt {request.attempt} of request {request.request_id} is already running here")
        sequence = Sequence.from_request(request, time.monotonic())
        sequence.owner = message.router_id
        sequence.prefill_only = True
        granted = self._granted.pop(key, None)
        if message.HasField("ticket"):
            granted = KVTicket.from_proto(message.ticket)
        if granted is not None:
            self._start(sequence, granted, answer)
            return
        self._waiting[key] = waiting = _Waiting(sequence, answer)
        self._node.call_later(TICKET_WAIT_S, lambda: self._engine.loop.post(lambda: self._give_up(key, waiting)))

    def take_ticket(self, ticket: KVTicket) -> bool:
        """A ticket has come behind its prompt; whether that still waited for it."""
        waiting = self._waiting.pop((ticket.request_id, ticket.attempt), None)
        if waiting is None:
            return False
        try:
            self._start(waiting.sequence, ticket, waiting.answer)
        except Exception as error:
            waiting.answer(error)
        return True

    def granted(self, ticket: KVTicket) -> None:
        """The decode worker has brought a ticket, which may be before its prompt."""
        key = (ticket.request_id, ticket.attempt)
        if self.take_ticket(ticket) or key in self._tasks:
            return
        self._granted[key] = ticket
        while len(self._granted) > MAX_GRANTED:
            self._granted.popitem(last=False)

    def _start(self, sequence: Sequence, ticket: KVTicket, answer: Answer) -> None:
        """Let a prompt be computed under its ticket."""
        key = (sequence.request.request_id, sequence.request.attempt)
        if ticket.num_tokens != sequence.num_tokens:
            raise InvalidRequestError(
                f"the ticket is for {ticket.num_tokens} tokens, the request has {sequence.num_tokens}", field="ticket"
            )
        outlet = self._node.open_send(ticket, lambda result: self._engine.loop.post(lambda: self._settled(key, result)))
        engine = self._engine
        push = KVPush(
            sequence,
            ticket,
            outlet,
            num_layers=engine.runner.config.num_layers,
            block_size=engine.scheduler.block_size,
        )
        self._tasks[key] = PrefillTask(sequence, push, answer)
        self._engine.scheduler.add(sequence)

    def abort(self, request_id: str, attempt: int, reason: str) -> bool:
        """End all attempts of a request up to this one; False if there is none."""
        return self._end_all(lambda key, _: key[0] == request_id and key[1] <= attempt, reason)

    def router_gone(self, router_id: str) -> None:
        """End everything this router asked for."""
        self._end_all(lambda _, sequence: sequence.owner == router_id, f"router {router_id} is gone")

    def close(self) -> None:
        """End everything."""
        self._end_all(lambda *_: True, "the worker's epoch is over")

    def step_hook(self, plan: StepPlan) -> LayerHook | None:
        """Before a step: which layers' KV to send as they are written."""
        pushes, note = [], PushNote() if self._engine.ranks is not None else None
        for share in plan.shares:
            sequence = share.sequence
            if sequence.prefill_only:
                task = self._tasks[sequence.request.request_id, sequence.request.attempt]
                push = task.push.begin_step(share, note)
                if push is not None:
                    pushes.append(push)
        note_bytes = note.SerializeToString() if note is not None else b""
        if not pushes and not note_bytes:
            return None

        def on_layer(layer: int, event: Any) -> None:
            for push in pushes:
                push.layer_written(layer, event)

        return LayerHook(on_layer if pushes else None, note_bytes)

    def must_pause(self, sequence: Sequence) -> bool:
        """Whether a prompt's receiver is too far behind for more of it to be computed now."""
        task = self._tasks.get((sequence.request.request_id, sequence.request.attempt))
        return task is not None and task.push.must_pause(lambda: self._engine.loop.post(_wake))

    def on_output(self, sequence: Sequence, output: TokenOutput) -> None:
        """The engine has computed a prompt's first token (or failed to)."""
        task = self._tasks[sequence.request.request_id, sequence.request.attempt]
        if output.finish_reason is FinishReason.FAILED:
            self._end(task, output.reason)
            return
        first = wire.output_to_wire(output)
        task.state = TaskState.SENDING
        task.answer(  # before the transfer's threads are woken: they want this one's interpreter
            pb.PrefillReply(
                first=first,
                cached_tokens=min(sequence.num_cached_tokens, sequence.num_prompt_tokens),
                queue_s=sequence.first_step_at - sequence.arrival,
                prefill_s=time.monotonic() - sequence.first_step_at,
            )
        )
        task.push.finish(first)

    def holders(self) -> list[Sequence]:
        """Sequences whose blocks are held for sending, beyond those the scheduler knows."""
        return [task.sequence for task in self._tasks.values() if task.state is not TaskState.COMPUTING]

    def num_open(self) -> int:
        """Prefills not yet settled."""
        return len(self._tasks) + len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Prompts whose ticket has not come; any thread may ask."""
        return len(self._waiting)

    def _give_up(self, key: Key, waiting: _Waiting) -> None:
        if self._waiting.get(key) is waiting:
            del self._waiting[key]
            waiting.answer(EngineError(f"no ticket came within {TICKET_WAIT_S:g} s"))

    def _end_all(self, is_meant: Callable[[Key, Sequence], bool], reason: str) -> bool:
        """End prompts in any state; whether there was one."""
        waiting = [key for key, each in self._waiting.items() if is_meant(key, each.sequence)]
        for key in waiting:
            self._waiting.pop(key).answer(PrefillAborted(reason or "aborted"))
        tasks = [task for key, task in self._tasks.items() if is_meant(key, task.sequence)]
        for task in tasks:
            self._end(task, reason)
        return bool(waiting or tasks)

    def _end(self, task: PrefillTask, reason: str) -> None:
        if task.state is TaskState.COMPUTING:
            self._engine.scheduler.abort(task.sequence)
            task.answer(PrefillAborted(reason or "aborted"))
        task.state = TaskState.ENDING
        task.push.abort(reason)

    def _report_failure(self, sequence: Sequence, reason: str) -> None:
        """The router has the first token, but the decode worker may never hear of it."""
        failure = pb.TokenOutput(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            offset=sequence.num_generated_tokens,
            finish=pb.ENGINE_FINISH_FAILED,
            reason=reason,
        )
        self._emit(sequence.owner, failure)

    def _settled(self, key: Key, result: SendResult) -> None:
        """The transfer reads no more: the blocks go back."""
        task = self._tasks[key]
        reason = f"the transfer ended {result.state.name}: {result.reason}"
        if task.state is TaskState.COMPUTING:
            self._end(task, reason)
        elif task.state is TaskState.SENDING and result.state is not TicketState.DELIVERED:
            self._report_failure(task.sequence, reason)
        del self._tasks[key]
        self._engine.scheduler.release(task.sequence)
        log.info(
            "prefill settled",
            extra={
                "request_id": key[0],
                "attempt": key[1],
                "num_tokens": task.sequence.num_computed_tokens,
                "num_cached_tokens": task.sequence.num_cached_tokens,
                "ticket": result.state.name,
                "reason": result.reason,
            },
        )


def _wake() -> None:
    """Have the loop come round and schedule again."""
