"""Who decides the sizes of the pools: the autoscaler itself, and what it is compared with."""

from __future__ import annotations

import math
from collections import deque

from cluster.autoscaler import Inputs, decide
from cluster.load_sample import LoadSample
from cluster.scaling_config import ScalingConfig

KEPT = 60
"""Samples that the autoscaler sees."""


class Ours:
    """`cluster.autoscaler.decide`, as a controller calls it. With `min_ratio` and `max_ratio` alike in its settings it
    scales the whole at a fixed ratio."""

    changes_roles = True

    def __init__(self, scaling: ScalingConfig, *, ttft_slo_s: float, start_s: float) -> None:
        self._scaling, self._ttft_slo_s, self._start_s = scaling, ttft_slo_s, start_s
        self._samples = deque[LoadSample](maxlen=KEPT)
        self._changed_at: dict[str, float] = {}
        self.reasons: list[tuple[float, str]] = []
        """Of every change."""

    def sizes(self, sample: LoadSample, wanted: dict[str, int], busy: float) -> dict[str, int]:
        """See Policy."""
        self._samples.append(sample)
        outcome = decide(
            Inputs(
                now=sample.at,
                samples=tuple(self._samples),
                sizes=wanted,
                changed_at=self._changed_at,
                scaling=self._scaling,
                ttft_slo_s=self._ttft_slo_s,
                gpus={"prefill": 1.0, "decode": 1.0},
                split=True,
                start_s=self._start_s,
                can_change_role=True,
            )
        )
        changed = {pool: sample.at for pool in wanted if outcome.sizes[pool] != wanted[pool]}
        if changed:
            self._changed_at = {**self._changed_at, **changed}
            self.reasons.append((sample.at, outcome.reason))
        return outcome.sizes


class Fixed:
    """The sizes stay."""

    changes_roles = False

    def sizes(self, sample: LoadSample, wanted: dict[str, int], busy: float) -> dict[str, int]:
        """See Policy."""
        return wanted


class ByUtilisation:
    """Each pool on its own, as Kubernetes' HorizontalPodAutoscaler does with its defaults: ready workers times
    utilisation over the target, no change within 10 % of it, and down only to the most that was asked for within 5
    minutes. Utilisation: the time that prefill workers compute, the KV that decode workers hold."""

    changes_roles = False
    TOLERANCE = 0.1
    STABLE_S = 300.0

    def __init__(self, prefill: float, decode: float, down: float = 1.0, most: int = 1000) -> None:
        """`down`: share of its workers that a pool may lose within a minute; Kubernetes' default is all of them."""
        self._targets = {"prefill": prefill, "decode": decode}
        self._down, self._most = down, most
        self._lost: dict[str, deque[tuple[float, int]]] = {"prefill": deque(), "decode": deque()}
        self._asked: dict[str, deque[tuple[float, int]]] = {"prefill": deque(), "decode": deque()}

    def sizes(self, sample: LoadSample, wanted: dict[str, int], busy: float) -> dict[str, int]:
        """See Policy."""
        found = {}
        for pool, used, ready in (
            ("prefill", busy, sample.prefill.ready),
            ("decode", max(sample.decode.kv_share, sample.decode.place_share), sample.decode.ready),
        ):
            over = used / self._targets[pool]
            num = wanted[pool] if abs(over - 1) <= self.TOLERANCE else math.ceil(ready * over)
            asked = self._asked[pool]
            asked.append((sample.at, num))
            while asked[0][0] < sample.at - self.STABLE_S:
                asked.popleft()
            most = max(each for _, each in asked)
            found[pool] = (
                min(self._most, num) if num > wanted[pool] else self._fewer(pool, sample.at, wanted[pool], most)
            )
        return found

    def _fewer(self, pool: str, now: float, wanted: int, most: int) -> int:
        lost = self._lost[pool]
        while lost and lost[0][0] < now - 60.0:
            lost.popleft()
        before = wanted + sum(each for _, each in lost)
        num = max(1, min(wanted, max(most, before - max(1, int(self._down * before)))))
        if num < wanted:
            lost.append((now, wanted - num))
        return num


__all__ = ["ByUtilisation", "Fixed", "Ours"]
