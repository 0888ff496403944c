"""How a decode worker shares out, among the routers that are attached, what it can still promise. Pure arithmetic.

Each gets the same number of requests, of the usual size; those that are left over go to some of them, in turn, so that
the last place of a worker is not promised to all of them at once, nor to none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """One router's."""

    requests: int
    blocks: int


def share_out(places: int, blocks: int, usual_blocks: float, num_routers: int, turn: int) -> list[Share]:
    """Each router's share of so many places and blocks, with requests that usually take `usual_blocks`.

    Whoever may ask for a request gets blocks in proportion, also if they are fewer than usual.
    """
    num = min(places, max(1, int(blocks / max(1.0, usual_blocks)))) if places > 0 and blocks > 0 else 0
    each, rest = divmod(num, num_routers)
    requests = [each + ((index - turn) % num_routers < rest) for index in range(num_routers)]
    return [Share(own, -(-blocks * own // num) if num else 0) for own in requests]
