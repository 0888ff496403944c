"""Which sizes of the pools are allowed, and the best of them where what is wanted is not. Pure arithmetic.

Hard: the budgets (workers, GPUs), then most and least workers of each pool, then the ratio; a limit that cannot be kept
beside harder ones is given up, the last one first. A ratio holds to whole workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from cluster.members import PoolName
from cluster.scaling_config import PoolLimits, ScalingConfig

Sizes = Mapping[str, int]
EPSILON = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What sizes must keep. A cluster that is not split has no prefill pool."""

    pools: Mapping[PoolName, PoolLimits]
    gpus: Mapping[PoolName, float]
    """GPUs that one worker reserves."""
    max_workers: float
    max_gpus: float
    min_ratio: float = 0.0
    max_ratio: float = math.inf

    @classmethod
    def of(cls, scaling: ScalingConfig, gpus: Mapping[str, float], *, split: bool) -> Limits:
        """Those of a configuration."""
        pools: dict[PoolName, PoolLimits] = {"prefill": scaling.prefill} if split else {}
        pools["decode"] = scaling.decode
        return cls(
            pools=pools,
            gpus={pool: gpus.get(pool, 0.0) for pool in pools},
            max_workers=math.inf if scaling.max_workers is None else scaling.max_workers,
            max_gpus=math.inf if scaling.max_gpus is None else scaling.max_gpus,
            min_ratio=(scaling.min_ratio or 0.0) if split else 0.0,
            max_ratio=(scaling.max_ratio or math.inf) if split else math.inf,
        )

    def broken(self, sizes: Sizes) -> str | None:
        """The first limit that sizes do not keep, in words."""
        num, gpus = sum(sizes[pool] for pool in self.pools), self.gpus_of(sizes)
        if num > self.max_workers:
            return f"the budget is {self.max_workers:g} workers"
        if gpus > self.max_gpus + EPSILON:
            return f"the budget is {self.max_gpus:g} GPUs"
        for pool, limits in self.pools.items():
            if not limits.min <= sizes[pool] <= limits.max:
                return f"{pool} may have {limits.min} to {limits.max} workers"
        if "prefill" in self.pools:
            least, most = self._by_ratio(sizes["prefill"])
            if not least <= sizes["decode"] <= most:
                return f"the ratio may be {self.min_ratio:g} to {self.max_ratio:g}"
        return None

    def gpus_of(self, sizes: Sizes) -> float:
        """GPUs that all workers reserve."""
        return sum(self.gpus[pool] * sizes[pool] for pool in self.pools)

    def best(self, rate: Callable[[Sizes], tuple[float, ...]], near: Sizes) -> dict[str, int] | None:
        """The allowed sizes that are rated highest; limits that contradict harder ones are left out. None: the budget
        has no room for anything."""
        looser = (
            self,
            replace(self, min_ratio=0.0, max_ratio=math.inf),
            replace(
                self,
                min_ratio=0.0,
                max_ratio=math.inf,
                pools={pool: PoolLimits(min=1, max=limits.max) for pool, limits in self.pools.items()},
            ),
        )
        for limits in looser:
            found = max(limits.candidates(near), key=rate, default=None)
            if found is not None:
                return found
        return None

    def at_least(self, floor: Sizes) -> Limits:
        """The same, where no pool gets smaller than that; a pool that must be smaller may have nothing."""
        pools = {}
        for pool, limits in self.pools.items():
            least = min(max(limits.min, floor[pool]), limits.max)
            pools[pool] = PoolLimits(min=max(1, least), max=limits.max)
        return replace(self, pools=pools)

    def candidates(self, near: Sizes) -> Iterator[dict[str, int]]:
        """For each size of the prefill pool the allowed one of the decode pool that is nearest to `near`."""
        decode = self.pools["decode"]
        if "prefill" not in self.pools:
            if (most := self._room_for_decode(0, decode.max)) >= decode.min:
                yield {"decode": min(max(near["decode"], decode.min), most)}
            return
        for prefill in range(self.pools["prefill"].min, self.pools["prefill"].max + 1):
            by_ratio = self._by_ratio(prefill)
            most = self._room_for_decode(prefill, min(decode.max, by_ratio[1]))
            least = max(decode.min, by_ratio[0])
            if least <= most:
                yield {"prefill": prefill, "decode": int(min(max(near["decode"], least), most))}

    def _room_for_decode(self, prefill: int, most: float) -> int:
        """Most decode workers beside so many prefill workers, within the budgets."""
        most = min(most, self.max_workers - prefill)
        left = self.max_gpus - prefill * self.gpus.get("prefill", 0.0)
        if self.gpus["decode"] > EPSILON and math.isfinite(left):
            most = min(most, math.floor(left / self.gpus["decode"] + EPSILON))
        return int(most) if left > -EPSILON else -1

    def _by_ratio(self, prefill: int) -> tuple[float, float]:
        """Fewest and most decode workers for so many prefill workers; to whole workers of either pool."""
        least = math.ceil((prefill - 1) / self.max_ratio + EPSILON) if math.isfinite(self.max_ratio) else 0.0
        most = math.floor((prefill + 1) / self.min_ratio - EPSILON) if self.min_ratio else math.inf
        return float(least), most
