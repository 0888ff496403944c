"""Trends, and servers for a wait."""

from __future__ import annotations

import random

import pytest

from cluster.forecast import ahead, line, peak, recent, servers_for, slope


def points_of(start: float, rise: float, num: int = 60, step_s: float = 5.0) -> list[tuple[float, float]]:
    return [(i * step_s, start + rise * i * step_s) for i in range(num)]


def test_the_present_is_what_came_of_late() -> None:
    points = [*points_of(10.0, 0.0), *((300.0 + 5 * i, 40.0) for i in range(6))]
    assert recent(points) == 40.0
    assert recent([]) == peak([], 60.0) == 0.0
    assert peak([*points, *((330.0 + 5 * i, 10.0) for i in range(10))], 60.0) == 40.0
    assert peak([*points, *((330.0 + 5 * i, 10.0) for i in range(30))], 60.0) == 10.0


def test_a_trend_is_taken_for_one_only_if_it_is_clear() -> None:
    assert slope(points_of(100.0, 0.5)) == pytest.approx(0.5)
    assert slope(points_of(100.0, -0.5)) == pytest.approx(-0.5)
    rng = random.Random(1)
    noise = [(i * 5.0, 100 * rng.lognormvariate(0, 0.3)) for i in range(60)]
    assert slope(noise) == 0.0
    outlier = [*points_of(100.0, 0.5)[:-1], (295.0, 1e6)]
    assert slope(outlier) < 5
    assert slope(points_of(1.0, 1.0, num=3)) == 0.0


def test_no_load_is_expected_to_more_than_double() -> None:
    assert ahead(100.0, 1.0, 30.0) == 130.0
    assert ahead(100.0, 50.0, 600.0) == 200.0
    assert ahead(100.0, -5.0, 30.0) == 100.0


def simulated_wait(work: float, servers: int, rng: random.Random) -> float:
    """The p99 of waits in a queue with Poisson arrivals and exponential services of 1 s on average."""
    free_at, now, waits = [0.0] * servers, 0.0, []
    for _ in range(60_000):
        now += rng.expovariate(work)
        first = min(range(servers), key=free_at.__getitem__)
        begins = max(now, free_at[first])
        waits.append(begins - now)
        free_at[first] = begins + rng.expovariate(1.0)
    return sorted(waits)[int(0.99 * len(waits))]


@pytest.mark.parametrize(("work", "wait_s"), [(1.5, 2.0), (4.0, 1.0), (10.0, 0.5)])
def test_so_many_servers_keep_the_wait_and_one_fewer_would_not(work: float, wait_s: float) -> None:
    servers = servers_for(work, 1.0, 1.0, wait_s)
    assert simulated_wait(work, servers, random.Random(1)) <= wait_s * 1.1
    assert servers == 1 + int(work) or simulated_wait(work, servers - 1, random.Random(1)) > wait_s * 0.9


def test_more_servers_for_more_work_and_for_shorter_waits() -> None:
    sizes = [servers_for(work / 4, 0.5, 2.0, 1.0) for work in range(200)]
    assert sizes == sorted(sizes)
    assert servers_for(5.0, 1.0, 1.0, 0.1) > servers_for(5.0, 1.0, 1.0, 10.0) == 6
    assert servers_for(0.0, 1.0, 1.0, 1.0) == 0


def test_how_a_figure_grows_with_a_load() -> None:
    varied = line([(x / 20, 0.004 + 0.03 * x / 20) for x in range(2, 20)], 2.0)
    assert (varied.fixed, varied.rise) == (pytest.approx(0.004, abs=0.001), pytest.approx(0.03, rel=0.1))
    assert varied.reaches(varied.at(0.7)) == pytest.approx(0.7)
    constant = line([(0.5, 0.02)] * 20, 3.0)
    assert constant.at(0.5) == pytest.approx(0.02)
    assert constant.rise / constant.fixed == pytest.approx(3.0), "nothing is seen: as usual"
    flat = line([(x / 20, 0.03) for x in range(2, 20)], 2.0)
    assert flat.at(1.0) < 1.15 * flat.at(0.1)
    assert line([(0.2, 0.03), (0.4, 0.02), (0.8, 0.01)], 0.0).reaches(1.0) == float("inf"), "it never falls"
