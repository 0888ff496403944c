"""Where one end of a pair does its copies: on a GPU a stream of its own, on a CPU the pair's thread.

The pair's data thread enters its lane once; from then on what it enqueues is done in order, there. `follow` lets
the lane wait for work of others (a layer being computed), `mark` tells when it has come so far. On a CPU
everything is done when it returns, and both are nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point on a lane."""

    def wait(self) -> None:
        """Return when everything before this point is done."""


class Lane(Protocol):
    """The order in which one end of a pair copies."""

    def enter(self) -> None:
        """From now on what the calling thread enqueues goes onto this lane."""

    def enter_beside(self) -> None:
        """From now on what the calling thread enqueues waits for nothing on this lane, nor for the engine."""

    def follow(self, event: Any) -> None:
        """Let what comes next wait for an event of the engine's; None: for nothing."""

    def mark(self, *, is_near: bool = False) -> Mark:
        """The end of what has been enqueued so far; is_near: it waits for nothing but copies and transfers.

        A thread that sleeps until the GPU wakes it runs later, and slower for a while: a pair that moves one piece
        after the other lost a fifth of its rate and more (benchmarks/RESULTS.md). So what is near is waited for awake.
        """


class _Done:
    """A point that has been passed."""

    def wait(self) -> None:
        """Return at once."""


class CpuLane:
    """The calling thread."""

    def enter(self) -> None:
        """It is there."""

    def enter_beside(self) -> None:
        """It is there."""

    def follow(self, event: Any) -> None:
        """Work on a CPU is done when it is pushed."""

    def mark(self, *, is_near: bool = False) -> Mark:
        """It is done."""
        return _Done()


class _CudaMark:
    """An event; whoever waits for it holds no interpreter lock."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """Return when the GPU has come here; a pair's control thread bounds it (see `watch`)."""
        self._event.synchronize()


class CudaLane:
    """A stream whose small copies go before the engine's waiting work."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._device = device

    def enter(self) -> None:
        """Make the lane's stream the thread's current one; streams are current thread by thread."""
        torch.cuda.set_stream(self._stream)

    def enter_beside(self) -> None:
        """Make a stream on which nothing is ever computed the thread's current one.

        Not of the priority of lanes and of NCCL: torch has 32 streams of each, hands them out in turn, and one that
        is some other pair's lane would have this thread's receives wait behind that pair's.
        """
        torch.cuda.set_stream(torch.cuda.Stream(self._device))

    def follow(self, event: Any) -> None:
        """Wait for the event on the GPU, not here."""
        if event is not None:
            self._stream.wait_event(event)

    def mark(self, *, is_near: bool = False) -> Mark:
        """An event on the lane's stream."""
        event = torch.cuda.Event(blocking=not is_near)
        event.record(self._stream)
        return _CudaMark(event)


def make_lane(device: torch.device) -> Lane:
    """A lane beside an engine on that device."""
    return CudaLane(device) if device.type == "cuda" else CpuLane()
