"""What applying a configuration would do, in figures and in words."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.change_plan import is_refused, meaning, notes, plan, shown, size_problem, summary
from cluster.cluster_store import Wish
from tests.cluster.wanted_cluster import plain


def wish(sizes: dict[str, int] | None = None, **sections: Any) -> Wish:
    return Wish(generation=7, config=plain(**sections), sizes=sizes or {"prefill": 1, "decode": 2}, by="up")


def test_nothing_to_do() -> None:
    made = plan(wish(), plain())
    assert (made.needs, made.changes, made.sizes_then, notes(made), is_refused(made)) == (
        "nothing",
        [],
        {"prefill": 1, "decode": 2},
        [],
        "",
    )


def test_a_size_follows_the_file_where_its_number_changed() -> None:
    made = plan(wish(), plain(decode={"workers": 3}))
    assert made.sizes_then == {"prefill": 1, "decode": 3}
    assert [meaning(change, made) for change in made.changes] == ["decode: 2 -> 3 workers"]
    assert summary(made) == "decode.workers 2 -> 3"


def test_a_size_that_somebody_else_set_stays_when_the_number_did_not_change() -> None:
    made = plan(wish({"prefill": 1, "decode": 6}), plain(drain_s=5))
    assert made.sizes_then == {"prefill": 1, "decode": 6}
    assert notes(made) == [
        "decode has 6 workers wanted, the file says 2: `pdserve scale` or the autoscaler changed it, and apply leaves "
        "it at 6; `pdserve scale decode=2` would set it"
    ]


def test_a_number_that_is_there_already_starts_nobody() -> None:
    made = plan(wish({"prefill": 1, "decode": 3}), plain(decode={"workers": 3}))
    assert [meaning(change, made) for change in made.changes] == ["nothing now: decode has 3 already"]
    assert made.sizes_then["decode"] == 3
    assert notes(made) == []


def scaling(**keys: Any) -> dict[str, Any]:
    return {"scaling": keys}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"decode": {"workers": 2, "max_running": 9}}, "each decode worker is replaced, one after another"),
        ({"cache": {"memory_mib": 9}}, "every worker is replaced, one after another"),
        ({"observability": {"log_level": "debug"}}, "every worker and each router is replaced, one after another"),
        ({"router": {"port": 0, "policy": "round_robin"}}, "each router is replaced, one after another"),
        ({"router": {"port": 0, "replicas": 2}}, "routers: 1 -> 2"),
        ({"drain_s": 5}, "counts from the next drain"),
        ({"start_timeout_s": 5}, "counts from the next start"),
        (scaling(mode="on"), "the autoscaler decides the sizes from now on"),
        (scaling(max_workers=9), "budget: at most 9 from now on"),
        (scaling(headroom=0.3), "counts once scaling.mode is advise or on"),
        (scaling(role_change=False), "counts from the next change of a size"),
        ({"cache": {"block_size": 8}}, "all of it stops and starts: `pdserve down`, `pdserve up`"),
    ],
)
def test_words(sections: dict[str, Any], words: str) -> None:
    made = plan(wish(), plain(**sections))
    assert [meaning(change, made) for change in made.changes] == [words]


def test_colocated_has_no_prefill_pool() -> None:
    before = wish({"decode": 2}, mode="colocated")
    made = plan(before, plain(mode="colocated", prefill={"workers": 5, "threads": 2}))
    assert made.sizes_then == {"decode": 2}
    assert {meaning(change, made) for change in made.changes} == {"nothing: mode colocated has no prefill pool"}


def test_one_router_has_a_gap_and_two_have_none() -> None:
    routers: dict[str, Any] = {"port": 0, "policy": "round_robin"}
    assert notes(plan(wish(), plain(router=routers)))[0].startswith("there is one router")
    assert notes(plan(wish(), plain(router={**routers, "replicas": 2}))) == []


def test_a_restart_is_refused_and_its_keys_are_named() -> None:
    made = plan(wish(), plain(mode="colocated", cache={"block_size": 8}, drain_s=1))
    assert made.needs == "restart"
    assert is_refused(made).startswith("mode, cache.block_size cannot change while the cluster runs")


def test_sizes_outside_the_autoscalers_limits_are_told() -> None:
    made = plan(wish(**scaling(mode="on")), plain(decode={"workers": 12}, **scaling(mode="on")))
    assert notes(made) == [
        "decode with 12 workers is outside scaling.decode (1 to 8): the autoscaler brings it there",
    ]


def test_a_budget_too_small_is_refused_unless_the_autoscaler_follows_it() -> None:
    small = plan(wish(), plain(**scaling(max_workers=2)))
    assert is_refused(small) == "1 prefill and 2 decode are 3 workers, more than scaling.max_workers (2) allows"
    assert is_refused(plan(wish(), plain(**scaling(max_workers=2, mode="on")))) == ""


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"prefill": 1, "decode": 2}, ""),
        ({"router": 2}, "no pool 'router'"),
        ({"prefill": 0}, "from 1 to 1000 workers, got 0; for no prefill workers"),
        ({"decode": 0}, "decode must have from 1 to 1000 workers, got 0"),
        ({"decode": 1001}, "got 1001"),
        ({"prefill": 2, "decode": 2}, "are 4 workers, more than scaling.max_workers (3)"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, int], problem: str) -> None:
    found = size_problem(plain(**scaling(max_workers=3)), sizes)
    assert problem in found
    assert bool(problem) is bool(found)


def test_gpus_count_where_they_are_known() -> None:
    config = plain(
        prefill={"device": "cuda", "tensor_parallel": 2}, decode={"num_gpus": 0.5}, scaling={"max_gpus": 5.0}
    )
    assert size_problem(config, {"prefill": 2, "decode": 2}) == ""
    assert "need 5.5 GPUs, more than scaling.max_gpus (5)" in size_problem(config, {"prefill": 2, "decode": 3})


def test_passwords_are_not_told() -> None:
    made = plan(wish(), plain(redis={"url": "redis://:hunter2@h:1"}))
    assert summary(made) == "redis.url - -> redis://***@h:1"


def test_values_are_shown_as_in_yaml() -> None:
    values = [None, True, 2.0, {"a": None, "b": [1, "x"]}, {}]
    assert [shown(value) for value in values] == ["-", "true", "2", "{b: [1, x]}", "{}"]


def test_a_long_list_of_changes_is_cut() -> None:
    pace = {"fixed_ms": 1.0}
    made = plan(wish(), plain(drain_s=1, move_after_s=1, start_timeout_s=1, mode="colocated", decode={"pace": pace}))
    assert summary(made).endswith(" and 2 more")
