"""stub"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Inputs:
    now: float
    samples: Any
    sizes: Any
    changed_at: Any
    scaling: Any
    ttft_slo_s: float
    gpus: Any
    split: bool
    start_s: float
    can_change_role: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    sizes: dict
    reason: str
    details: dict = field(default_factory=dict)


def decide(inputs: Inputs) -> Outcome:
    return Outcome(sizes=dict(inputs.sizes), reason="stub")
