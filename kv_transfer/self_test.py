"""The self-test of a new pair: a few messages of known size, before any KV depends on it.

The sender announces each probe as it announces a piece and counts the time until the receiver says that it
came. So `latency_s` is what a small piece costs there and back, and `bytes_per_s` what a large one reaches.
A link that fell back to something far slower (TCP where NVLink should be) shows here and nowhere else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.config import EXPECTED_GB_S, TransferConfig
from kv_transfer.context import Equipment
from kv_transfer.errors import PairRefusedError, PeerLostError
from kv_transfer.transport import Transport
from protos.transfer_pb2 import ControlMessage, PairMeasured, Probe

_log = logging.getLogger(__name__)

SMALL_BYTES = 16 * 1024
NUM_PROBES = 3
"""Of each size; the first of each pays for first-time work."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the self-test gave."""

    latency_s: float = 0.0
    bytes_per_s: float = 0.0

    def to_proto(self) -> PairMeasured:
        """The message that tells the other end."""
        return PairMeasured(latency_s=self.latency_s, bytes_per_s=self.bytes_per_s)


class SelfTest:
    """The sender's side; `seen` is called by its control thread."""

    def __init__(self, say: Callable[[ControlMessage], None], timeout_s: float) -> None:
        self._say = say
        self._timeout_s = timeout_s
        self._answers = threading.Semaphore(0)
        self._ended: str | None = None

    def seen(self) -> None:
        """The receiver has a probe."""
        self._answers.release()

    def end(self, reason: str) -> None:
        """Nothing will be seen any more; from any thread."""
        self._ended = reason
        self._answers.release()

    def run(self, transport: Transport, equipment: Equipment, large_bytes: int) -> Measured:
        """Send the probes and tell the receiver the result; PeerLostError if it does not answer."""
        buffer = equipment.staging.acquire(large_bytes)
        assert buffer is not None, "a new pair's staging is free"
        equipment.digester.begin(buffer)  # its kernel is compiled now, and not when a piece waits for it
        times: dict[int, list[float]] = {}
        for size in (SMALL_BYTES, large_bytes):
            times[size] = []
            for _ in range(NUM_PROBES):
                began = time.monotonic()
                self._say(ControlMessage(probe=Probe(num_bytes=size)))
                transfer = transport.send(buffer[:size])
                self._await_answer(size)
                times[size].append(time.monotonic() - began)
                transfer.wait()
                equipment.lane.mark(is_near=True).wait()
        equipment.staging.release(buffer)
        latency_s = min(times[SMALL_BYTES])
        measured = Measured(latency_s, large_bytes / min(times[large_bytes]))
        self._say(ControlMessage(measured=measured.to_proto()))
        return measured

    def _await_answer(self, size: int) -> None:
        if not self._answers.acquire(timeout=self._timeout_s):
            raise PeerLostError(f"a probe of {size} bytes had not come after {self._timeout_s:g} s")
        if self._ended is not None:
            raise PeerLostError(f"a probe of {size} bytes did not come: {self._ended}")


def judge(measured: Measured, transport: str, config: TransferConfig, peer: str) -> bool:
    """Whether a pair is as fast as its link should be; warns, or raises PairRefusedError, if it is not."""
    expected = config.expected_gb_s if config.expected_gb_s is not None else EXPECTED_GB_S[transport]
    reached = measured.bytes_per_s / 1e9
    if reached >= expected:
        return True
    message = (
        f"the pair with {peer} moves {reached:.3g} GB/s over {transport}, {expected:g} GB/s were expected: "
        "look for a fall-back to TCP (NCCL_DEBUG=INFO), or set transfer.expected_gb_s to what the link can do"
    )
    if config.slow_pair == "refuse":
        raise PairRefusedError(message)
    _log.warning(message)
    return False
