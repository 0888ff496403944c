"""What a router knows of one worker: the input of its policies.

States: STARTING (listed, not yet described) -> READY (by its description) -> DRAINING (it says so)
-> LOST (its stream ended or fell silent) -> READY again, when a new connection is described.
Its link alone changes them. Its role may change while it is READY: requests that are there stay there.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from protos import worker_pb2
from router.credit import Credit, blocks_needed


class WorkerState(enum.Enum):
    """Where a worker is, seen from this router."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


class WorkerLife(NamedTuple):
    """One connection to one life of a worker: what a failed attempt keeps away from."""

    worker_id: str
    epoch: int
    connection: int


@dataclass(slots=True, eq=False)
class WorkerInfo:
    """A worker, its latest description and statistics, and this router's share of its work."""

    worker_id: str
    epoch: int
    role: str
    """prefill, decode or both; it may change."""
    address: str
    """host:port of its gRPC server."""
    pool: str = ""
    state: WorkerState = WorkerState.STARTING
    connection: int = 0
    """Connections made so far."""
    description: worker_pb2.WorkerDescription = field(default_factory=worker_pb2.WorkerDescription)
    stats: worker_pb2.WorkerStats = field(default_factory=worker_pb2.WorkerStats)
    pair_bytes_per_s: float = 0.0
    """How fast KV comes to it, by the self-tests of its pairs; 0 while that is not known."""
    num_decoding: int = 0
    """Requests this router has in this worker's decode craft."""
    prefill_tokens: int = 0
    """Prompt tokens this router waits for in this worker's prefill craft, but for those that it held already."""
    credit: Credit = field(default_factory=Credit)
    """What this router may still ask it for."""
    _sized: worker_pb2.WorkerDescription | None = None
    _size: tuple[int, int] = (0, 0)

    @property
    def label(self) -> str:
        """worker_id/epoch."""
        return f"{self.worker_id}/{self.epoch}"

    @property
    def life(self) -> WorkerLife:
        """The present connection."""
        return WorkerLife(self.worker_id, self.epoch, self.connection)

    @property
    def connected(self) -> bool:
        """Whether an Attach stream is up."""
        return self.state in (WorkerState.READY, WorkerState.DRAINING)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Counts a request in the decode craft."""
        self.num_decoding += 1
        try:
            yield
        finally:
            self.num_decoding -= 1

    @contextlib.contextmanager
    def prefilling(self, num_tokens: int) -> Iterator[None]:
        """Counts a prompt in the prefill craft."""
        self.prefill_tokens += num_tokens
        try:
            yield
        finally:
            self.prefill_tokens -= num_tokens

    @property
    def can_prefill(self) -> bool:
        """Whether its role includes prefill."""
        return self.role in ("prefill", "both")

    @property
    def can_decode(self) -> bool:
        """Whether its role includes decode."""
        return self.role in ("decode", "both")

    @property
    def max_tokens(self) -> int:
        """Most tokens of one sequence it can hold; 0 until it is described."""
        return self._sizes()[0]

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's KV."""
        return self._sizes()[1]

    def blocks_for(self, num_tokens: int, answer_tokens: int, held: int = 0) -> int:
        """Blocks it would have to promise for a request, as far as it has said what it expects of answers."""
        size = self.description.layout.block_size or 1
        return blocks_needed(num_tokens, answer_tokens, self.stats.expected_answer_tokens, held, size)

    def _sizes(self) -> tuple[int, int]:
        """Both, worked out once for each description: every choice asks for them."""
        described = self.description
        if self._sized is not described:
            layout = described.layout
            value_bytes = 4 if layout.dtype == "float32" else 2
            self._size = (
                min(described.max_model_len, described.num_blocks * layout.block_size),
                2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * value_bytes,
            )
            self._sized = described
        return self._size
