"""Writes a wish that is decided on the one that stands, and decides again where somebody else was faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.cluster_store import ClusterStore, Decision, Wish, WishChangedError
from cluster.connect import read_wish


class BusyWishError(RuntimeError):
    """Others change the wish too often for this change to get in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """What is to be written; None: stays as it is."""

    decision: Decision
    config: dict[str, Any] | None = None
    sizes: dict[str, int] | None = None
    turns: dict[str, int] | None = None


def write(store: ClusterStore, decide: Callable[[Wish], Proposal | None]) -> int | None:
    """Write what `decide` proposes for the wish that stands; the new generation, or None if it proposes nothing.

    Where the wish is changed meanwhile it is decided anew, once. Raises NotRunningError, BusyWishError, and what
    `decide` raises.
    """
    for _ in range(2):
        wish = read_wish(store)
        proposal = decide(wish)
        if proposal is None:
            return None
        try:
            return store.change(
                wish.generation,
                proposal.decision,
                config=proposal.config,
                sizes=proposal.sizes,
                turns=proposal.turns,
            )
        except WishChangedError:
            continue
    by = read_wish(store).by
    raise BusyWishError(
        f"{by} changed what is wanted twice meanwhile, and nothing was written: see `pdserve history`, and try again"
    )
