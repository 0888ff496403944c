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
from kv_transfer.handshake import Identity
from kv_transfer.ticket import KVTicket, SendResult, TicketState
from prefill_pool.early_tickets import EarlyTickets, Key
from prefill_pool.kv_push import KVPush
from protos import worker_pb2 as pb
from protos.transfer_pb2 import PushNote

log = logging.getLogger(__name__)

TICKET_WAIT_S = 60.0
"""Longest wait of a prompt for its ticket; a router waits for it no longer than half of that."""
Answer = Callable[[pb.PrefillReply | Exception], None]
Emit = Callable[[str, pb.TokenOutput], None]
"""emit(router_id, output): says something to a router beside the answers."""


class PrefillAborted(EngineError):
    """The router, or the loss of it, ended this prefill."""


class TaskState(enum.Enum):
    """Where a prefill is in its life."""

    WAITING = "waiting"
    COMPUTING = "computing"
    SENDING = "sending"
    ENDING = "ending"


@dataclass(slots=True)
class PrefillTask:
    """One prompt on its way through."""

    sequence: Sequence
    answer: Answer
    receiver: Identity
    """Whose ticket it needs."""
    push: KVPush | None = None
    """None while it waits for that."""
    state: TaskState = TaskState.WAITING

    @property
    def kv(self) -> KVPush:
        """How its KV leaves, once it has a ticket."""
        assert self.push is not None, "nothing is computed without a ticket"
        return self.push

    @property
    def key(self) -> Key:
        """The request and its attempt."""
        return self.sequence.request.request_id, self.sequence.request.attempt


class PrefillWorker:
    """Computes prompts for other workers."""

    def __init__(self, engine: Engine, node: Transfers, *, emit: Emit) -> None:
        self.num_waiting = 0
        """Prompts whose ticket has not come; any thread may ask."""
        self._engine = engine
        self._node = node
        self._emit = emit
        self._tasks: dict[Key, PrefillTask] = {}
        self._early = EarlyTickets()

    def prefill(self, message: pb.PrefillRequest, answer: Answer) -> None:
        """Queue a prompt; `answer` gets the reply with its first token, or the error that ended it."""
        request = wire.request_from_wire(message.request)
        self._engine.validate(request)
        ticket = _ticket_of(message.ticket) if message.HasField("ticket") else None
        wanted = message.receiver if message.HasField("receiver") else message.ticket.receiver
        if not wanted.worker_id:
            raise InvalidRequestError("neither the ticket nor its receiver is named", field="ticket")
        sequence = Sequence.from_request(request, time.monotonic())
        sequence.owner = message.router_id
        sequence.prefill_only = True
        task = PrefillTask(sequence, answer, Identity(wanted.worker_id, wanted.epoch))
        if task.key in self._tasks:
            raise CapacityError(f"attempt {request.attempt} of request {request.request_id} is already running here")
        early = self._early.take(sequence.owner, task.receiver, task.key)
        if ticket is not None:
            self._start(task, ticket)
            return
        self._tasks[task.key] = task
        self.num_waiting += 1
        if early is None or not self._take(task, early):
            self._bound_wait(task.key, task.receiver, sequence.arrival)

    def take_ticket(self, message: pb.KVTicket) -> None:
        """The router has sent a ticket behind its prompt, which may have had it before."""
        task = self._tasks.get((message.request_id, message.attempt))
        if task is None or task.state is not TaskState.WAITING:
            return
        try:
            ticket = _ticket_of(message)
            if not self._take(task, ticket):
                raise InvalidRequestError(self._objection(task, ticket), field="ticket")
        except InvalidRequestError as error:
            self._drop(task, error)

    def granted(self, ticket: KVTicket) -> None:
        """A decode worker has brought a ticket: for a prompt that waits for it, or that is still to come."""
        task = self._tasks.get((ticket.request_id, ticket.attempt))
        if task is None:
            self._early.add(ticket)
        elif task.state is TaskState.WAITING and not self._early.is_over(ticket):
            self._take(task, ticket)

    def _take(self, task: PrefillTask, ticket: KVTicket) -> bool:
        """Let a prompt that waits be computed under a ticket; False if that is not for it."""
        if self._objection(task, ticket):
            return False
        del self._tasks[task.key]
        self.num_waiting -= 1
        try:
            self._start(task, ticket)
        except Exception as error:
            task.answer(error)
        return True

    def _objection(self, task: PrefillTask, ticket: KVTicket) -> str:
        """What is wrong with a ticket; empty if nothing."""
        size = self._engine.scheduler.block_size
        if Identity(ticket.worker_id, ticket.epoch) != task.receiver:
            return f"the ticket is of {ticket.worker_id}/{ticket.epoch}, {task.receiver}'s is awaited"
        if ticket.owner and ticket.owner != task.sequence.owner:
            return f"the ticket is for {ticket.owner}"
        if ticket.num_tokens != task.sequence.num_tokens:
            return f"the ticket is for {ticket.num_tokens} tokens, the request has {task.sequence.num_tokens}"
        if not 0 <= ticket.first_token < ticket.num_tokens or ticket.first_token % size:
            return f"the ticket begins at token {ticket.first_token}, which is no block's first"
        if ticket.layout.num_layers != self._engine.runner.config.num_layers:
            return f"the ticket is for {ticket.layout.num_layers} layers"
        return ""

    def _start(self, task: PrefillTask, ticket: KVTicket) -> None:
        """Compute a prompt under a ticket."""
        if objection := self._objection(task, ticket):
            raise InvalidRequestError(objection, field="ticket")
        key, engine = task.key, self._engine
        outlet = self._node.open_send(ticket, lambda result: engine.loop.post(lambda: self._settled(key, result)))
        task.push = KVPush(
            task.sequence,
            ticket,
            outlet,
            num_layers=engine.runner.config.num_layers,
            block_size=engine.scheduler.block_size,
        )
        task.state = TaskState.COMPUTING
        self._tasks[key] = task
        engine.scheduler.add(task.sequence)

    def abort(self, request_id: str, attempt: int, reason: str) -> bool:
        """End all attempts of a request up to this one; False if there is none."""
        self._early.drop(request_id, attempt)
        tasks = [task for key, task in self._tasks.items() if key[0] == request_id and key[1] <= attempt]
        return self._end_all(tasks, reason)

    def router_gone(self, router_id: str) -> None:
        """End everything this router asked for."""
        self._early.drop_owner(router_id)
        tasks = [task for task in self._tasks.values() if task.sequence.owner == router_id]
        self._end_all(tasks, f"router {router_id} is gone")

    def close(self) -> None:
        """End everything."""
        self._end_all(list(self._tasks.values()), "the worker's epoch is over")

    def step_hook(self, plan: StepPlan) -> LayerHook | None:
        """Before a step: which layers' KV to send as they are written."""
        pushes, note = [], PushNote() if self._engine.ranks is not None else None
        for share in plan.shares:
            sequence = share.sequence
            if sequence.prefill_only:
                task = self._tasks[sequence.request.request_id, sequence.request.attempt]
                push = task.kv.begin_step(share, note)
                if push is not None:
                    pushes.append(push)
        note_bytes = note.SerializeToString() if note is not None else b""
        if not pushes and not note_bytes:
            return None

        def on_layer(layer: int, event: Any) -> None:
            for push in pushes:
                push.layer_written(layer, event)

        layers = frozenset[int]().union(*(push.layers for push in pushes))
        return LayerHook(on_layer if pushes else None, note_bytes, layers)

    def must_pause(self, sequence: Sequence) -> bool:
        """Whether a prompt's receiver is too far behind for more of it to be computed now."""
        task = self._tasks.get((sequence.request.request_id, sequence.request.attempt))
        return task is not None and task.kv.must_pause(lambda: self._engine.loop.post(_wake))

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
                queue_s=sequence.first_step_at - sequence.came_at,
                prefill_s=time.monotonic() - sequence.first_step_at,
            )
        )
        task.kv.finish(first)

    def holders(self) -> list[Sequence]:
        """Sequences whose blocks are held for sending, beyond those the scheduler knows."""
        return [task.sequence for task in self._tasks.values() if task.state in (TaskState.SENDING, TaskState.ENDING)]

    def num_open(self) -> int:
        """Prefills not yet settled."""
        return len(self._tasks)

    def _bound_wait(self, key: Key, receiver: Identity, arrival: float) -> None:
        """See to it that a prompt does not wait for ever; what is kept for that is small."""
        loop = self._engine.loop
        self._node.call_later(TICKET_WAIT_S, lambda: loop.post(lambda: self._give_up(key, receiver, arrival)))

    def _give_up(self, key: Key, receiver: Identity, arrival: float) -> None:
        task = self._tasks.get(key)
        if task is not None and task.state is TaskState.WAITING and task.sequence.arrival == arrival:
            self._drop(task, EngineError(f"no ticket of {receiver} came within {TICKET_WAIT_S:g} s"))

    def _drop(self, task: PrefillTask, why: Exception) -> None:
        """A prompt that waits for its ticket is not computed."""
        del self._tasks[task.key]
        self.num_waiting -= 1
        task.answer(why)

    def _end_all(self, tasks: list[PrefillTask], reason: str) -> bool:
        """End prompts in any state; whether there was one."""
        for task in tasks:
            self._end(task, reason)
        return bool(tasks)

    def _end(self, task: PrefillTask, reason: str) -> None:
        if task.push is None:
            self._drop(task, PrefillAborted(reason or "aborted"))
            return
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


def _ticket_of(message: pb.KVTicket) -> KVTicket:
    try:
        return KVTicket.from_proto(message)
    except ValueError as error:
        raise InvalidRequestError(str(error), field="ticket") from error


def _wake() -> None:
    """Have the loop come round and schedule again."""
