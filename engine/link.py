"""A front process's hold on its engine process, across deaths of either.

    CONNECTING --socket open, epoch drawn, StartEngine answered--> STARTED --engine gone--> CONNECTING
        '------------------------------close----------------------------> CLOSED <--close--'

Each time it reaches STARTED the worker has a new epoch: the life of one front joined to one engine.
Nothing of an earlier epoch is carried over; the engine ended it when the connection broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Awaitable, Callable

from engine.ipc import EngineClient, EngineGoneError
from protos import worker_pb2 as pb

log = logging.getLogger(__name__)

RETRY_S = 0.2
PING_PERIOD_S = 1.0
PING_TIMEOUT_S = 5.0
START_TIMEOUT_S = 30.0


class LinkState(enum.Enum):
    """Whether there is an engine to talk to."""

    CONNECTING = "connecting"
    STARTED = "started"
    CLOSED = "closed"


class EngineLink:
    """Keeps a front joined to its engine; asyncio, one task."""

    def __init__(
        self,
        *,
        socket_path: str,
        worker_id: str,
        next_epoch: Callable[[], Awaitable[int]],
        on_step: Callable[[pb.StepEvent], None],
        role: Callable[[], pb.SetRole | None] = lambda: None,
    ) -> None:
        """`next_epoch` draws a number larger than any before; it may fail and is tried again. `role`: what the engine
        is told to be at the start of each epoch; None: what it is."""
        self.state = LinkState.CONNECTING
        self.description = pb.WorkerDescription()
        self.stats = pb.WorkerStats()
        self.pairs: list[pb.PairInfo] = []
        """The worker's pairs, as of the last ping."""
        self.pair_bytes_per_s = 0.0
        """Mean of what the self-tests of those gave that bring it KV; 0 while there is none."""
        self.started = asyncio.Event()
        """Set while STARTED."""
        self.lost = asyncio.Event()
        """Set when the present epoch is over; a new Event comes with each epoch."""
        self.news = asyncio.Condition()
        """Notified when `stats` or `state` have changed."""
        self.on_started: Callable[[], Awaitable[None]] | None = None
        """Awaited each time STARTED is reached."""
        self._socket_path = socket_path
        self._worker_id = worker_id
        self._next_epoch = next_epoch
        self._on_step = on_step
        self._role = role
        self._client: EngineClient | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> int:
        """Which life of the worker this is; 0 before the first."""
        return int(self.description.identity.epoch)

    def open(self) -> None:
        """Start connecting, and connecting again."""
        self._task = asyncio.create_task(self._run(), name="engine-link")

    async def close(self) -> None:
        """Let go of the engine; it ends everything of this epoch."""
        self.state = LinkState.CLOSED
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def restart(self) -> None:
        """Give up this epoch and start another with the same engine."""
        if self._client is not None:
            await self._client.close()

    def stale(self, epoch: int) -> str:
        """Why a call that names this epoch must be refused; empty if it is for the present one."""
        if not self.started.is_set():
            return "this worker's engine is starting"
        return "" if epoch == self.epoch else f"this worker is in epoch {self.epoch}, the call is for epoch {epoch}"

    async def call(self, command: pb.EngineCommand, timeout_s: float) -> pb.EngineReply:
        """Ask the engine; EngineGoneError if there is none or it does not answer in time."""
        return await self._started_client().call(command, timeout_s)

    async def catch_up(self, timeout_s: float) -> None:
        """Have `stats` count everything asked before; EngineGoneError as for `call`."""
        reply = await self.call(pb.EngineCommand(drain=pb.DrainEngine()), timeout_s)
        await self._tell(reply.stats)

    def send(self, command: pb.EngineCommand) -> None:
        """Tell the engine something; lost if the engine is gone, with everything it was about."""
        with contextlib.suppress(EngineGoneError):
            self._started_client().send(command)

    def _started_client(self) -> EngineClient:
        if self._client is None or self.state is not LinkState.STARTED:
            raise EngineGoneError(f"the engine process of {self._worker_id} is not up yet")
        return self._client

    async def _run(self) -> None:
        while True:
            client = EngineClient(self._on_step)
            try:
                await self._start(client)
                await self._watch(client)
            except (OSError, EngineGoneError) as error:
                log.debug("no engine yet: %s", error)
            except Exception:
                log.exception("starting an epoch failed; trying again")
            finally:
                await self._end_epoch()
                await client.close()
            await asyncio.sleep(RETRY_S)

    async def _start(self, client: EngineClient) -> None:
        await client.connect(self._socket_path)
        identity = pb.WorkerIdentity(worker_id=self._worker_id, epoch=await self._next_epoch())
        start = pb.StartEngine(identity=identity, role=self._role())
        reply = await client.call(pb.EngineCommand(start=start), START_TIMEOUT_S)
        if reply.WhichOneof("result") == "error":
            raise EngineGoneError(f"the engine refused to start: {reply.error.message}")
        self.description = reply.description
        self.lost = asyncio.Event()
        self._client, self.state = client, LinkState.STARTED
        self.started.set()
        log.info("worker %s started epoch %d", self._worker_id, self.epoch)
        if self.on_started is not None:
            await self.on_started()

    async def _watch(self, client: EngineClient) -> None:
        """Until the engine is gone: ping it, which brings its stats and pairs."""
        while not client.closed.is_set():
            reply = await client.call(pb.EngineCommand(renew=pb.RenewLeases()), PING_TIMEOUT_S)
            self.pairs = list(reply.pairs)
            rates = [pair.bytes_per_s for pair in reply.pairs if pair.direction == "from" and pair.bytes_per_s]
            self.pair_bytes_per_s = sum(rates) / len(rates) if rates else 0.0
            await self._tell(reply.stats)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_PERIOD_S):
                    await client.closed.wait()

    async def _tell(self, stats: pb.WorkerStats) -> None:
        async with self.news:
            self.stats = stats
            self.news.notify_all()

    async def _end_epoch(self) -> None:
        self.started.clear()
        self.lost.set()
        self._client = None
        self.pairs = []
        await self._tell(pb.WorkerStats())
        if self.state is LinkState.STARTED:
            self.state = LinkState.CONNECTING
            log.warning("epoch %d of worker %s is over", self.epoch, self._worker_id)
