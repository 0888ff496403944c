"""Which workers serve a request: filter -> score -> pick, pure functions over what is known of them.

Filter: READY, of the right role, large enough, not excluded. Score: how busy, 0 is idle. Pick: by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos import worker_pb2
from router.config import PolicyName
from router.info import WorkerInfo, WorkerLife, WorkerState
from router.local_prefill import LocalPrefillConfig


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks of a worker."""

    num_tokens: int
    """Tokens it must be able to hold."""
    excluded: frozenset[WorkerLife] = frozenset()
    """Failed this request: never again."""
    full: frozenset[WorkerLife] = frozenset()
    """Refused it a moment ago."""
    avoided: frozenset[WorkerLife] = frozenset()
    """Had a part in a failure: only if there is no other."""


@dataclass(frozen=True, slots=True)
class Route:
    """Who serves."""

    decode: WorkerInfo
    prefill: WorkerInfo | None
    """None: the decode worker prefills the prompt itself."""
    reason: str

    @property
    def local_prefill(self) -> bool:
        """Whether one worker does the whole request."""
        return self.prefill is None


UNKNOWN_RATE = 0.5
"""What a decode worker that has computed no prompt yet is taken to make of a prefill worker's rate."""
Score = Callable[[WorkerInfo], float]


def choose(
    workers: Sequence[WorkerInfo],
    demand: Demand,
    *,
    split: bool,
    policy: PolicyName,
    turn: int,
    local: LocalPrefillConfig | None = None,
) -> Route | None:
    """A route, or None if some role has no worker left. `turn` grows with each request, and spreads ties.

    `local`: when a decode worker may compute the prompt although there is a prefill worker; None: never.
    """
    decoders = ranked(usable(workers, demand, lambda info: info.can_decode), decode_load, policy, turn)
    if not split:
        return Route(decoders[0], None, f"{policy}: colocated") if decoders else None
    prefillers = ranked(usable(workers, demand, lambda info: info.can_prefill), prefill_load, policy, turn)
    for decoder in decoders:
        for prefiller in prefillers:
            if prefiller is decoder:
                if len(prefillers) == 1:
                    return Route(decoder, None, f"{policy}: one worker has both roles")
            elif same_layout(prefiller, decoder):
                helper = sooner(decoders, prefiller, demand, local) if local is not None else None
                return helper or Route(decoder, prefiller, f"{policy}: split")
    return None


def sooner(
    decoders: Sequence[WorkerInfo], prefiller: WorkerInfo, demand: Demand, local: LocalPrefillConfig
) -> Route | None:
    """A route with the decode worker that computes the prompt before this prefill worker would; None: it need not."""
    rate = prefiller.stats.prompt_tokens_per_s
    if not rate:
        return None
    wait_s = prefill_load(prefiller) / rate
    free = [info for info in decoders if decode_load(info) < local.max_load]
    if wait_s <= local.when_waiting_s or not free:
        return None

    def local_s(info: WorkerInfo) -> float:
        return (prefill_load(info) + demand.num_tokens) / (info.stats.prompt_tokens_per_s or UNKNOWN_RATE * rate)

    best = min(free, key=local_s)
    if local_s(best) >= wait_s + demand.num_tokens / rate:
        return None
    return Route(best, None, f"prefilled where it is decoded: {wait_s:.2f} s to wait at {prefiller.label}")


def usable(workers: Sequence[WorkerInfo], demand: Demand, has_role: Callable[[WorkerInfo], bool]) -> list[WorkerInfo]:
    """Filter; avoided workers only if nobody else is left."""
    fit = [
        info
        for info in workers
        if info.state is WorkerState.READY
        and has_role(info)
        and info.max_tokens >= demand.num_tokens
        and info.life not in demand.excluded
        and info.life not in demand.full
    ]
    return [info for info in fit if info.life not in demand.avoided] or fit


def prefill_load(info: WorkerInfo) -> float:
    """Prompt tokens that wait or are computed there: its own count, or this router's if that is newer."""
    return float(max(info.stats.waiting_tokens, info.prefill_tokens))


def decode_load(info: WorkerInfo) -> float:
    """The scarcer of places in the batch and blocks, as a share of what there is."""
    stats = info.stats
    requests = max(stats.num_running + stats.num_waiting + stats.num_reserved, info.num_decoding)
    blocks = 1 - stats.free_blocks / stats.num_blocks if stats.num_blocks else 0.0
    return max(requests / max(info.description.max_running, 1), blocks)


def ranked(workers: list[WorkerInfo], score: Score, policy: PolicyName, turn: int) -> list[WorkerInfo]:
    """Best first: by turn alone, or by score with ties broken by turn."""
    ordered = sorted(workers, key=lambda info: info.worker_id)
    start = turn % len(ordered) if ordered else 0
    rotated = ordered[start:] + ordered[:start]
    return rotated if policy == "round_robin" else sorted(rotated, key=score)


def same_layout(one: WorkerInfo, other: WorkerInfo) -> bool:
    """Whether KV of one means the same to the other; the number of ranks may differ."""
    return _comparable(one.description.layout) == _comparable(other.description.layout)


def _comparable(layout: worker_pb2.Layout) -> tuple[str, int, int, str]:
    return layout.model_hash, layout.num_layers, layout.block_size, layout.dtype
