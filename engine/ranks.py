"""Rank 0's hold on the other ranks of its worker.

    NEW --connect--> GATHERING --all are here--> MET --close--> CLOSED
                         '--a rank is gone, silent, or failed---> LOST

Each step is told to the other ranks before rank 0 computes its own part, so all compute the same steps in the same
order; since sampling depends on the logits and (seed, position) alone, all choose the same tokens, and only rank 0 has
readers for them. What else a rank must do goes the same way (`order`), so it has its place among the steps.

A rank that is lost ends the worker's epoch: there is no step without it, so rank 0's process ends too (`on_lost`), the
others follow, and all start again. A step that was told to the others and then could not be launched here is
such a loss as well: they stand in the middle of it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from engine.batch import LayerHook, StepPlan, StepResult
from engine.errors import EngineError, RankLostError
from engine.ipc import listen_privately
from engine.loop import Runner, StepUnderWay
from engine.mirror import StepTeller
from engine.parallel import MEET_TIMEOUT_S, TensorParallel, connect
from engine.rank_link import HEARTBEAT_S, RankLink
from engine.rank_store import rank_store
from protos import framing
from protos import ranks_pb2 as pb

log = logging.getLogger(__name__)

GATHER_TIMEOUT_S = 120.0
"""Longest that ranks wait for each other's processes to start."""
STEP_TIMEOUT_S = 60.0
"""Longest that a step may take on a GPU once the kernels are warm."""
BLAME_S = 1.0
"""How long rank 0 waits to hear which rank is to blame for a step that could not be computed together."""


class GroupState(enum.Enum):
    """Whether the ranks of a worker are together."""

    NEW = "new"
    GATHERING = "gathering"
    MET = "met"
    LOST = "lost"
    CLOSED = "closed"


class RankGroup:
    """The other ranks of a worker, as rank 0 has them."""

    def __init__(
        self, path: str, size: int, *, timeout_s: float = 10.0, gather_timeout_s: float = GATHER_TIMEOUT_S
    ) -> None:
        """`path` is where rank 0 listens; `timeout_s` the longest that a rank may be silent once all have settled."""
        self.state = GroupState.NEW
        self.size = size
        self.ended = threading.Event()
        """Set once a rank is lost, or the group is closed."""
        self.on_lost: Callable[[int, str], None] | None = None
        """Called once, with the rank (0: this one) and the reason; on any thread. It may end the process."""
        self.on_report: Callable[[int, bytes], None] | None = None
        """Called with a rank and what it reported, on that rank's reader thread: it must not block, nor fail."""
        self.on_leave: Callable[[int], None] | None = None
        """Called when a rank was asked to end, on its reader thread: the worker should drain and end."""
        self._path = path
        self._timeout_s = timeout_s
        self._gather_timeout_s = gather_timeout_s
        self._links: dict[int, RankLink] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._store = rank_store(partial(self._publish, 0), MEET_TIMEOUT_S)
        self._teller = StepTeller()
        self._changing = threading.Lock()
        self._in_order = threading.RLock()
        """Held while all ranks are told something, so that they hear everything in one order."""

    def connect(self, device: torch.device) -> TensorParallel:
        """Wait for the other ranks and join them; RankLostError if one does not come in time, or is lost meanwhile."""
        torch.zeros(1, device=device)  # a GPU's start may keep a process silent: it comes before the heartbeats
        self._move(GroupState.NEW, GroupState.GATHERING)
        try:
            listen_privately(self._listener, self._path)
            self._gather(device)
        finally:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        if not self._move(GroupState.GATHERING, GroupState.MET):
            raise RankLostError(f"a rank of this worker was lost at the start (the group is {self.state.value})")
        self._broadcast(pb.RankMessage(welcome=pb.RankWelcome()))
        return connect(0, self.size, self._store, device, self._timeout_s)

    def settle(self) -> None:
        """The kernels are warm, here and at the other ranks: from now on `timeout_s` holds."""
        for link in self._links.values():
            link.settle()

    def announce(self, plan: StepPlan, note: bytes = b"") -> None:
        """Tell all ranks of the next step (the loop's thread); RankLostError if one is gone."""
        if self.state is GroupState.MET:
            self._broadcast(pb.RankMessage(step=self._teller.tell(plan, note)))
        if self.state is not GroupState.MET:
            raise RankLostError("a rank of this worker is gone: its epoch is over")

    def catch_up(self) -> None:
        """Have all ranks read the outcome of every step so far, before whatever they are told next.

        A step has failed, and its reader cleans up behind it: no block that it wrote may have a new owner before.
        """
        if self.state is GroupState.MET:
            self._broadcast(pb.RankMessage(step=pb.RankStep()))

    def order(self, payload: bytes) -> None:
        """Hand something to every other rank's `on_order`, in order with the steps; dropped once a rank is lost."""
        if self.state is GroupState.MET:
            self._broadcast(pb.RankMessage(order=payload))

    def fail(self, reason: str) -> None:
        """This rank cannot go on: the worker's epoch is over."""
        self._lose(0, reason)

    def close(self) -> None:
        """End the other ranks as they should end."""
        with self._changing:
            lost = self.state is GroupState.LOST
            self.state = GroupState.CLOSED
        if not lost:
            self._broadcast(pb.RankMessage(stop=pb.RankStop()))
        self._hang_up("rank 0 has ended")
        for link in self._links.values():
            link.close()

    def num_mirrored(self) -> int:
        """Sequences that the other ranks hold."""
        return self._teller.num_mirrored()

    # ---- inside ----

    def _gather(self, device: torch.device) -> None:
        deadline = time.monotonic() + self._gather_timeout_s
        while len(self._links) < self.size - 1 and self.state is GroupState.GATHERING:
            missing = sorted(set(range(1, self.size)) - set(self._links))
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError as error:
                self._move(GroupState.GATHERING, GroupState.LOST)
                raise RankLostError(
                    f"ranks {missing} did not connect to {self._path} within {self._gather_timeout_s:g} s"
                ) from error
            except OSError:
                if self.state is GroupState.GATHERING:
                    raise
                return  # a rank was lost, and the listener shut down for it
            self._admit(connection, device)

    def _admit(self, connection: socket.socket, device: torch.device) -> None:
        """Take in a rank, or hang up on whoever is none."""
        connection.settimeout(self._timeout_s)
        try:
            message = framing.read_message(connection, pb.RankMessage)
            hello = message.hello if message is not None else pb.RankHello()
            problem = self._problem(hello, device)
            if problem:
                refusal = pb.RankMessage(failure=pb.RankFailure(reason=f"rank 0 refuses it: {problem}"))
                connection.sendall(framing.pack(refusal))
        except OSError as error:
            problem = str(error)
        if problem:
            log.warning("a connection to rank 0 was refused: %s", problem)
            connection.close()
            return
        rank = hello.rank
        self._links[rank] = RankLink(
            connection,
            f"rank {rank}",
            timeout_s=self._timeout_s,
            handle=partial(self._handle, rank),
            on_end=partial(self._lose, rank),
        )
        self._links[rank].start()

    def _problem(self, hello: pb.RankHello, device: torch.device) -> str:
        """Why this is not a rank that is waited for; empty if it is."""
        if hello.size != self.size or not 0 < hello.rank < self.size:
            return f"it calls itself rank {hello.rank} of {hello.size}, this worker has {self.size}"
        if hello.rank in self._links:
            return f"rank {hello.rank} is here already"
        if hello.device != device.type:
            return f"it computes on {hello.device} and rank 0 on {device.type}; set device to the one that both have"
        return ""

    def _handle(self, rank: int, message: pb.RankMessage) -> None:
        match message.WhichOneof("message"):
            case "value":
                self._store.put(message.value.key, message.value.value)
                self._publish(rank, message.value.key, message.value.value)
            case "report" if self.on_report is not None:
                self.on_report(rank, message.report)
            case "failure":
                self._lose(rank, message.failure.reason)
            case "stop" if self.on_leave is not None:
                self.on_leave(rank)

    def _publish(self, origin: int, key: str, value: bytes) -> None:
        self._broadcast(pb.RankMessage(value=pb.RankValue(key=key, value=value)), skip=origin)

    def _broadcast(self, message: pb.RankMessage, skip: int = 0) -> None:
        """Send to all ranks; one that is gone is lost with that (see `_lose`)."""
        data = framing.pack(message)
        with self._in_order, contextlib.suppress(RankLostError):
            for rank, link in self._links.items():
                if rank != skip:
                    link.send_packed(data)

    def _move(self, present: GroupState, following: GroupState) -> bool:
        """Change the state; False if it is not `present`."""
        with self._changing:
            if self.state is not present:
                return False
            self.state = following
            return True

    def _lose(self, rank: int, reason: str) -> None:
        if not (self._move(GroupState.MET, GroupState.LOST) or self._move(GroupState.GATHERING, GroupState.LOST)):
            return
        log.error("rank %d is lost, and the worker's epoch with it: %s", rank, reason)
        if self.on_lost is not None:
            self.on_lost(rank, reason)
        self._hang_up(f"rank {rank} is lost: {reason}")

    def _hang_up(self, reason: str) -> None:
        self.ended.set()
        self._store.close(reason)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for link in list(self._links.values()):
            link.hang_up()


class LeadingRunner:
    """Rank 0's model runner as the loop sees it: the other ranks compute every step with it."""

    def __init__(self, runner: Runner, group: RankGroup, *, step_timeout_s: float | None = None) -> None:
        """`step_timeout_s` bounds a step whose own waits have no bound (a GPU's); None: they have."""
        self._runner = runner
        self._group = group
        self._busy_since: float | None = None
        """When the loop's thread began to launch or to await a step; None: it does neither."""
        if step_timeout_s is not None:
            watch = threading.Thread(target=self._watch, args=(step_timeout_s,), name="rank-watch", daemon=True)
            watch.start()

    @property
    def run_ahead(self) -> int:
        """As the model runner's."""
        return self._runner.run_ahead

    def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> StepUnderWay:
        """Tell the other ranks, then begin; a failure after that ends the worker's epoch."""
        self._group.announce(plan, hook.note if hook is not None else b"")
        try:
            with self.busy():
                return _LedStep(self._runner.launch(plan, hook), self, self._group)
        except Exception as error:
            if isinstance(error, RankLostError):
                self._group.ended.wait(BLAME_S)
            self._group.fail(f"rank 0 could not launch a step that the others compute: {error}")
            raise

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """What is watched."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _watch(self, limit_s: float) -> None:
        """Until the group has ended: a step that takes too long ends it."""
        while not self._group.ended.wait(min(HEARTBEAT_S, limit_s / 2)):
            since = self._busy_since
            if since is not None and time.monotonic() - since > limit_s:
                self._group.fail(f"a step was not done after {limit_s:g} s: a rank or its GPU hangs")


class _LedStep:
    """A step under way on all ranks."""

    def __init__(self, step: StepUnderWay, runner: LeadingRunner, group: RankGroup) -> None:
        self._step = step
        self._runner = runner
        self._group = group

    def result(self) -> StepResult:
        """As rank 0's own."""
        try:
            with self._runner.busy():
                return self._step.result()
        except EngineError:
            self._group.catch_up()
            raise
