"""A rank other than 0: computes the steps that rank 0 tells it, with mirrored sequences.

    NEW --connect--> WAITING --all ranks are here--> MET --rank 0's stop, or close--> ENDED
                        '--rank 0 is gone or silent------'--> LOST

It schedules nothing and answers nobody. It still reads each step's outcome, `run_ahead` steps later (at once where one
has failed), which bounds what is under way. Logits that are not numbers are so on all ranks: rank 0 ends the requests,
and this rank goes on. Any other failure here ends the worker's epoch.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from engine.batch import LayerHook, OnLayer
from engine.errors import EngineError, RankLostError
from engine.loop import Runner, StepUnderWay
from engine.mirror import StepMirror
from engine.parallel import MEET_TIMEOUT_S, TensorParallel, connect
from engine.rank_link import RankLink
from engine.rank_store import rank_store
from engine.ranks import GATHER_TIMEOUT_S
from protos import ranks_pb2 as pb

log = logging.getLogger(__name__)

RETRY_S = 0.1


class FollowerState(enum.Enum):
    """What a rank has of rank 0."""

    NEW = "new"
    WAITING = "waiting"
    MET = "met"
    LOST = "lost"
    ENDED = "ended"


class Follower:
    """One rank's tie to rank 0."""

    def __init__(self, path: str, rank: int, size: int, *, timeout_s: float = 10.0) -> None:
        """`path` and `timeout_s` are those of rank 0's RankGroup."""
        self.state = FollowerState.NEW
        self.rank = rank
        self.num_steps = 0
        """Steps launched so far."""
        self.on_order: Callable[[bytes], None] | None = None
        """Called with each order of rank 0 on the thread that computes, in its place among the steps."""
        self.make_hook: Callable[[bytes], OnLayer | None] | None = None
        """Makes a step's on_layer of the note that came with it; called only where there is one."""
        self.on_lost: Callable[[str], None] | None = None
        """Called once, on any thread, when rank 0 is gone. It may end the process."""
        self._path = path
        self._size = size
        self._timeout_s = timeout_s
        self._link: RankLink | None = None
        self._store = rank_store(self._publish, MEET_TIMEOUT_S)
        self._mirror = StepMirror()
        self._changing = threading.Lock()
        self._welcomed = threading.Event()
        """Set once this rank need not wait for the others any more: they are here, or never will be."""
        self._reason = ""
        """Why rank 0 is lost."""
        self._inbox: queue.SimpleQueue[pb.RankMessage | None] = queue.SimpleQueue()
        self._under_way: deque[StepUnderWay] = deque()

    def connect(self, device: torch.device, timeout_s: float = GATHER_TIMEOUT_S) -> TensorParallel:
        """Find rank 0, wait for the other ranks and join them; RankLostError if that takes too long."""
        torch.zeros(1, device=device)  # a GPU's start may keep a process silent: it comes before the heartbeats
        deadline = time.monotonic() + timeout_s
        self._move(FollowerState.WAITING, FollowerState.NEW)
        self._link = RankLink(
            self._dial(deadline, timeout_s),
            "rank 0",
            timeout_s=self._timeout_s,
            handle=self._handle,
            on_end=self._lose,
        )
        self._send(pb.RankMessage(hello=pb.RankHello(rank=self.rank, size=self._size, device=device.type)))
        self._link.start()
        if not self._welcomed.wait(max(0.0, deadline - time.monotonic())):
            raise RankLostError(f"the other ranks did not come to {self._path} within {timeout_s:g} s")
        self._raise_if_lost()
        return connect(self.rank, self._size, self._store, device, self._timeout_s)

    def serve(self, runner: Runner) -> None:
        """Compute what rank 0 tells until it ends; RankLostError if it is gone, or the error that a step failed with.

        The kernels should be warm. The wait for the next message is bounded by rank 0's heartbeats.
        """
        if self._link is not None:
            self._link.settle()
        try:
            while (message := self._inbox.get()) is not None:
                if message.WhichOneof("message") == "step":
                    self._step(runner, message.step)
                elif self.on_order is not None:
                    self.on_order(message.order)
            self._raise_if_lost()
            self._drain()
        except Exception as error:
            self._tell_failure(error)
            raise

    def report(self, payload: bytes) -> None:
        """Hand something to rank 0's `on_report`, from any thread; RankLostError if it is gone."""
        self._send(pb.RankMessage(report=payload))

    def leave(self) -> None:
        """Ask rank 0 to drain the worker and end it; RankLostError if it is gone."""
        self._send(pb.RankMessage(stop=pb.RankStop()))

    def close(self) -> None:
        """Hang up, and end `serve`."""
        self._end(FollowerState.ENDED, "this rank has ended")
        if self._link is not None:
            self._link.close()

    def num_mirrored(self) -> int:
        """Sequences held here."""
        return self._mirror.num_mirrored()

    # ---- inside ----

    def _dial(self, deadline: float, timeout_s: float) -> socket.socket:
        """A connection to rank 0, as soon as it listens."""
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(self._timeout_s)
            try:
                connection.connect(self._path)
                return connection
            except OSError as error:
                connection.close()
                if time.monotonic() > deadline or self._welcomed.wait(RETRY_S):
                    raise RankLostError(f"rank 0 did not listen at {self._path} within {timeout_s:g} s") from error

    def _step(self, runner: Runner, step: pb.RankStep) -> None:
        if not step.shares:  # one of those before has failed (`RankGroup.catch_up`)
            while self._under_way:
                self._take_oldest()
            return
        plan = self._mirror.plan(step)
        hook = None
        if step.note and self.make_hook is not None:
            hook = LayerHook(self.make_hook(step.note))
        self._under_way.append(runner.launch(plan, hook))
        self.num_steps += 1
        if len(self._under_way) > runner.run_ahead:
            self._take_oldest()

    def _take_oldest(self) -> None:
        try:
            self._under_way.popleft().result()
        except RankLostError:
            raise
        except EngineError as error:
            log.warning("a step failed, on all ranks alike: %s", error)

    def _drain(self) -> None:
        """Nobody reads the steps under way any more, but their memory is in use until they are done."""
        while self._under_way:
            with contextlib.suppress(Exception):
                self._under_way.popleft().result()

    def _handle(self, message: pb.RankMessage) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._move(FollowerState.MET, FollowerState.WAITING)
                self._welcomed.set()
            case "value":
                self._store.put(message.value.key, message.value.value)
            case "failure":
                self._lose(message.failure.reason)
            case "step" | "order":
                self._inbox.put(message)
            case "stop":
                self._end(FollowerState.ENDED, "rank 0 has ended")

    def _lose(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._end(FollowerState.LOST, reason):
            log.error("rank %d has lost rank 0: %s", self.rank, reason)
            if self.on_lost is not None:
                self.on_lost(reason)

    def _end(self, state: FollowerState, reason: str) -> bool:
        """Wake whoever waits for more of rank 0; False if it has ended before."""
        if not self._move(state, FollowerState.NEW, FollowerState.WAITING, FollowerState.MET):
            return False
        self._store.close(reason)
        self._welcomed.set()
        self._inbox.put(None)
        return True

    def _move(self, following: FollowerState, *present: FollowerState) -> bool:
        """Change the state; False if it is none of `present`."""
        with self._changing:
            if self.state not in present:
                return False
            self.state = following
            return True

    def _raise_if_lost(self) -> None:
        if self.state is FollowerState.LOST:
            raise RankLostError(f"rank {self.rank} has lost rank 0: {self._reason}")

    def _tell_failure(self, error: Exception) -> None:
        reason = pb.RankFailure(reason=f"rank {self.rank} cannot go on: {type(error).__name__}: {error}")
        with contextlib.suppress(RankLostError):
            self._send(pb.RankMessage(failure=reason))

    def _publish(self, key: str, value: bytes) -> None:
        self._send(pb.RankMessage(value=pb.RankValue(key=key, value=value)))

    def _send(self, message: pb.RankMessage) -> None:
        if self._link is None:
            raise RankLostError("this rank is not connected to rank 0")
        self._link.send(message)
