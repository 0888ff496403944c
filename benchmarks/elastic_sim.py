"""A split cluster of any size as queues of fluid, in steps: how its pools' sizes bear a load.

    arrived --room for its KV in the decode pool--> admitted --prefill workers, first come first served--> prefilled
            --one token a step--> ended

Requests of one step are alike but for the lengths of their answers and the time of their prefill. The workers of a pool
share its work evenly; so waits inside a step (shorter than `step_s`) are not seen, and of decode workers each is taken
to be loaded up to SPREAD beside the mean. Prefix hits are the trace's own; no prompt is computed by decode workers.
The steps of decode workers take the time of their pace, and so does the work of prefill workers. What begins to
generate within a step is there from its beginning, so that decode workers are a little fuller than they would be.

A worker counts as a GPU from when it is asked for until it has gone.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.elastic_load import BIN_TOKENS, NUM_BINS, SERVICE_BINS, Load
from cluster.load_sample import LoadSample, PoolLoad
from engine.pace import PaceOptions, StepWork

SPREAD = 0.1
"""Standard deviation of decode workers' loads, as a share of their mean."""
RING = 4 * NUM_BINS
ANSWERS = (np.arange(NUM_BINS) + 0.5) * BIN_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class Plant:
    """What workers can do, and how long changes take."""

    decode: PaceOptions
    kv_tokens: int
    """Of one decode worker."""
    max_running: int
    ttft_slo_s: float
    itl_slo_s: float
    start_s: float = 60.0
    """From the wish for a worker to its first request."""
    role_s: float = 5.0
    """A change of role."""
    drain_s: float = 15.0
    """For which a worker that goes is still paid."""
    interval_s: float = 10.0
    """Between two decisions."""
    refuse_s: float = 20.0
    """Requests that would wait longer are refused."""


class Policy(Protocol):
    """Decides the sizes of the pools."""

    changes_roles: bool

    def sizes(self, sample: LoadSample, wanted: dict[str, int], busy: float) -> dict[str, int]:
        """What is wanted from now on; `busy`: share of the time that prefill workers computed."""


@dataclass(slots=True)
class Workers:
    """Those of both pools, wherever they are in their lives."""

    plant: Plant
    ready: dict[str, int]
    wanted: dict[str, int]
    coming: list[tuple[float, str]] = field(default_factory=list)
    """When, to which pool."""
    going: list[float] = field(default_factory=list)
    """Until when they are paid."""

    @property
    def num(self) -> int:
        """All that are paid for."""
        return sum(self.ready.values()) + len(self.coming) + len(self.going)

    def pass_time(self, now: float) -> None:
        """Those whose time has come are ready, or gone."""
        if self.coming and min(self.coming)[0] <= now:
            for each in [each for each in self.coming if each[0] <= now]:
                self.coming.remove(each)
                self.ready[each[1]] += 1
        if self.going and self.going[0] <= now:
            self.going = [until for until in self.going if until > now]

    def want(self, sizes: dict[str, int], now: float, *, changes_roles: bool) -> None:
        """Begin what makes the sizes so."""
        change = {pool: sizes[pool] - self.wanted[pool] for pool in sizes}
        self.wanted = dict(sizes)
        for taker, giver in (("prefill", "decode"), ("decode", "prefill")):
            if changes_roles and change[taker] > 0 > change[giver]:
                moved = min(change[taker], -change[giver], self.ready[giver] - 1)
                self.ready[giver] -= moved
                self.coming += [(now + self.plant.role_s, taker)] * moved
                change[taker] -= moved
                change[giver] += moved
        for pool, num in change.items():
            self.coming += [(now + self.plant.start_s, pool)] * max(0, num)
            for _ in range(-num):
                late = max((each for each in self.coming if each[1] == pool), default=None)
                if late is not None:
                    self.coming.remove(late)
                else:
                    self.ready[pool] -= 1
                    self.going.append(now + self.plant.drain_s)


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it, step by step."""

    wait_s: NDArray[np.float64]
    itl_s: NDArray[np.float64]
    reads: NDArray[np.float64]
    """KV tokens that one decode worker reads in a step."""
    tokens: NDArray[np.float64]
    refused: NDArray[np.float64]
    """Share of the requests of the step."""
    workers: NDArray[np.float64]
    prefill: NDArray[np.float64]
    decode: NDArray[np.float64]


class Cluster:
    """The queues. Positions in them are counted in steps of arrival, with fractions."""

    def __init__(self, load: Load, plant: Plant, policy: Policy, sizes: dict[str, int]) -> None:
        self._load, self._plant, self._policy = load, plant, policy
        self._workers = Workers(plant, dict(sizes), dict(sizes))
        num = load.num_steps
        pace = plant.decode
        self._fixed_s = pace.step_s(StepWork(0, 0, 0), 0)
        self._seq_s = pace.step_s(StepWork(0, 1, 0), 0) - self._fixed_s
        self._read_s = pace.step_s(StepWork(0, 0, 1), pace.kv_bytes_per_token or 0) - self._fixed_s
        self._columns = {
            name: getattr(load, name).tolist()
            for name in ("requests", "prompt_tokens", "uncached_tokens", "uncached_squares", "work_s", "answer_tokens")
        }
        self._sums = {name: [0.0] * (num + 1) for name in (*self._columns, "kv")}
        """What was not refused of all steps before."""
        self._accepted = [1.0] * num
        self._admitted = self._prefilled = 0.0
        self._ending = np.zeros((4, RING))
        """By when they end: requests, tokens promised to them, tokens of their prompts, progress when they joined."""
        self._present = np.zeros(4)
        """The same of all that generate."""
        self._progress = 0.0
        """Tokens that a sequence that was always there would have."""
        self._wait_s = [0.0] * num
        self._busy = self._spent = 0.0
        self._decided = 0

    def run(self) -> Run:
        """To the end of the load."""
        load, plant, workers = self._load, self._plant, self._workers
        num, step_s, every = load.num_steps, load.step_s, max(1, round(plant.interval_s / load.step_s))
        rows = np.zeros((7, num))
        for step in range(num):
            workers.pass_time(step * step_s)
            self._arrive(step)
            self._admit(step)
            began = self._prefilled
            self._prefill(step)
            self._join(began, self._prefilled)
            before = self._present[0]
            itl_s = self._decode()
            paid, ready = workers.num, workers.ready
            per_worker = self._reads() / max(1, ready["decode"])
            rows[:, step] = (
                itl_s, per_worker, (before + self._present[0]) / 2 * step_s / itl_s, 1 - self._accepted[step], paid,
                ready["prefill"], ready["decode"],
            )  # fmt: skip
            if (step + 1) % every == 0:
                sample = self._sample(step, itl_s)
                busy = self._busy / self._spent if self._spent else 0.0
                sizes = self._policy.sizes(sample, dict(workers.wanted), busy)
                self._busy = self._spent = 0.0
                if sizes != workers.wanted:
                    workers.want(sizes, (step + 1) * step_s, changes_roles=self._policy.changes_roles)
        return Run(np.array(self._wait_s), *rows)

    def _arrive(self, step: int) -> None:
        """Requests come; those that would wait too long are refused."""
        ahead = self._sums["work_s"][step] - self._at("work_s", self._prefilled)
        wait_s = max(ahead / max(1, self._workers.ready["prefill"]), (step - self._admitted) * self._load.step_s)
        accepted = self._accepted[step] = 1.0 if wait_s <= self._plant.refuse_s else 0.0
        for name, column in self._columns.items():
            sums = self._sums[name]
            sums[step + 1] = sums[step] + accepted * column[step]
        promised = self._columns["prompt_tokens"][step] + self._columns["answer_tokens"][step]
        self._sums["kv"][step + 1] = self._sums["kv"][step] + accepted * promised

    def _admit(self, step: int) -> None:
        """As many as the decode pool has room for have their blocks promised."""
        ready = self._workers.ready["decode"]
        until = float(step + 1)
        for name, taken, most in (
            ("kv", self._taken("kv"), self._plant.kv_tokens),
            ("requests", self._taken("requests"), self._plant.max_running),
        ):
            room = max(0.0, 0.99 * most * ready - taken)
            until = min(until, self._reach(name, self._at(name, self._admitted) + room, step + 1))
        self._admitted = max(until, self._admitted)

    def _prefill(self, step: int) -> None:
        """Prefill workers go on with what was admitted; what gets its turn is told how long it waited."""
        step_s, ready = self._load.step_s, self._workers.ready["prefill"]
        began, done = self._prefilled, self._at("work_s", self._prefilled)
        until = min(self._admitted, self._reach("work_s", done + ready * step_s, step + 1))
        self._prefilled = max(began, until)
        self._busy += self._at("work_s", self._prefilled) - done
        self._spent += ready * step_s
        moved = self._prefilled - began
        for cohort in range(math.ceil(began - 0.5), math.ceil(self._prefilled - 0.5)):
            turn = step + (cohort + 0.5 - began) / moved
            self._wait_s[cohort] = max(0.0, turn - cohort - 0.5) * step_s

    def _join(self, began: float, ended: float) -> None:
        """Prefilled requests begin to generate."""
        first = math.floor(self._progress / BIN_TOKENS)
        for step in range(math.floor(began), math.ceil(ended)):
            share = (min(ended, step + 1) - max(began, step)) * self._accepted[step]
            num = self._columns["requests"][step]
            if share <= 0 or not num:
                continue
            prompt = self._columns["prompt_tokens"][step] / num
            joins = self._load.answers[step] * share
            slots = (first + np.arange(NUM_BINS)) % RING
            rows = np.stack([joins, joins * (prompt + ANSWERS), joins * prompt, joins * self._progress])
            self._ending[:, slots] += rows
            self._present += rows.sum(axis=1)

    def _decode(self) -> float:
        """One step of the simulation, which is many of the workers'; gives how long one of theirs takes."""
        ready = max(1, self._workers.ready["decode"])
        itl_s = self._fixed_s + (self._seq_s * self._present[0] + self._read_s * self._reads()) / ready
        made = min(self._load.step_s / itl_s, (RING - NUM_BINS - 1) * BIN_TOKENS)
        first = math.floor(self._progress / BIN_TOKENS)
        self._progress += made
        slots = np.arange(first, math.floor(self._progress / BIN_TOKENS)) % RING
        if len(slots):
            self._present -= self._ending[:, slots].sum(axis=1)
            self._ending[:, slots] = 0.0
        return float(itl_s)

    def _reads(self) -> float:
        """KV tokens of all that generate: their prompts, and what they have generated."""
        return max(0.0, float(self._present[2] + self._present[0] * self._progress - self._present[3]))

    def _taken(self, name: str) -> float:
        """Tokens, or places, that decode workers have promised."""
        waiting = self._at(name, self._admitted) - self._at(name, self._prefilled)
        return max(0.0, waiting + float(self._present[1 if name == "kv" else 0]))

    def _sample(self, step: int, itl_s: float) -> LoadSample:
        """What the autoscaler would be told."""
        span_s = (step + 1 - self._decided) * self._load.step_s
        came = {name: sums[step + 1] - sums[self._decided] for name, sums in self._sums.items()}
        seen = max(0, step + 1 - round(60 / self._load.step_s))
        work = self._sums["work_s"][step + 1] - self._sums["work_s"][seen]
        tokens = self._sums["uncached_tokens"][step + 1] - self._sums["uncached_tokens"][seen]
        since = slice(self._decided, step + 1)
        arrived = zip(self._columns["requests"][since], self._accepted[since], strict=True)
        refused = sum(num * (1 - share) for num, share in arrived)
        self._decided = step + 1
        num, plant, ready = came["requests"], self._plant, self._workers.ready
        generating, places = float(self._present[0]), self._taken("requests")
        mean = came["uncached_tokens"] / num if num else 0.0
        spread = came["uncached_squares"] / num / (mean * mean) - 1 if mean else 0.0
        worst = self._fixed_s + (itl_s - self._fixed_s) * (1 + 2.33 * SPREAD)
        return LoadSample(
            at=(step + 1) * self._load.step_s,
            span_s=span_s,
            requests_per_s=num / span_s,
            refused_per_s=refused / span_s,
            prompt_tokens_per_s=came["prompt_tokens"] / span_s,
            uncached_tokens_per_s=came["uncached_tokens"] / span_s,
            tokens_per_prompt=mean,
            prompt_spread=max(0.0, spread),
            answer_tokens_per_s=generating / itl_s,
            queued_requests=round(self._sums["requests"][step + 1] - self._at("requests", self._admitted)),
            itl_mean_s=itl_s if generating else None,
            itl_p99_s=worst if generating else None,
            prefill=PoolLoad(
                ready=ready["prefill"],
                waiting_tokens=round(
                    self._at("uncached_tokens", self._admitted) - self._at("uncached_tokens", self._prefilled)
                ),
                tokens_per_s=tokens / work if work else 0.0,
            ),
            decode=PoolLoad(
                ready=ready["decode"],
                running=round(places),
                reserved=round(places - generating),
                kv_share=min(1.0, self._taken("kv") / max(1, plant.kv_tokens * ready["decode"])),
                place_share=min(1.0, places / max(1, plant.max_running * ready["decode"])),
            ),
        )

    def _at(self, name: str, position: float) -> float:
        """A sum up to a position."""
        sums, whole = self._sums[name], int(position)
        part = position - whole
        return sums[whole] + (part * (sums[whole + 1] - sums[whole]) if part else 0.0)

    def _reach(self, name: str, value: float, end: int) -> float:
        """The position at which a sum has a value; no further than `end`."""
        sums = self._sums[name]
        if value >= sums[end]:
            return float(end)
        after = bisect.bisect_right(sums, value, lo=max(0, int(self._prefilled) - 1), hi=end)
        before, rise = sums[after - 1], sums[after] - sums[after - 1]
        return after - 1 + (value - before) / rise if rise else float(after)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one policy."""

    gpu_hours: float
    ttft_share: float
    """Of the requests that came, refused ones included: those with a first token within the SLO."""
    itl_share: float
    """Of the tokens, those within the SLO."""
    refused: float
    """Share of the requests."""
    mean_prefill: float
    mean_decode: float

    @property
    def keeps_slos(self) -> bool:
        """Both, for 99 %."""
        return self.ttft_share >= 0.99 and self.itl_share >= 0.99


def figures_of(run: Run, load: Load, plant: Plant, skip_s: float) -> Figures:
    """What counts of a run, without its beginning."""
    begin = round(skip_s / load.step_s)
    within = np.cumsum(load.services[begin:], axis=1)
    left = np.clip((plant.ttft_slo_s - run.wait_s[begin:]) / plant.ttft_slo_s * SERVICE_BINS, 0, SERVICE_BINS)
    index = np.maximum(left.astype(int) - 1, 0)
    in_time = np.where(left >= 1, within[np.arange(len(index)), index], 0.0) * (1 - run.refused[begin:])
    num, tokens = load.requests[begin:], run.tokens[begin:]
    fixed = plant.decode.step_s(StepWork(0, 0, 0), 0)
    allowed = (plant.itl_slo_s - fixed) / np.maximum(1e-9, run.itl_s[begin:] - fixed)
    smooth = 0.5 * (1 + np.vectorize(math.erf)((allowed - 1) / SPREAD / math.sqrt(2)))
    return Figures(
        gpu_hours=float(run.workers[begin:].sum()) * load.step_s / 3600,
        ttft_share=float(in_time.sum() / num.sum()),
        itl_share=float((smooth * tokens).sum() / max(1.0, tokens.sum())),
        refused=float((run.refused[begin:] * num).sum() / num.sum()),
        mean_prefill=float(run.prefill[begin:].mean()),
        mean_decode=float(run.decode[begin:].mean()),
    )
