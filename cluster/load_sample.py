"""stub"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadSample:
    at: float


class LoadMeter:
    def sample(self, routers, fronts, now):
        return LoadSample(now)
