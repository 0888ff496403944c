"""What a user may set about moving KV between workers."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

TransportName = Literal["auto", "gloo", "loopback"]
DigestPolicy = Literal["auto", "all", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """How one engine process sends and receives KV."""

    transport: TransportName = "auto"
    """What carries the bytes: gloo (a two-rank process group), loopback (a plain socket, for tests); auto: gloo."""
    host: str = "127.0.0.1"
    """Address of the interface that the control listener and the data channels bind to; peers dial it."""
    digest: DigestPolicy = "auto"
    """Which pieces carry an xxh3-64 digest that the receiver checks; auto: all of them on a CPU."""
    ticket_lease_s: float = 30.0
    """A ticket that nobody renewed for this long expires."""
    heartbeat_s: float = 0.5
    """Time between two pings on a pair's control connection."""
    peer_timeout_s: float = 2.0
    """A peer that was silent, or held a piece up, for this long is lost."""
    settle_timeout_s: float = 2.0
    """How long a sender waits for the receiver's verdict once its last piece has left."""
    connect_timeout_s: float = 5.0
    """Bound on each phase of making a pair: dialling with the handshake, and the data channel."""
    idle_pair_s: float = 300.0
    """A pair with nothing to send for this long is closed."""
    staging_mib: int = 64
    """Most staging memory of one end of a pair, in MiB."""
    piece_mib: int = 4
    """Most bytes sent at once, in MiB: larger writes are cut, smaller ones joined while the pair is busy."""

    def __post_init__(self) -> None:
        for name in (
            "ticket_lease_s",
            "heartbeat_s",
            "peer_timeout_s",
            "settle_timeout_s",
            "connect_timeout_s",
            "idle_pair_s",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if self.heartbeat_s * 2 > self.peer_timeout_s:
            raise ValueError(
                f"heartbeat_s ({self.heartbeat_s}) must be at most half of peer_timeout_s ({self.peer_timeout_s}): "
                "one late ping must not look like a lost peer"
            )
        if self.piece_mib < 1:
            raise ValueError(f"piece_mib must be at least 1, got {self.piece_mib}")
        if self.staging_mib < 2 * self.piece_mib:
            raise ValueError(
                f"staging_mib ({self.staging_mib}) must hold at least two pieces of piece_mib ({self.piece_mib})"
            )
        if not self.host or _is_wildcard(self.host):
            raise ValueError(f"host must be the address of one interface that peers can dial, got {self.host!r}")

    @property
    def transport_name(self) -> str:
        """The transport that `auto` stands for."""
        return "gloo" if self.transport == "auto" else self.transport

    @property
    def digest_name(self) -> str:
        """What the digest policy is called in the handshake."""
        return "none" if self.digest == "none" else "xxh3-64"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
