"""The simulation of pools that scale: loads, queues, policies, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import elastic_cluster
from benchmarks.elastic import main
from benchmarks.elastic_load import Curves, Load, make_load, service_s, uncached_lengths
from benchmarks.elastic_policies import ByUtilisation, Fixed, Ours
from benchmarks.elastic_sim import Cluster, Plant, Run, Workers, figures_of
from cluster.load import RequestRecord
from cluster.load_trace import TraceLine
from cluster.scaling_config import PoolLimits, ScalingConfig
from engine.pace import PaceOptions, StepWork

PREFILL = PaceOptions(fixed_ms=1.0, prompt_token_us=20.0, kv_gb_per_s=70.0, kv_bytes_per_token=131072)
DECODE = PaceOptions(fixed_ms=4.0, token_us=0.5, kv_gb_per_s=3000.0, kv_bytes_per_token=131072)
PLANT = Plant(decode=DECODE, kv_tokens=819_200, max_running=128, ttft_slo_s=2.0, itl_slo_s=0.03)
WIDE = PoolLimits(min=1, max=1000)
SCALING = ScalingConfig(mode="on", prefill=WIDE, decode=WIDE, itl_slo_s=0.03, headroom=0.1, hysteresis=0.1)


def trace_lines() -> list[TraceLine]:
    """Two requests a second for half an hour; every second prompt has half of it in common with the first of all."""
    rng = np.random.default_rng(3)
    lines = []
    for number in range(3600):
        blocks = int(rng.integers(4, 24))
        shared = list(range(blocks // 2)) if number % 2 else []
        ids = shared + [100 * number + 1000 + i for i in range(blocks - len(shared))]
        lines.append(TraceLine(number * 500.0, blocks * 512, int(rng.integers(50, 500)), ids))
    return lines


def load_of(curves: Curves | None = None, *, scale: float = 5.0, hours: float = 1.0, seed: int = 1) -> Load:
    return make_load(
        trace_lines(),
        scale=scale,
        curves=curves or Curves(),
        duration_s=hours * 3600,
        step_s=1.0,
        pace=PREFILL,
        max_tokens=32768,
        slo_s=2.0,
        seed=seed,
    )


def run(load: Load, policy: Fixed | Ours | ByUtilisation, prefill: int, decode: int) -> Run:
    return Cluster(load, PLANT, policy, {"prefill": prefill, "decode": decode}).run()


def test_what_is_cached_is_what_an_earlier_prompt_began_with() -> None:
    lines = [
        TraceLine(0, 1000, 1, [1, 2]),
        TraceLine(1, 1500, 1, [1, 2, 3]),
        TraceLine(2, 1000, 1, [9, 2]),
        TraceLine(3, 1024, 1, [1, 2]),
    ]
    assert uncached_lengths(lines).tolist() == [1000, 476, 1000, 1]


def test_prefill_takes_the_time_of_its_steps() -> None:
    whole = service_s(np.array([5000.0]), np.array([6000.0]), PREFILL)[0]
    steps = [StepWork(2048, 0, 6000), StepWork(2048, 0, 6000 - 2048), StepWork(904, 0, 6000 - 4096)]
    assert whole == pytest.approx(sum(PREFILL.step_s(each, 0) for each in steps))


def test_a_load_is_its_trace_faster_and_the_same_for_a_seed() -> None:
    load, again = load_of(), load_of()
    assert load.requests.mean() == pytest.approx(10.0, rel=0.05)
    assert np.array_equal(load.answers, again.answers)
    assert not np.array_equal(load.requests, load_of(seed=2).requests)
    assert load.answers.sum() == load.services.sum() == load.requests.sum()
    assert 0.6 < load.uncached_tokens.sum() / load.prompt_tokens.sum() < 0.9


def test_curves_do_what_they_say() -> None:
    daily = Curves(daily=0.5).rate(np.array([0.0, 43200.0]), np.random.default_rng(0))
    assert daily.tolist() == pytest.approx([0.5, 1.5])
    bursts = Curves(burst=2.0, burst_every_s=3600.0).rate(np.arange(86400.0), np.random.default_rng(0))
    assert bursts.min() == 1.0
    assert bursts.max() >= 2.0
    prompts, answers = Curves(shift=0.5).lengths(np.array([7200.0]))
    assert prompts[0] * answers[0] == pytest.approx(1.0)
    assert prompts[0] > 1.5


def test_enough_workers_keep_the_slos_and_too_few_do_not() -> None:
    load = load_of()
    work = load.work_s.mean()
    kept = figures_of(run(load, Fixed(), int(work * 1.5) + 1, 8), load, PLANT, 600.0)
    assert kept.keeps_slos
    assert kept.refused == 0.0
    assert kept.gpu_hours == pytest.approx((int(work * 1.5) + 9) * 3000 / 3600)
    short = figures_of(run(load, Fixed(), max(1, int(work * 0.7)), 8), load, PLANT, 600.0)
    assert short.ttft_share < 0.5
    assert short.refused > 0.1
    slow = figures_of(run(load, Fixed(), int(work * 1.5) + 1, 1), load, PLANT, 600.0)
    assert slow.itl_share < 0.99 or slow.ttft_share < 0.99


def test_tokens_are_all_generated() -> None:
    load = load_of()
    made = run(load, Fixed(), 12, 8)
    assert made.tokens.sum() == pytest.approx(load.answer_tokens.sum(), rel=0.02)


def test_a_change_of_role_is_fast_and_a_new_worker_is_not() -> None:
    workers = Workers(PLANT, {"prefill": 2, "decode": 4}, {"prefill": 2, "decode": 4})
    workers.want({"prefill": 4, "decode": 3}, 0.0, changes_roles=True)
    assert (workers.ready, workers.num) == ({"prefill": 2, "decode": 3}, 7)
    workers.pass_time(PLANT.role_s)
    assert workers.ready == {"prefill": 3, "decode": 3}
    workers.pass_time(PLANT.start_s)
    assert workers.ready == {"prefill": 4, "decode": 3}
    workers.want({"prefill": 3, "decode": 3}, 100.0, changes_roles=True)
    assert (workers.ready["prefill"], workers.num) == (3, 7), "paid for until it has drained"
    workers.pass_time(100.0 + PLANT.drain_s)
    assert workers.num == 6


def test_the_autoscaler_follows_a_load_that_moves() -> None:
    load = load_of(Curves(shift=0.6), scale=20.0, hours=2.0)
    ours = Ours(SCALING, ttft_slo_s=2.0, start_s=PLANT.start_s)
    made = figures_of(run(load, ours, 20, 10), load, PLANT, 900.0)
    assert made.ttft_share > 0.98
    assert made.itl_share > 0.98
    assert any("prefill" in reason for _, reason in ours.reasons)
    by_use = figures_of(run(load, ByUtilisation(0.7, 0.7), 20, 10), load, PLANT, 900.0)
    assert by_use.mean_prefill != made.mean_prefill


def test_the_command(tmp_path: Path) -> None:
    trace, found = tmp_path / "trace.jsonl", tmp_path / "found.json"
    with trace.open("w") as file:
        for line in trace_lines():
            plain = {"timestamp": line.at_ms, "input_length": line.input_length, "output_length": line.output_length}
            file.write(json.dumps({**plain, "hash_ids": line.hash_ids}) + "\n")
    options = ["--scale", "3", "--hours", "0.1", "--flat-hours", "0.1", "--step", "60", "--json", str(found)]
    result = CliRunner().invoke(main, ["--simulate", "--trace", str(trace), *options])
    assert result.exit_code == 0, result.output
    assert "| modulated | setting | GPU-hours |" in result.output
    names = [one["name"] for one in json.loads(found.read_text())["results"]["as recorded"]]
    assert names[0] == "autoscaler"
    assert len(names) == 4
    assert "--trace" in CliRunner().invoke(main, ["--simulate"]).output


def test_what_a_cluster_did_is_accounted_for(tmp_path: Path) -> None:
    options = elastic_cluster.Options(phases=elastic_cluster.shifting(40.0), max_workers=4)
    figures = elastic_cluster.Figures(options)
    records = [RequestRecord(due, arrivals=[(due + 0.5, 1), (due + 0.55, 1)]) for due in (1.0, 41.0, 81.0)]
    late = RequestRecord(42.0, arrivals=[(45.0, 1), (45.5, 1)])
    elastic_cluster._account(figures, [records[0], records[1], late, records[2]], [2, 2, 2, 3])
    figures.looks = [elastic_cluster.Look(1.0, 2, 2, 4, 4), elastic_cluster.Look(60.0, 1, 3, 5, 4)]
    first, second, _ = elastic_cluster.by_phase(figures)
    assert (first.recovered_s, first.sizes) == (0.0, "2P 2D")
    assert second.worst_ttft_s == pytest.approx(3.0, rel=0.02)
    assert second.recovered_s == 10.0, "the window of the late answer is over"
    assert elastic_cluster.problems(figures) == [
        "no failures, 1 answers of another length than asked",
        "5 members at once, over the budget of 4",
    ]
    assert "4 requests, 0 failed" in elastic_cluster.table(figures)
    elastic_cluster.plot(figures, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
