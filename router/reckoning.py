"""What a prompt would cost where: the time to its first token by what workers say of themselves, in seconds.

prefill    (tokens ahead + tokens of the prompt that it must compute) / what it computes in a second
decode     the transfer of the KV that it lacks, and how full it is
both       a decode worker that computes the prompt itself: slower, for its running streams come first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from router.info import WorkerInfo
from router.prefix_index import KnownPrefix


@dataclass(frozen=True, kw_only=True, slots=True)
class KvAwareConfig:
    """How the policy `kv_aware` weighs what speaks for a worker."""

    decode_load_s: float = 1.0
    """Seconds of waiting that a decode worker without any room is taken for; one that is half full for half of it."""
    transfer_weight: float = 1.0
    """How much of a transfer counts; it is mostly hidden behind the prefill, but takes from those that decode."""
    handover_s: float = 0.003
    """Seconds that two workers take longer than one that does it all, whatever the prompt; 2.4 ms on two cores."""

    def __post_init__(self) -> None:
        for name in ("decode_load_s", "transfer_weight", "handover_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


USUAL_RATE = 10_000.0
"""Prompt tokens a second of a fleet of which no worker has computed any: so that costs can be compared at all."""
USUAL_PAIR_RATE = 1e9
"""Bytes a second at which KV comes to a worker that has no pair yet."""


@dataclass(frozen=True, slots=True)
class Reckoning:
    """One prompt's costs."""

    num_tokens: int
    prefix: KnownPrefix
    usual_rate: float
    """Prompt tokens a second of a worker that has not said yet, and will once it has computed a prompt; 0: of none is
    a rate known."""
    config: KvAwareConfig
    _held: dict[WorkerInfo, int] = field(default_factory=dict)
    """Tokens that each worker holds, as far as it was asked for."""
    _loads: dict[WorkerInfo, float] = field(default_factory=dict)

    @classmethod
    def of(cls, num_tokens: int, prefix: KnownPrefix, prefillers: Sequence[WorkerInfo], config: KvAwareConfig) -> Self:
        """With what these prefill workers say of their rates."""
        rates = [rate for info in prefillers if (rate := info.stats.prompt_tokens_per_s)]
        return cls(num_tokens, prefix, sum(rates) / len(rates) if rates else 0.0, config)

    def held(self, info: WorkerInfo) -> int:
        """Tokens of the prompt that a worker holds."""
        held = self._held.get(info)
        if held is None:
            held = self._held[info] = self.prefix.tokens_at(info)
        return held

    def missing(self, info: WorkerInfo) -> int:
        """Tokens that a worker would have to compute, or to be sent; at least one is always computed."""
        return max(1, self.num_tokens - self.held(info))

    def load(self, info: WorkerInfo) -> float:
        """How full a worker is, from 0 to 1."""
        load = self._loads.get(info)
        if load is None:
            load = self._loads[info] = decode_load(info)
        return load

    def wait_s(self, info: WorkerInfo) -> float:
        """Until a prefill worker comes to the prompt; 0 while no rate is known."""
        rate = info.stats.prompt_tokens_per_s or self.usual_rate
        return prefill_load(info) / rate if rate else 0.0

    def prefill_s(self, info: WorkerInfo) -> float:
        """Until a prefill worker has computed the prompt."""
        rate = info.stats.prompt_tokens_per_s or self.usual_rate or USUAL_RATE
        return (prefill_load(info) + self.missing(info)) / rate

    def split_s(self, info: WorkerInfo) -> float:
        """Until a decode worker has what a prefill worker has computed."""
        return self.prefill_s(info) + self.config.handover_s

    def decode_s(self, info: WorkerInfo) -> float:
        """What speaks against decoding there."""
        transfer_s = self.missing(info) * info.kv_token_bytes / (info.pair_bytes_per_s or USUAL_PAIR_RATE)
        return self.config.decode_load_s * self.load(info) + self.config.transfer_weight * transfer_s

    def local_s(self, info: WorkerInfo) -> float:
        """Until a decode worker has computed the prompt itself."""
        rate = info.stats.prompt_tokens_per_s or self.usual_rate or USUAL_RATE
        return (prefill_load(info) + self.missing(info)) / rate

    def both_s(self, info: WorkerInfo) -> float:
        """What speaks against having one worker do it all."""
        return self.local_s(info) + self.config.decode_load_s * self.load(info)


def prefill_load(info: WorkerInfo) -> float:
    """Prompt tokens that wait or are computed there: its own count, or this router's if that is newer."""
    return float(max(info.stats.waiting_tokens, info.prefill_tokens))


def decode_load(info: WorkerInfo) -> float:
    """The scarcer of places in the batch and blocks, as a share of what there is."""
    stats = info.stats
    requests = max(stats.num_running + stats.num_waiting + stats.num_reserved, info.num_decoding)
    blocks = 1 - stats.free_blocks / stats.num_blocks if stats.num_blocks else 0.0
    return max(requests / max(info.description.max_running, 1), blocks)
