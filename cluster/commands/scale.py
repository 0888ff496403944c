"""`pdserve scale` and `pdserve restart`: sizes by hand, and processes replaced one after another."""

from __future__ import annotations

import time
from collections import Counter

import click

from cluster.change_plan import POOLS, pools_of, router_gap, size_problem
from cluster.cluster_store import Decision, Wish
from cluster.commands.wish_options import EXIT_CODES, bound_of, cluster_store, see_it_through, wish_options
from cluster.config_diff import KINDS
from cluster.connect import read_wish
from cluster.wish_change import Proposal, write

_SCALE_EPILOG = f"""\b
Examples:
  pdserve scale decode=6
  pdserve scale prefill=2 decode=6
  pdserve scale decode=1 --no-wait

A size set here stays when a YAML is applied whose `workers` of that pool did
not change. With scaling.mode on, the autoscaler goes on from there.

{EXIT_CODES}
"""
_RESTART_EPILOG = f"""\b
Examples:
  pdserve restart                  everything
  pdserve restart decode
  pdserve restart prefill router

Each process drains (at most drain_s of the YAML), stops, and a new one takes
its place; the next one follows when that one is ready. Requests go on.
prefill and decode mean the workers that were started as such: one that has
changed its role since belongs to the pool whose settings it has.

{EXIT_CODES}
"""


def _sizes(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, int]:
    asked: dict[str, int] = {}
    for text in texts:
        pool, _, number = text.partition("=")
        if pool not in POOLS or not (number.isascii() and number.isdigit()):
            raise click.BadParameter(f"{text!r} must be prefill=N or decode=N, with a whole number of workers")
        if pool in asked:
            raise click.BadParameter(f"{pool} is named twice")
        asked[pool] = int(number)
    return asked


@click.command(epilog=_SCALE_EPILOG)
@click.argument("asked", nargs=-1, required=True, callback=_sizes, metavar="POOL=N...")
@wish_options
def scale(asked: dict[str, int], waits: bool, timeout_s: float | None, as_json: bool) -> None:
    """Set how many workers a pool has."""

    def decide(wish: Wish) -> Proposal | None:
        running = {pool: wish.sizes[pool] for pool in pools_of(wish.config) if pool in wish.sizes}
        if problem := size_problem(wish.config, {**running, **asked}):
            raise click.ClickException(problem)
        changed = [
            f"{pool} {running.get(pool, 0)} -> {size}" for pool, size in asked.items() if size != running.get(pool)
        ]
        if not changed:
            return None
        return Proposal(
            decision=Decision(at=time.time(), by="scale", what=", ".join(changed), reason="asked for by hand"),
            sizes={**wish.sizes, **asked},
        )

    with cluster_store() as store:
        generation = write(store, decide)
        wish = read_wish(store)
        if not as_json:
            click.echo(_sizes_said(wish, is_new=generation is not None))
        bound = bound_of(wish.config) if timeout_s is None else timeout_s
        see_it_through(store, generation, {"sizes": wish.sizes}, waits=waits, timeout_s=bound, as_json=as_json)


def _sizes_said(wish: Wish, *, is_new: bool) -> str:
    sizes = ", ".join(f"{pool} {wish.sizes[pool]}" for pool in pools_of(wish.config))
    said = [f"{'Wanted now' if is_new else 'Nothing to do, wanted already'}: {sizes}."]
    scaling = wish.config["scaling"]
    if scaling["mode"] == "on":
        limits = ", ".join(f"{pool} {scaling[pool]['min']} to {scaling[pool]['max']}" for pool in pools_of(wish.config))
        said.append(f"The autoscaler goes on from there ({limits}); to keep sizes, set scaling.mode to advise or off.")
    return "\n".join(said)


@click.command(epilog=_RESTART_EPILOG)
@click.argument("kinds", nargs=-1, type=click.Choice([*KINDS, "all"]), metavar="[prefill|decode|router|all]...")
@wish_options
def restart(kinds: tuple[str, ...], waits: bool, timeout_s: float | None, as_json: bool) -> None:
    """Replace the processes of a pool, or all, one after another."""

    def chosen(wish: Wish) -> list[str]:
        there = [*pools_of(wish.config), "router"]
        if not kinds or "all" in kinds:
            return there
        if gone := [kind for kind in kinds if kind not in there]:
            raise click.ClickException(f"there is no {gone[0]} pool in mode {wish.config['mode']}")
        return [kind for kind in there if kind in kinds]

    def decide(wish: Wish) -> Proposal:
        which = chosen(wish)
        turns = {**wish.turns, **{kind: wish.turns.get(kind, 0) + 1 for kind in which}}
        what = f"restart {', '.join(which)}"
        return Proposal(
            decision=Decision(at=time.time(), by="restart", what=what, reason="asked for by hand"), turns=turns
        )

    with cluster_store() as store:
        generation = write(store, decide)
        wish = read_wish(store)
        which = chosen(wish)
        started_as: Counter[str] = Counter(member.born or "router" for member in store.members().values())
        counts = {kind: started_as[kind] for kind in which}
        if not as_json:
            click.echo(f"Replacing one after another: {', '.join(f'{counts[kind]} {kind}' for kind in which)}.")
            if "router" in which and (gap := router_gap(wish.config)):
                click.echo(f"  Note: {gap}.")
        bound = bound_of(wish.config, max(counts.values())) if timeout_s is None else timeout_s
        see_it_through(store, generation, {"restart": which}, waits=waits, timeout_s=bound, as_json=as_json)
