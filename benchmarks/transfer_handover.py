"""Section `hand-over`: one prompt computed on one GPU and answered on the other, by the two crafts themselves.

The run plays the router: it reserves, prefills and reads the answer, over pipes instead of gRPC. In between the same
engine answers prompts alone, asked over the same pipe, and tickets of the same size are moved whose KV is there.
"""

from __future__ import annotations

import queue
import threading
import time
from functools import partial
from typing import Any

from benchmarks.engine_trace import Tracer
from benchmarks.transfer_side import Side
from benchmarks.transfer_tickets import Node
from decode_pool.config import DecodeOptions
from decode_pool.worker import DecodeWorker
from engine import wire
from engine.batch import LayerHook, StepPlan
from engine.engine import Engine
from engine.scheduler import Emitted
from engine.sequence import Sequence
from prefill_pool.worker import PrefillWorker
from protos import worker_pb2 as pb

WAIT_S = 50.0
ROUTER = "benchmark"


class Crafts:
    """The prefill craft on the sender, the decode craft on the receiver, each on its engine's loop."""

    def __init__(self, side: Side, node: Node) -> None:
        self._side = side
        self._node = node
        self._prefill: PrefillWorker | None = None
        self._decode: DecodeWorker | None = None
        self._lock = threading.Lock()
        self._streams: dict[str, queue.SimpleQueue[Any]] = {}
        """Of each request: (moment, TokenOutput message) or an error."""
        self._begun: list[queue.SimpleQueue[tuple[float, pb.PrefillReply | Exception]]] = []
        """The answers of the prompts begun last."""
        self._tracer: Tracer | None = None

    def open(self) -> None:
        """Join the crafts to the engine and the node, which is open."""
        engine, node = self._engine, self._node.node
        assert node is not None, "the node is open"
        self._prefill = PrefillWorker(engine, node, emit=self._emit)
        self._decode = DecodeWorker(
            engine, node, DecodeOptions(), max_running=self._side.plan.batch, name=self._side.name, emit=self._emit
        )

        def take_loop() -> None:
            assert self._prefill is not None
            engine.scheduler.is_held = self._prefill.must_pause
            engine.loop.step_hook = self._before_step
            engine.loop.on_step = self._after_step

        self._side.on_loop(take_loop)
        prefill = self._prefill
        node.on_granted = lambda ticket: engine.loop.post(lambda: prefill.granted(ticket))

    def identity(self) -> tuple[str, int]:
        """How tickets name this side."""
        assert self._node.node is not None, "the node is open"
        return self._node.node.identity.worker_id, self._node.node.identity.epoch

    def close(self) -> None:
        """End everything and leave the loop as it was."""
        if self._prefill is None or self._decode is None:
            return
        engine = self._engine
        self._side.on_loop(self._prefill.close)
        self._side.on_loop(self._decode.close)

        def leave_loop() -> None:
            engine.loop.step_hook = engine.loop.on_step = None
            engine.scheduler.is_held = lambda sequence: False

        self._node.close()
        self._side.on_loop(leave_loop)
        self._prefill = self._decode = None

    # -- the run's calls

    def alone(self, request: bytes) -> tuple[list[tuple[float, list[int]]], float]:
        """Have this engine answer the whole request; the moments and tokens of its steps, and seconds to the first."""
        message = pb.EngineRequest.FromString(request)
        sequence = Sequence.from_request(wire.request_from_wire(message), time.monotonic())
        self._stream(message.request_id)
        self._engine.loop.post(lambda: self._engine.scheduler.add(sequence))
        steps = self.collect(message.request_id)
        return steps, steps[0][0] - sequence.arrival

    def reserve(self, request: bytes, sender: tuple[str, int] | None = None) -> bytes:
        """Promise blocks; a ReserveReply. A sender that is named also hears of them over the pair, if there is one."""
        message = pb.ReserveRequest(router_id=ROUTER, request=pb.EngineRequest.FromString(request))
        if sender is not None:
            message.prefill.worker_id, message.prefill.epoch = sender
        decode = self._decode
        assert decode is not None, "the crafts are open"
        self._stream(message.request.request_id)
        reply: pb.ReserveReply = self._side.on_loop(lambda: decode.reserve(message))
        return reply.SerializeToString()

    def reserve_all(self, requests: list[bytes], sender: tuple[str, int]) -> list[bytes]:
        """Promise blocks for each of them."""
        return [self.reserve(request, sender) for request in requests]

    def begin(self, requests: list[bytes], receiver: tuple[str, int]) -> None:
        """Take prompts in, all posted at once; they are computed when their tickets are there."""
        prefill = self._prefill
        assert prefill is not None, "the crafts are open"
        self._begun = []
        for request in requests:
            message = pb.PrefillRequest(router_id=ROUTER, request=pb.EngineRequest.FromString(request))
            message.receiver.worker_id, message.receiver.epoch = receiver
            self._begun.append(queue.SimpleQueue())
            self._engine.loop.post(partial(_begin, prefill, message, self._begun[-1]))

    def take_tickets(self, reserved: list[bytes]) -> None:
        """The tickets of the prompts begun, which may have come over the pair already."""
        prefill = self._prefill
        assert prefill is not None, "the crafts are open"
        for reply in reserved:
            self._engine.loop.post(partial(prefill.take_ticket, pb.ReserveReply.FromString(reply).ticket))

    def replies(self) -> list[tuple[bytes, float]]:
        """The PrefillReplies of the prompts begun, and when they were there."""
        answers = [answers.get(timeout=WAIT_S) for answers in self._begun]
        replies = []
        for moment, answer in answers:
            if isinstance(answer, Exception):
                raise answer
            replies.append((answer.SerializeToString(), moment))
        return replies

    def collect(self, request_id: str) -> list[tuple[float, list[int]]]:
        """The moments and tokens of a request's steps, once it has ended."""
        return [(moment, list(output.token_ids)) for moment, output in self._outputs(request_id)]

    def collect_with_timing(self, request_id: str) -> tuple[list[tuple[float, list[int]]], dict[str, Any]]:
        """The same, and what the receiver noted about the request's KV."""
        outputs = self._outputs(request_id)
        timing = outputs[0][1].timing
        noted = {
            "tail_s": timing.transfer_tail_s,
            "busy_s": timing.transfer_busy_s,
            "bytes": timing.transfer_bytes,
            "first_step_s": timing.first_step_s,
        }
        return [(moment, list(output.token_ids)) for moment, output in outputs], noted

    def settled(self) -> None:
        """Return when nothing of any request is left here."""
        deadline = time.monotonic() + WAIT_S
        while self._side.on_loop(self._num_open):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._num_open()} requests were still open after {WAIT_S:g} s")
            time.sleep(0.001)

    def forget(self) -> None:
        """Have no prompt's KV found again."""
        self._side.on_loop(self._engine.pool.forget_all)

    def begin_trace(self) -> None:
        """Record every kernel of this process from now on."""
        self._tracer = Tracer()
        self._side.on_loop(self._tracer.start)

    def end_trace(self) -> list[tuple[str, float, float, int]]:
        """Name, start and end in microseconds, and stream of all that ran since."""
        tracer, self._tracer = self._tracer, None
        assert tracer is not None, "begin_trace comes first"
        self._side.on_loop(tracer.stop)
        return [(kernel.name, kernel.start, kernel.end, kernel.stream) for kernel in tracer.kernels()]

    # -- on the loop's thread

    def _before_step(self, plan: StepPlan) -> LayerHook | None:
        return self._prefill.step_hook(plan) if self._prefill is not None else None

    def _after_step(self, emitted: list[Emitted]) -> None:
        assert self._prefill is not None
        assert self._decode is not None
        for sequence, output in emitted:
            if sequence.prefill_only:
                self._prefill.on_output(sequence, output)
            elif sequence.owner == ROUTER:
                self._decode.on_output(sequence, output)
            else:
                self._emit("", wire.output_to_wire(output))

    def _emit(self, router_id: str, output: pb.TokenOutput) -> None:
        with self._lock:
            stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put((time.monotonic(), output))

    # -- inside

    @property
    def _engine(self) -> Engine:
        assert self._side.engine is not None, "start_engine comes first"
        return self._side.engine

    def _num_open(self) -> int:
        assert self._prefill is not None
        assert self._decode is not None
        return self._prefill.num_open() + self._decode.num_open()

    def _stream(self, request_id: str) -> None:
        with self._lock:
            self._streams[request_id] = queue.SimpleQueue()

    def _outputs(self, request_id: str) -> list[tuple[float, pb.TokenOutput]]:
        stream = self._streams[request_id]
        outputs: list[tuple[float, pb.TokenOutput]] = []
        while not outputs or outputs[-1][1].finish == pb.ENGINE_FINISH_NONE:
            outputs.append(stream.get(timeout=WAIT_S))
        with self._lock:
            del self._streams[request_id]
        last = outputs[-1][1]
        if last.finish in (pb.ENGINE_FINISH_FAILED, pb.ENGINE_FINISH_ABORTED):
            raise RuntimeError(f"request {request_id} ended: {last.reason}")
        return outputs


def _begin(
    prefill: PrefillWorker,
    message: pb.PrefillRequest,
    answers: queue.SimpleQueue[tuple[float, pb.PrefillReply | Exception]],
) -> None:
    """Queue a prompt, on the loop's thread."""
    try:
        prefill.prefill(message, lambda answer: answers.put((time.monotonic(), answer)))
    except Exception as error:
        answers.put((time.monotonic(), error))
