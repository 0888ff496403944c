"""Where a load is going, and how many servers keep its waits short. Pure arithmetic over what was seen."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
"""Time in seconds, value; oldest first."""

RECENT_S = 30.0
"""What lies no further back is taken as the present."""
NUM_BINS = 12
"""Of so many means a trend is made."""
CLEAR = 0.75
"""Share of the pairs of means that must agree on a trend's direction."""
SUDDEN_S = 60.0
SUDDENLY_CLEAR = 0.9
"""The same for a trend within the last SUDDEN_S."""
MAX_RISE = 1.0
"""A load is never expected to rise by more than this share of itself, however far ahead."""
MOST_SERVERS = 2000
"""No more are ever reckoned with."""


def recent(points: Points) -> float:
    """Mean of what lies within RECENT_S of the last point; 0 if there is none."""
    if not points:
        return 0.0
    since = points[-1][0] - RECENT_S
    values = [value for at, value in reversed(points) if at > since]
    return sum(values) / len(values)


def peak(points: Points, span_s: float) -> float:
    """The greatest mean over RECENT_S that lies within the last `span_s`."""
    if not points:
        return 0.0
    since, most, total, first = points[-1][0] - span_s, 0.0, 0.0, 0
    for index, (at, value) in enumerate(points):
        total += value
        while points[first][0] <= at - RECENT_S:
            total -= points[first][1]
            first += 1
        is_whole = first > 0 or index == len(points) - 1
        if at >= since and is_whole:
            most = max(most, total / (index + 1 - first))
    return most


def trend(points: Points, span_s: float) -> float:
    """Rise in a second over so long, or a greater one that is new."""
    if not points:
        return 0.0
    end = points[-1][0]
    long = slope([point for point in points if point[0] > end - span_s])
    return max(long, slope([point for point in points if point[0] > end - SUDDEN_S], SUDDENLY_CLEAR))


def slope(points: Points, clear: float = CLEAR) -> float:
    """Rise in a second, 0 where it is not clear: the median over pairs of means (Theil 1950, Sen 1968)."""
    if len(points) < NUM_BINS // 2:
        return 0.0
    per_bin = max(1, len(points) // NUM_BINS)
    bins = [points[start : start + per_bin] for start in range(len(points) % per_bin, len(points), per_bin)]
    means = [(sum(at for at, _ in each) / len(each), sum(value for _, value in each) / len(each)) for each in bins]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(means, 2) if t > s]
    if not slopes:
        return 0.0
    agree = max(sum(each > 0 for each in slopes), sum(each < 0 for each in slopes)) / len(slopes)
    return statistics.median(slopes) if agree >= clear else 0.0


def ahead(level: float, rise_per_s: float, horizon_s: float) -> float:
    """What a load may have risen to by then; never less than it is."""
    return level + min(max(0.0, rise_per_s * horizon_s), MAX_RISE * level)


def servers_for(work: float, service_s: float, spread: float, wait_s: float, late: float = 0.01) -> int:
    """Fewest servers at which no more than the share `late` waits longer than `wait_s`.

    `work`: seconds of service that come in a second; `service_s` and `spread`: mean of one service, and its variance
    over the square of the mean. Erlang's C for the chance to wait at all, and exponential waits as in M/G/c queues
    with many servers (Kingman's factor for services that differ).
    """
    if work <= 0:
        return 0
    blocked, slowness = 1.0, max(1e-9, service_s * (1 + spread) / 2)
    for servers in range(1, MOST_SERVERS):
        blocked = work * blocked / (servers + work * blocked)
        if servers <= work:
            continue
        waits = blocked / (1 - work / servers * (1 - blocked))
        if waits * math.exp(-(servers - work) * wait_s / slowness) <= late:
            return servers
    return MOST_SERVERS


@dataclass(frozen=True, slots=True)
class Line:
    """A figure that grows with a load: a fixed part, and one for each unit of load."""

    fixed: float
    rise: float

    def at(self, load: float) -> float:
        """The figure at a load."""
        return self.fixed + self.rise * load

    def reaches(self, value: float) -> float:
        """The load at which the figure has that value; infinite if it does not grow."""
        return (value - self.fixed) / self.rise if self.rise > 0 else math.inf


def line(pairs: Sequence[tuple[float, float]], usual: float) -> Line:
    """The line through (load, figure): least squares that lean, where the load hardly varied, to a figure that a load
    of 1 makes greater by `usual` times its fixed part. It never falls."""
    known = [(x, y) for x, y in pairs if x > 0 and y > 0]
    if not known:
        return Line(1.0, usual)
    mean_x, mean_y = (math.fsum(each) / len(known) for each in zip(*known, strict=True))
    doubt = 0.04 * mean_x * mean_x * len(known)
    above = math.fsum((x - mean_x) * (y - mean_y) for x, y in known) + doubt * usual * mean_y / (1 + usual * mean_x)
    rise = max(0.0, above / (math.fsum((x - mean_x) ** 2 for x, _ in known) + doubt)) if doubt else 0.0
    rise = min(rise, 0.98 * mean_y / mean_x)
    return Line(mean_y - rise * mean_x, rise)
