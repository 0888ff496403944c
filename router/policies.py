"""Which workers serve a request: filter -> score -> pick, pure functions over what is known of them.

Filter: READY, of the right role, large enough, not excluded. Score: how busy, 0 is idle. Pick: by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos import worker_pb2
from router.config import PolicyName
from router.info import WorkerInfo, WorkerLife, WorkerState
from router.local_prefill import LocalPrefillConfig, why_local
from router.prefix_index import NOTHING_KNOWN, KnownPrefix
from router.reckoning import KvAwareConfig, Reckoning, decode_load, prefill_load


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
    prefix: KnownPrefix = NOTHING_KNOWN
    """Who holds how much of its tokens."""
    answer_tokens: int = 0
    """Tokens it may still generate."""
    may_prefill_locally: bool = True
    """Whether a decode worker may compute it although there is a prefill worker."""
    insists: bool = False
    """Whether workers are asked beyond what they said they can take."""


@dataclass(frozen=True, slots=True)
class Route:
    """Who serves."""

    decode: WorkerInfo
    prefill: WorkerInfo | None
    """None: the decode worker prefills the prompt itself."""
    reason: str
    local_tokens: int = 0
    """Tokens of the prompt that the decode worker computes although there is a prefill worker."""
    missing_tokens: int = 0
    """Tokens of the prompt that the worker that computes it does not hold."""
    spills: bool = False
    """Whether it is computed there only because the prefill workers have too much to do."""

    @property
    def local_prefill(self) -> bool:
        """Whether one worker does the whole request."""
        return self.prefill is None


Score = Callable[[WorkerInfo], float]


def choose(
    workers: Sequence[WorkerInfo],
    demand: Demand,
    *,
    split: bool,
    policy: PolicyName,
    turn: int,
    alone: bool = False,
    weights: KvAwareConfig | None = None,
    local: LocalPrefillConfig | None = None,
    allows: Callable[[int, int], bool] = lambda num_tokens, num_local: True,
) -> Route | None:
    """A route, or None if some role has no worker left. `turn` grows with each request, and spreads ties.

    `alone`: whoever is there does both jobs, whatever its role. `local`: when a decode worker may compute a prompt
    although there is a prefill worker (None: never), as far as `allows(tokens, of these computed there)`.
    """
    decoders = usable(workers, demand, lambda info: (alone or info.can_decode) and has_room(info, demand))
    prefillers = usable(workers, demand, lambda info: info.can_prefill) if split and not alone else []
    reckon = Reckoning.of(demand.num_tokens, demand.prefix, prefillers, weights or KvAwareConfig())
    is_aware = policy == "kv_aware"
    if alone or not split:
        decoders = ranked(decoders, reckon.both_s if is_aware else decode_load, policy, turn)
        why = "there is no worker of the other role" if alone else "colocated"
        if not decoders:
            return None
        return Route(decoders[0], None, f"{policy}: {why}", missing_tokens=reckon.missing(decoders[0]))
    decoders = ranked(decoders, reckon.decode_s if is_aware else decode_load, policy, turn)
    prefillers = ranked(prefillers, reckon.prefill_s if is_aware else prefill_load, policy, turn)
    for decoder in decoders:
        for prefiller in prefillers:
            if prefiller is decoder:
                if len(prefillers) == 1:
                    missing = reckon.missing(decoder)
                    return Route(decoder, None, f"{policy}: one worker has both roles", missing_tokens=missing)
            elif same_layout(prefiller, decoder):
                soonest = min(prefillers, key=reckon.prefill_s)
                found = why_local(decoders, soonest, reckon, local) if local and demand.may_prefill_locally else None
                if found is not None and allows(demand.num_tokens, missing := reckon.missing(found.worker)):
                    why = f"prefilled where it is decoded: {found.why}"
                    return Route(found.worker, None, why, missing, missing, found.spills)
                why = f"{policy}: split{_hits(reckon, prefiller, decoder)}"
                return Route(decoder, prefiller, why, missing_tokens=reckon.missing(prefiller))
    return None


def _hits(reckon: Reckoning, prefiller: WorkerInfo, decoder: WorkerInfo) -> str:
    held = reckon.held(prefiller), reckon.held(decoder)
    return f", {held[0]} and {held[1]} of {reckon.num_tokens} tokens are held there" if any(held) else ""


def usable(workers: Sequence[WorkerInfo], demand: Demand, has_role: Callable[[WorkerInfo], bool]) -> list[WorkerInfo]:
    """Filter; avoided workers only if nobody else is left."""
    fit = [
        info
        for info in workers
        if info.state is WorkerState.READY and has_role(info) and info.max_tokens >= demand.num_tokens
    ]
    if refused := demand.excluded | demand.full:
        fit = [info for info in fit if info.life not in refused]
    return [info for info in fit if info.life not in demand.avoided] or fit if demand.avoided else fit


def has_room(info: WorkerInfo, demand: Demand) -> bool:
    """Whether the request is within what a worker said it can take."""
    if demand.insists or info.credit.covers(info.blocks_for(demand.num_tokens, demand.answer_tokens), is_first=False):
        return True
    needed = info.blocks_for(demand.num_tokens, demand.answer_tokens, demand.prefix.tokens_at(info))
    return info.credit.covers(needed, is_first=info.num_decoding == 0)


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
