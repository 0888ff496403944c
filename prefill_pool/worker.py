"""The prefill craft inside an engine process.

    QUEUED --first step--> COMPUTING --first token--> SENDING --ticket settled--> (gone)
       '--------abort---------'---------abort-----------'----> ENDING --ticket settled--> (gone)

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
from kv_transfer.ticket import KVTicket, SendResult, TicketState
from prefill_pool.kv_push import KVPush
from protos import worker_pb2 as pb
from protos.transfer_pb2 import PushNote

log = logging.getLogger(__name__)

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


class PrefillWorker:
    """Computes prompts for other workers."""

    def __init__(self, engine: Engine, node: Transfers, *, emit: Emit) -> None:
        self._engine = engine
        self._node = node
        self._emit = emit
        self._tasks: dict[Key, PrefillTask] = {}

    def prefill(self, message: pb.PrefillRequest, answer: Answer) -> None:
        """Queue a prompt; `answer` gets the reply with its first token, or the error that ended it."""
        request = wire.request_from_wire(message.request)
        self._engine.validate(request)
        key = (request.request_id, request.attempt)
        if key in self._tasks:
            raise CapacityError(f"attempt {request.attempt} of request {request.request_id} is already running here")
        ticket = KVTicket.from_proto(message.ticket)
        sequence = Sequence.from_request(request, time.monotonic())
        if ticket.num_tokens != sequence.num_tokens:
            raise InvalidRequestError(
                f"the ticket is for {ticket.num_tokens} tokens, the request has {sequence.num_tokens}", field="ticket"
            )
        sequence.owner = message.router_id
        sequence.prefill_only = True
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
        keys = [key for key in self._tasks if key[0] == request_id and key[1] <= attempt]
        for key in keys:
            self._end(self._tasks[key], reason)
        return bool(keys)

    def router_gone(self, router_id: str) -> None:
        """End everything this router asked for."""
        for task in list(self._tasks.values()):
            if task.sequence.owner == router_id:
                self._end(task, f"router {router_id} is gone")

    def close(self) -> None:
        """End everything."""
        for task in list(self._tasks.values()):
            self._end(task, "the worker's epoch is over")

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
        return len(self._tasks)

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
