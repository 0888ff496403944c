"""The pairs of a worker as gauges of its metrics page, and read back from there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import Sample

from cluster.metrics import PREFIX
from protos import worker_pb2 as pb

READY, LATENCY, RATE, SLOW = "pair_ready", "pair_latency_seconds", "pair_bytes_per_second", "pair_slow"
_LABELS = ("peer", "direction", "transport")
KEY_LABELS = dict.fromkeys((READY, LATENCY, RATE, SLOW), _LABELS)

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Pair:
    """A pair as its sender sees it."""

    sender: str
    """worker/epoch."""
    receiver: str
    """worker/epoch, and the rank where there are several."""
    transport: str
    """Empty until the two have agreed."""
    state: Literal["connecting", "ready"]
    latency_s: float = 0.0
    """Of a small piece, there and back."""
    bytes_per_s: float = 0.0
    is_slow: bool = False
    """Whether the sender warned of it."""


def gauges(pairs: Iterable[pb.PairInfo]) -> dict[str, dict[Key, float]]:
    """Fields for a StatsCollector, with KEY_LABELS. A pair that is closed but not gone yet is left out."""
    values: dict[str, dict[Key, float]] = {name: {} for name in KEY_LABELS}
    for pair in sorted(pairs, key=lambda pair: pair.state == "ready"):  # of two with one key, the one in use stays
        if pair.state == "closed":
            continue
        is_ready = pair.state == "ready"
        key = (pair.peer, pair.direction, pair.transport)
        values[READY][key] = float(is_ready)
        values[SLOW][key] = float(pair.is_slow)
        if is_ready:
            values[LATENCY][key] = pair.latency_s
            values[RATE][key] = pair.bytes_per_s
    return values


def pairs_of(sender: str, page: Iterable[Sample]) -> list[Pair]:
    """The pairs over which a worker sends, from the samples of its page."""
    values: dict[str, dict[tuple[str, str], float]] = {name: {} for name in KEY_LABELS}
    for sample in page:
        name = sample.name.removeprefix(f"{PREFIX}_worker_")
        if name in values and sample.labels["direction"] == "to":
            values[name][sample.labels["peer"], sample.labels["transport"]] = sample.value
    return [
        Pair(
            sender,
            peer,
            transport,
            "ready" if is_ready else "connecting",
            values[LATENCY].get((peer, transport), 0.0),
            values[RATE].get((peer, transport), 0.0),
            bool(values[SLOW].get((peer, transport))),
        )
        for (peer, transport), is_ready in sorted(values[READY].items())
    ]
