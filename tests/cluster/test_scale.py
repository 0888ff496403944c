"""`pdserve scale` and `pdserve restart`, with a wish in a real Valkey."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from cluster.cli import main
from tests.cluster.wanted_cluster import FakeController, WantedCluster
from tests.real_valkey import RealValkey


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_both_pools_and_one(wanted: WantedCluster, valkey: RealValkey) -> None:
    wanted.up()
    with FakeController(valkey):
        shown = run("scale", "prefill=2", "decode=6")
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.startswith("Wanted now: prefill 2, decode 6.\nDone (")
        assert run("scale", "decode=1").exit_code == 0
    wish = wanted.wish()
    assert (wish.sizes, wish.by) == ({"prefill": 2, "decode": 1}, "scale")
    assert wish.config["decode"]["workers"] == 2
    assert [line.what for line in wanted.store.history(2)] == ["decode 6 -> 1", "prefill 1 -> 2, decode 2 -> 6"]


def test_what_is_wanted_already_is_not_written_again(wanted: WantedCluster) -> None:
    generation = wanted.up()
    shown = run("scale", "decode=2")
    assert (shown.exit_code, shown.output) == (0, "Nothing to do, wanted already: prefill 1, decode 2.\n")
    assert wanted.wish().generation == generation


def test_json_and_a_controller_that_is_silent(wanted: WantedCluster) -> None:
    wanted.up()
    shown = run("scale", "decode=3", "--timeout", "0.3", "--json")
    told = json.loads(shown.stdout)
    assert (shown.exit_code, told["sizes"], told["settled"]) == (6, {"prefill": 1, "decode": 3}, False)


def test_the_autoscaler_goes_on_from_there(wanted: WantedCluster) -> None:
    wanted.up(scaling={"mode": "on", "decode": {"max": 4}})
    shown = run("scale", "decode=3", "--no-wait")
    assert "The autoscaler goes on from there (prefill 1 to 8, decode 1 to 4)" in shown.output


@pytest.mark.parametrize("words", [["router=2"], ["decode"], ["decode=-1"], ["decode=x"], ["decode=1", "decode=2"], []])
def test_wrong_words_are_refused(wanted: WantedCluster, words: list[str]) -> None:
    generation = wanted.up()
    assert run("scale", *words).exit_code == 2
    assert wanted.wish().generation == generation


@pytest.mark.parametrize(("word", "problem"), [("prefill=0", "mode: colocated"), ("decode=2000", "from 1 to 1000")])
def test_sizes_that_cannot_be_are_refused(wanted: WantedCluster, word: str, problem: str) -> None:
    generation = wanted.up()
    shown = run("scale", word)
    assert shown.exit_code == 1
    assert problem in shown.output
    assert wanted.wish().generation == generation


def test_a_colocated_cluster_has_one_pool(wanted: WantedCluster) -> None:
    wanted.up(mode="colocated")
    assert "no prefill pool in mode colocated" in run("scale", "prefill=2").output
    assert "no prefill pool in mode colocated" in run("restart", "prefill").output
    assert run("scale", "decode=4", "--no-wait").exit_code == 0
    assert wanted.wish().sizes == {"decode": 4}
    assert run("restart", "--no-wait").exit_code == 0
    assert wanted.wish().turns == {"decode": 1, "router": 1}


def test_a_restart_is_one_more_turn(wanted: WantedCluster, valkey: RealValkey) -> None:
    wanted.up()
    for name in ("prefill-0", "decode-0", "router-0"):
        wanted.put(name)
    wanted.put("decode-1", pool="prefill")
    with FakeController(valkey):
        shown = run("restart", "decode", "router")
        assert shown.exit_code == 0, shown.output
        assert "Replacing one after another: 2 decode, 1 router." in shown.stdout
        assert run("restart").exit_code == 0
        assert run("restart", "all", "decode").exit_code == 0
    assert wanted.wish().turns == {"prefill": 2, "decode": 3, "router": 3}
    first = wanted.store.history()[2]
    assert (first.by, first.what) == ("restart", "restart decode, router")


@pytest.mark.parametrize("words", [["scale", "decode=2"], ["restart"], ["history"]])
def test_where_nothing_runs(run_dir: object, words: list[str]) -> None:
    shown = run(*words)
    assert shown.exit_code == 3
    assert "Start one with `pdserve up`" in shown.output
