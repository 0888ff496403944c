"""Feeds the autoscaler with what members say, and keeps what it needs from one decision to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from cluster.autoscaler import Inputs, Outcome, decide
from cluster.config import ClusterConfig
from cluster.load_sample import LoadMeter, LoadSample
from cluster.members import PoolName

KEPT_SAMPLES = 720
DEFAULT_START_S = 30.0
DEFAULT_TTFT_SLO_S = 2.0
NEWEST = 0.3
"""Weight of the newest start-up in the mean."""


class Scaler:
    """Samples, measured start-up time, and when sizes last changed; what time it is says the caller."""

    def __init__(self) -> None:
        self.advice: dict[str, Any] | None = None
        """What the last decision came to, in plain data; None before the first."""
        self._meter = LoadMeter()
        self._samples: deque[LoadSample] = deque(maxlen=KEPT_SAMPLES)
        self._changed_at: dict[str, float] = {}
        self._start_s: float | None = None
        self._decided_at = float("-inf")
        self._is_new = False
        """Whether there is a sample that no decision has seen."""

    def sizes_changed(self, before: Mapping[str, int], after: Mapping[str, int], now: float) -> None:
        """Wanted sizes have changed, by whomever."""
        for pool, size in after.items():
            if before.get(pool) != size:
                self._changed_at[pool] = now

    def started(self, seconds: float) -> None:
        """A worker took so long from its place to its first readiness."""
        self._start_s = seconds if self._start_s is None else (1 - NEWEST) * self._start_s + NEWEST * seconds

    def hear(self, routers: Mapping[str, Any], fronts: Mapping[str, Any], now: float) -> None:
        """What routers and fronts said just now."""
        self._samples.append(self._meter.sample(routers, fronts, now))
        self._is_new = True

    def decide(
        self,
        sizes: dict[str, int],
        config: ClusterConfig,
        *,
        gpus: Mapping[PoolName, float],
        can_change_role: bool,
        now: float,
    ) -> Outcome | None:
        """A new decision that differs from `sizes` (and, when it is only advice, from the last one); else None."""
        scaling = config.scaling
        if not self._is_new or now < self._decided_at + scaling.interval_s:
            return None
        self._decided_at, self._is_new = now, False
        start_s = scaling.start_s if scaling.start_s is not None else self._start_s
        outcome = decide(
            Inputs(
                now=now,
                samples=list(self._samples),
                sizes=sizes,
                changed_at=dict(self._changed_at),
                scaling=scaling,
                ttft_slo_s=scaling.ttft_slo_s or config.router.ttft_slo_s or DEFAULT_TTFT_SLO_S,
                gpus={str(pool): amount for pool, amount in gpus.items()},
                split=config.mode == "split",
                start_s=DEFAULT_START_S if start_s is None else start_s,
                can_change_role=can_change_role,
            )
        )
        before, self.advice = self.advice, {"sizes": outcome.sizes, "reason": outcome.reason}
        if all(sizes.get(pool) == size for pool, size in outcome.sizes.items()):
            return None
        if scaling.mode == "advise" and before is not None and before["sizes"] == outcome.sizes:
            return None
        return outcome

    def figures(self) -> dict[str, float]:
        """The newest sample, flat."""
        plain = self._samples[-1].to_plain() if self._samples else {}
        return {name: round(value, 4) for name, value in plain.items()}
