"""The seam between a pair and what carries its bytes.

A transport is the data channel of one directed pair: rank 0 sends, rank 1 receives. Sends and
receives are matched by order, and both ends know the size from the announcement. `send` and `recv`
only start a transfer, so that one end can prepare the next piece meanwhile; NCCL's begin once the pair's lane
has come so far.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from protos.rendezvous import Rendezvous


class Side(enum.IntEnum):
    """Which end of a pair; the value is the rank in its process group."""

    SENDER = 0
    RECEIVER = 1


class Transfer(Protocol):
    """A send or receive under way."""

    def wait(self) -> None:
        """Let what follows on the current lane come after the transfer: on a CPU return when it is done.

        TransportError after the transport's timeout.
        """


class Transport(Protocol):
    """The data channel of one pair; `send`, `recv` and `close` are called by the pair's thread."""

    def send(self, data: torch.Tensor) -> Transfer:
        """Start sending a flat uint8 tensor, which must stay unchanged until the transfer is done."""

    def recv(self, into: torch.Tensor) -> Transfer:
        """Start receiving exactly into.numel() bytes."""

    def abort(self) -> None:
        """Make waiting transfers fail soon, at the latest after the timeout; from any thread."""

    def close(self) -> None:
        """Give back every resource; never waits for the peer."""


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """What a transport needs to know."""

    side: Side
    host: str
    """Address of the interface to use."""
    connect_timeout_s: float
    transfer_timeout_s: float
    """Bound on each transfer."""
    device: torch.device | None = None
    """Where the staging lies; None: in the CPU's memory."""
    max_ctas: int = 16
    """For NCCL, see `config`."""


def open_transport(name: str, options: ChannelOptions, store: Rendezvous) -> Transport:
    """Make one end of a data channel; blocks until the other end does the same, TransportError after the timeout."""
    creators: dict[str, Callable[[ChannelOptions, Rendezvous], Transport]] = {
        "nccl": _open_nccl,
        "gloo": _open_gloo,
        "loopback": _open_loopback,
    }
    return creators[name](options, store)


def _open_nccl(options: ChannelOptions, store: Rendezvous) -> Transport:
    from kv_transfer.nccl import NcclTransport

    return NcclTransport(options, store)


def _open_gloo(options: ChannelOptions, store: Rendezvous) -> Transport:
    from kv_transfer.gloo import GlooTransport

    return GlooTransport(options, store)


def _open_loopback(options: ChannelOptions, store: Rendezvous) -> Transport:
    from kv_transfer.loopback import LoopbackTransport

    return LoopbackTransport(options, store)
