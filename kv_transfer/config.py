"""What a user may set about moving KV between workers."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

TransportName = Literal["auto", "nccl", "gloo", "loopback"]
DigestPolicy = Literal["auto", "all", "sampled", "none"]
SlowPairPolicy = Literal["warn", "refuse"]

CPU_PIECE_MIB, GPU_PIECE_MIB = 4, 128
CPU_STAGING_PIECES, GPU_STAGING_PIECES = 4, 3
EXPECTED_GB_S = {"nccl": 10.0, "gloo": 0.05, "loopback": 0.05}


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """How one engine process sends and receives KV."""

    transport: TransportName = "auto"
    """What carries the bytes: nccl or gloo (a two-rank process group), loopback (a plain socket, for tests); auto:
    nccl between GPUs, gloo where KV lies in a CPU's memory or both workers share one GPU, where NCCL refuses."""
    host: str = "127.0.0.1"
    """Address of the interface that the control listener and the data channels bind to; peers dial it. `node`: the
    address by which Ray knows the machine."""
    digest: DigestPolicy = "auto"
    """Which pieces carry a digest that the receiver checks. all: no wrong KV is ever used; sampled: a bad link is
    found, one wrong piece may not be; auto: all on a CPU, sampled on a GPU."""
    digest_share: float = 1 / 16
    """Share of the pieces that carry a digest when they are sampled."""
    max_ctas: int = 16
    """Blocks of threads that NCCL may use for one pair. At one prefill GPU's rate neither prefill nor decode was seen
    to lose more to 32 than to 2 or 8 (benchmarks/RESULTS.md); 16 move 2 to 4 times as much as 4."""
    max_pairs: int = 64
    """Outgoing pairs that are kept; beyond it the one that idled longest is closed."""
    expected_gb_s: float | None = None
    """What a new pair's self-test must reach, in GB/s; default: 10 on nccl, 0.05 on gloo."""
    slow_pair: SlowPairPolicy = "warn"
    """What becomes of a pair whose self-test is slower: it is used with a warning, or refused."""
    ticket_lease_s: float = 30.0
    """A ticket that nobody renewed for this long expires."""
    heartbeat_s: float = 0.5
    """Time between two pings on a pair's control connection."""
    peer_timeout_s: float = 1.9
    """A peer that was silent, or held a piece up, for this long is lost."""
    settle_timeout_s: float = 2.0
    """How long a sender waits for the receiver's verdict once its last piece has left."""
    connect_timeout_s: float = 5.0
    """Bound on dialling, and on making the data channel; a handshake that lasts longer than peer_timeout_s is lost."""
    idle_pair_s: float = 300.0
    """A pair with nothing to send for this long is closed."""
    staging_mib: int | None = None
    """Most staging memory of one end of a pair, in MiB; default: four pieces, three between GPUs. A sender whose
    backlog is as large is not given more to compute for that pair."""
    piece_mib: int | None = None
    """Most bytes sent at once, in MiB: larger writes are cut, smaller ones joined while they wait; default: 4, and
    128 between GPUs (16 layers of 2,048 tokens of an 8B model), where each takes 0.3 to 0.6 ms of a thread at each
    end; or half of a smaller staging."""

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
        for name in ("piece_mib", "staging_mib", "max_ctas", "max_pairs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.staging_mib is not None and self.staging_mib < 2 * (self.piece_mib or 0):
            raise ValueError(
                f"staging_mib ({self.staging_mib}) must hold at least two pieces of piece_mib ({self.piece_mib})"
            )
        if not 0 < self.digest_share <= 1:
            raise ValueError(f"digest_share must be above 0 and at most 1, got {self.digest_share}")
        if self.expected_gb_s is not None and self.expected_gb_s <= 0:
            raise ValueError(f"expected_gb_s must be above 0, got {self.expected_gb_s}")
        if not self.host or _is_wildcard(self.host):
            raise ValueError(f"host must be the address of one interface that peers can dial, got {self.host!r}")


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
