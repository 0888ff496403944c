"""The autoscaler beside what it is to be better than, under one load, each at its best.

fixed               the cheapest sizes that never change and keep both SLOs
fixed ratio         the whole grows and shrinks as the autoscaler says, always with so many prefill workers for each
                    decode worker; of the ratios that keep both SLOs the cheapest
by utilisation      each pool on its own; of the targets that keep both SLOs the cheapest

Where no setting keeps the SLOs, the one that keeps them best is shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.elastic_load import Load
from benchmarks.elastic_policies import ByUtilisation, Fixed, Ours
from benchmarks.elastic_sim import Cluster, Figures, Plant, Policy, Run, figures_of
from cluster.scaling_config import ScalingConfig

PREFILL_TARGETS = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
DECODE_TARGETS = (0.3, 0.4, 0.45, 0.5, 0.6)
DOWN_SHARES = (1.0, 0.1)
RATIOS = (0.7, 0.85, 1.0, 1.2, 1.45)
"""Prefill workers for each decode worker, as parts of the best fixed sizes' ratio."""
POOLS = ("prefill", "decode")
MOST_TRIES = 20
OnProgress = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Result:
    """One policy with its best setting."""

    name: str
    setting: str
    figures: Figures
    run: Run
    changes: int = 0


class Comparison:
    """Runs every policy under one load."""

    def __init__(
        self, load: Load, plant: Plant, scaling: ScalingConfig, *, skip_s: float, on_progress: OnProgress
    ) -> None:
        self._load, self._plant, self._scaling, self._skip_s = load, plant, scaling, skip_s
        self._told = on_progress
        self._begin = {"prefill": 1, "decode": 1}

    def all(self) -> list[Result]:
        """Ours first."""
        fixed = self.fixed()
        self._begin = {"prefill": round(fixed.run.prefill[0]), "decode": round(fixed.run.decode[0])}
        return [self.ours(), fixed, self.fixed_ratio(), self.by_utilisation()]

    def ours(self) -> Result:
        """The autoscaler, as it is set."""
        policy = self._autoscaler(self._scaling)
        run, figures = self._run(policy, self._begin)
        setting = f"headroom {self._scaling.headroom:g}, hysteresis {self._scaling.hysteresis:g}"
        return self._result("autoscaler", setting, figures, run, len(policy.reasons))

    def fixed(self) -> Result:
        """By halving, for both pools at once, then one pool after the other for what they do to each other."""
        low, high = dict.fromkeys(POOLS, 1), dict.fromkeys(POOLS, self._most())
        while any(high[pool] - low[pool] > 1 for pool in POOLS):
            middle = {pool: (low[pool] + high[pool] + 1) // 2 for pool in POOLS}
            kept = self._kept(self._run(Fixed(), middle)[1])
            for pool in POOLS:
                (high if kept[pool] else low)[pool] = middle[pool]
        for _ in range(MOST_TRIES):
            kept = self._kept(self._run(Fixed(), high)[1])
            if all(kept.values()):
                break
            high = {pool: high[pool] + (not kept[pool]) for pool in POOLS}
        for pool in POOLS:
            while high[pool] > 1 and self._run(Fixed(), smaller := {**high, pool: high[pool] - 1})[1].keeps_slos:
                high = smaller
        run, figures = self._run(Fixed(), high)
        return self._result("best fixed sizes", f"{high['prefill']} : {high['decode']}", figures, run)

    def fixed_ratio(self) -> Result:
        """See above."""
        usual = self._begin["prefill"] / self._begin["decode"]
        found = []
        for part in RATIOS:
            ratio = round(usual * part, 3)
            policy = self._autoscaler(replace(self._scaling, min_ratio=ratio, max_ratio=ratio))
            run, figures = self._run(policy, self._begin)
            found.append((figures, run, f"{ratio:.2f} : 1", len(policy.reasons)))
        figures, run, setting, changes = _best(found, lambda each: each[0])
        return self._result("best fixed ratio, total autoscaled", setting, figures, run, changes)

    def by_utilisation(self) -> Result:
        """Every pair of targets, with Kubernetes' own way down and with a slow one."""
        found = []
        for prefill, decode, down in itertools.product(PREFILL_TARGETS, DECODE_TARGETS, DOWN_SHARES):
            run, figures = self._run(ByUtilisation(prefill, decode, down), self._begin)
            setting = f"prefill {prefill:.0%}, decode {decode:.0%}, down {down:.0%} a minute"
            found.append((figures, run, setting))
        figures, run, setting = _best(found, lambda each: each[0])
        return self._result("each pool by utilisation", setting, figures, run)

    def _autoscaler(self, scaling: ScalingConfig) -> Ours:
        return Ours(scaling, ttft_slo_s=self._plant.ttft_slo_s, start_s=self._plant.start_s)

    def _run(self, policy: Policy, sizes: dict[str, int]) -> tuple[Run, Figures]:
        run = Cluster(self._load, self._plant, policy, sizes).run()
        return run, figures_of(run, self._load, self._plant, self._skip_s)

    def _kept(self, figures: Figures) -> dict[str, bool]:
        return {"prefill": figures.ttft_share >= 0.99, "decode": figures.itl_share >= 0.99}

    def _most(self) -> int:
        """Workers of one pool that are surely enough."""
        steps = max(1, round(10 / self._load.step_s))
        num = self._load.num_steps // steps * steps
        work = self._load.work_s[:num].reshape(-1, steps).sum(axis=1).max() / (steps * self._load.step_s)
        return min(self._scaling.prefill.max, 16 + 3 * int(work))

    def _result(self, name: str, setting: str, figures: Figures, run: Run, changes: int = 0) -> Result:
        self._told(f"{name} ({setting}): {figures.gpu_hours:,.0f} GPU-hours, TTFT {figures.ttft_share:.2%}")
        return Result(name, setting, figures, run, changes)


def _best(found: Sequence[tuple], figures: Callable[[tuple], Figures]) -> tuple:
    """The cheapest that keeps the SLOs; else the one that keeps them best."""
    good = [each for each in found if figures(each).keeps_slos]
    if good:
        return min(good, key=lambda each: figures(each).gpu_hours)
    return max(found, key=lambda each: min(figures(each).ttft_share, figures(each).itl_share))
