"""What `pdserve status` says of a cluster: members from the controller's store, processes by their pages."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.cli import main
from cluster.commands import status
from cluster.health import Health, Report, gather
from cluster.members import Phase
from cluster.metrics import MetricsServer, StatsCollector, serve
from router.store import RedisStore, RouterRecord, WorkerRecord
from tests.cluster.wanted_cluster import WantedCluster, report


class Fleet:
    """Registers workers and routers whose metrics pages answer."""

    def __init__(self, wanted: WantedCluster, url: str, stack: ExitStack) -> None:
        self._wanted = wanted
        self._url = url
        self._stack = stack
        self.pages: dict[str, MetricsServer] = {}

    def serve(self, *member_ids: str, ready: float = 1.0) -> None:
        for member_id in member_ids:
            values = {"ready": ready, "free_blocks": 5, "num_blocks": 8, "num_running": 2, "num_waiting": 0}
            page = serve([StatsCollector("worker", lambda values=values: values)])
            self._stack.callback(page.close)
            self.pages[member_id] = page
            asyncio.run(self._register(member_id, page.address))

    async def _register(self, member_id: str, metrics: str) -> None:
        store = RedisStore(self._url, timeout_s=5.0)
        role: Any = member_id.partition("-")[0]
        if role == "router":
            await store.register_router(RouterRecord(router_id=member_id, address="h:1", metrics_address=metrics), 60)
        else:
            await store.register(
                WorkerRecord(worker_id=member_id, epoch=3, role=role, address="h:1", metrics_address=metrics), 60
            )
        await store.close()

    def say(self, **more: Any) -> None:
        self._wanted.store.say(report(self._wanted.wish(), **more), ttl_s=60)


@pytest.fixture
def fleet(wanted: WantedCluster, valkey: Any) -> Iterator[Fleet]:
    with ExitStack() as stack:
        stack.enter_context(_ray(wanted))
        yield Fleet(wanted, valkey.url, stack)


@contextmanager
def _ray(wanted: WantedCluster) -> Iterator[None]:
    """A port that answers as Ray's would."""
    state = wanted.run_dir.read_state()
    assert state is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        state.ray_address = f"127.0.0.1:{listener.getsockname()[1]}"
        wanted.run_dir.write_state(state)
        over = threading.Event()
        listener.settimeout(0.1)

        def accept() -> None:
            while not over.is_set():
                try:
                    listener.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield
        over.set()
        thread.join(5)


def look(wanted: WantedCluster) -> Report:
    return gather(wanted.run_dir)


def states(found: Report) -> dict[str, str]:
    return {member.member_id: member.state for member in found.members}


def test_all_as_wanted(wanted: WantedCluster, fleet: Fleet) -> None:
    wanted.up()
    names = ["prefill-0", "decode-0", "decode-10", "decode-9", "router-0"]
    for name in names:
        wanted.put(name)
    fleet.serve(*names)
    fleet.say()
    found = look(wanted)
    assert [member.member_id for member in found.members] == [
        "prefill-0",
        "decode-0",
        "decode-9",
        "decode-10",
        "router-0",
    ]
    assert (found.health, set(states(found).values())) == (Health.READY, {"ready"})
    assert found.scaling is not None
    assert (found.scaling.settled, found.controller) == (True, "deployed")


def test_without_the_controllers_word_the_yaml_counts(wanted: WantedCluster, fleet: Fleet) -> None:
    wanted.up()
    wanted.store.forget()
    fleet.serve("prefill-0", "decode-0", "router-0")
    found = look(wanted)
    assert states(found) == {"prefill-0": "ready", "decode-0": "ready", "decode-1": "missing", "router-0": "ready"}
    assert (found.health, found.scaling, found.controller) == (Health.DEGRADED, None, "")


def scaling_cluster(wanted: WantedCluster, fleet: Fleet) -> None:
    """decode grows, prefill shrinks, a worker has changed sides."""
    wanted.up(scaling={"mode": "on", "max_workers": 6})
    for name in ("prefill-0", "decode-0", "router-0"):
        wanted.put(name)
    wanted.put("prefill-1", pool="decode")
    wanted.put("prefill-2", phase=Phase.DRAINING, why="one fewer is wanted")
    wanted.put("decode-1", phase=Phase.PLACING, why="no node has room yet")
    fleet.serve("prefill-0", "prefill-1", "prefill-2", "decode-0", "router-0")
    fleet.say(settled=False, advice={"sizes": {"prefill": 1, "decode": 4}, "reason": "KV is 91 % full"}, nodes=2)


def test_a_cluster_that_scales_is_ready(wanted: WantedCluster, fleet: Fleet) -> None:
    scaling_cluster(wanted, fleet)
    found = look(wanted)
    assert found.health is Health.READY
    assert states(found)["prefill-2"] == "draining"
    assert states(found)["decode-1"] == "placing"
    assert found.scaling is not None
    prefill, decode = found.scaling.pools
    assert (prefill.wanted, prefill.ready, prefill.draining, prefill.advice) == (1, 1, 1, 1)
    assert (decode.wanted, decode.ready, decode.starting, decode.advice) == (2, 2, 1, 4)
    assert (found.scaling.budget["workers"].used, found.scaling.budget["workers"].limit) == (5, 6)


def test_what_people_read_while_it_scales(wanted: WantedCluster, fleet: Fleet) -> None:
    scaling_cluster(wanted, fleet)
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 0
    lines = [line.split() for line in shown.output.splitlines()]
    assert shown.output.startswith("ready, changing (ready), mode split")
    assert ["waiting", "decode-2:", "starting"] in lines
    assert ["prefill", "1", "1", "0", "1", "0", "1"] in lines
    assert ["decode", "2", "2", "1", "0", "0", "4"] in lines
    assert "  scaling on: KV is 91 % full" in shown.output.splitlines()
    assert "  budget: 5 of 6 workers" in shown.output.splitlines()
    rows = {line[0]: line for line in lines if line}
    assert rows["prefill-1"][1:3] == ["decode", "ready"]
    assert rows["prefill-1"][-3:] == ["born", "in", "prefill"]
    assert rows["decode-1"][2] == "placing"
    assert rows["decode-1"][-6:] == ["-", "no", "node", "has", "room", "yet"]
    told = json.loads(CliRunner().invoke(main, ["status", "--json"]).output)
    assert told["scaling"]["pools"][1]["advice"] == 4
    assert told["scaling"]["reason"] == "KV is 91 % full"
    assert [each["born"] for each in told["members"] if each["member_id"] == "prefill-1"] == ["prefill"]


def test_what_should_be_ready_and_is_not(wanted: WantedCluster, fleet: Fleet) -> None:
    wanted.up()
    names = ["prefill-0", "decode-0", "decode-1", "decode-2", "router-0"]
    for name in names:
        wanted.put(name)
    fleet.serve("prefill-0", "decode-0", "decode-2", "router-0")
    fleet.serve("decode-0", ready=0.0)
    fleet.say()
    fleet.pages["decode-2"].close()
    found = look(wanted)
    assert found.health is Health.DEGRADED
    assert states(found) == {
        "prefill-0": "ready",
        "decode-0": "starting",
        "decode-1": "missing",
        "decode-2": "silent",
        "router-0": "ready",
    }
    assert found.scaling is not None
    decode = found.scaling.pools[1]
    assert (decode.ready, decode.starting, decode.missing) == (0, 1, 2)


def test_a_pool_without_a_ready_worker_is_degraded(wanted: WantedCluster, fleet: Fleet) -> None:
    wanted.up()
    for name in ("prefill-0", "router-0"):
        wanted.put(name)
    wanted.put("decode-0", phase=Phase.STARTING)
    fleet.serve("prefill-0", "router-0")
    fleet.say(settled=False)
    assert look(wanted).health is Health.DEGRADED


def test_a_silent_controller_is_degraded_and_told(wanted: WantedCluster, fleet: Fleet) -> None:
    wanted.up()
    for name in ("prefill-0", "decode-0", "router-0"):
        wanted.put(name)
    fleet.serve("prefill-0", "decode-0", "router-0")
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 1
    assert "silent; wanted is generation 1 by up: nobody carries it out" in shown.output


def test_a_watch_is_plain_where_nobody_looks(wanted: WantedCluster, fleet: Fleet, monkeypatch: Any) -> None:
    wanted.up()
    wanted.put("decode-0")
    fleet.say()
    found = look(wanted)
    rounds = iter([found, found])

    def look_again(_run_dir: object) -> Report:
        if (report := next(rounds, None)) is None:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(status, "gather", look_again)
    shown = CliRunner().invoke(main, ["status", "--watch", "0.1"])
    assert shown.exit_code == 0
    assert shown.output.count("mode split") == 2
