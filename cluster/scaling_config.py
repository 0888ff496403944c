"""What a user may set about the sizes of the pools."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

ScalingMode = Literal["off", "advise", "on"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """How small and how large the autoscaler may make one pool."""

    min: int = 1
    """Least number of workers."""
    max: int = 8
    """Greatest number of workers."""

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max <= 1000:
            raise ValueError(f"min must be at least 1 and max from min to 1000, got min {self.min} and max {self.max}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """How many workers each pool has, and who decides it."""

    mode: ScalingMode = "off"
    """off: sizes are those of the YAML or of `pdserve scale`. advise: what the autoscaler would do is shown by
    `pdserve status` and `pdserve history`, and not done. on: it is done."""
    interval_s: float = 5.0
    """Seconds between two decisions."""
    ttft_slo_s: float | None = None
    """Seconds within which 99 % of the requests are to get their first token: prefill is sized for it. Default:
    router.ttft_slo_s, else 2."""
    itl_slo_s: float = 0.1
    """Seconds within which 99 % of the tokens are to follow the one before: decode is sized for it."""
    prefill: PoolLimits = field(default_factory=PoolLimits)
    """Limits of the prefill pool."""
    decode: PoolLimits = field(default_factory=PoolLimits)
    """Limits of the decode pool."""
    max_workers: int | None = None
    """Budget: most workers of both pools together, those that start or stop included. Default: no limit."""
    max_gpus: float | None = None
    """Budget: most GPUs that all workers reserve together, those that start or stop included. Default: no limit."""
    max_nodes: int | None = None
    """Budget: most Ray nodes that have a worker. Default: no limit."""
    min_ratio: float | None = None
    """Least number of prefill workers for each decode worker, such as 0.25. Default: no limit."""
    max_ratio: float | None = None
    """Greatest number of prefill workers for each decode worker, such as 4. Default: no limit."""
    grow_pause_s: float = 10.0
    """Seconds after a change of a pool before it may grow (again)."""
    shrink_pause_s: float = 60.0
    """Seconds after a change of a pool before it may shrink (again)."""
    headroom: float = 0.2
    """Share of each pool's capacity that is kept free, from 0 to 0.9."""
    hysteresis: float = 0.15
    """How much less load than would fill a smaller pool it takes before the pool shrinks, as a share of that load."""
    start_s: float | None = None
    """Seconds that a new worker takes to be ready: load is looked ahead for so long. Default: as measured."""
    role_change: bool = True
    """Whether workers may move between the pools, without loading the model again. Needs pools whose settings differ
    at most in workers, prompt_share, num_cpus and the like; a worker keeps those it was started with."""
    place_timeout_s: float = 120.0
    """Longest that a new worker waits for a node with room, in seconds: as long as a new node may take to come."""

    def __post_init__(self) -> None:
        for name in ("interval_s", "ttft_slo_s", "itl_slo_s", "place_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 86400:
                raise ValueError(f"{name} must be more than 0 and at most 86400 seconds, got {value}")
        for name in ("grow_pause_s", "shrink_pause_s", "start_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 86400:
                raise ValueError(f"{name} must be between 0 and 86400 seconds, got {value}")
        if self.max_workers is not None and self.max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, got {self.max_workers}")
        if self.max_nodes is not None and self.max_nodes < 1:
            raise ValueError(f"max_nodes must be at least 1, got {self.max_nodes}")
        for name in ("max_gpus", "min_ratio", "max_ratio"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be more than 0, got {value}")
        if self.min_ratio is not None and self.max_ratio is not None and self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio ({self.min_ratio}) must not exceed max_ratio ({self.max_ratio})")
        if not 0 <= self.headroom <= 0.9:
            raise ValueError(f"headroom must be between 0 and 0.9, got {self.headroom}")
        if not 0 <= self.hysteresis < 1:
            raise ValueError(f"hysteresis must be at least 0 and less than 1, got {self.hysteresis}")
