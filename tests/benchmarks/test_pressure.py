"""A router under pressure: its tables and parts, and both sections on a small cluster of this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from benchmarks.pressure import Crowd, Overload, Plan, clients, clients_table, gaps_ms, overload, overload_table
from benchmarks.pressure_clients import Outcome, Processes, has_retry_info, whole
from benchmarks.pressure_cluster import Target, held_by, paced_yaml
from cluster.config import load_config
from cluster.health import Member
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.pace import PaceOptions
from router.config import RouterConfig
from tests.mini_cluster import MiniCluster, Shape

LIMIT_S = 60.0
SILENCE_S = 30.0
"""On a busy machine clients, router and workers in one process may be silent for seconds."""
FREE = dict.fromkeys(("num_running", "num_waiting", "num_reserved", "open_tickets", "open_sends"), 0.0)


@pytest.fixture(scope="module")
def processes():
    with Processes(2) as started:
        yield started


def under_pressure(
    model: Path,
    directory: Path,
    section: Callable[[Target, Processes, Plan], Any],
    processes: Processes,
    plan: Plan,
) -> Any:
    """A section on a split cluster whose steps take `plan.step_ms`."""
    pace = PaceOptions(fixed_ms=plan.step_ms)
    shape = Shape(
        model=ModelOptions(path=str(model)),
        cache=CacheOptions(block_size=16, num_blocks=2048),
        options=EngineOptions(max_step_tokens=64, max_running=plan.at_once, pace=pace),
        router=RouterConfig(port=0, worker_silence_s=SILENCE_S, **plan.router()),
    )

    async def scenario() -> Any:
        async with MiniCluster(shape, directory) as cluster:
            loop = asyncio.get_running_loop()

            def left_behind(timeout_s: float) -> list[str]:
                waiting: Awaitable[None] = cluster.until_idle()
                asyncio.run_coroutine_threadsafe(waiting, loop).result(LIMIT_S)  # type: ignore[arg-type]
                return []

            target = Target(cluster.router.address, left_behind, lambda: 1.0)
            found = await asyncio.to_thread(section, target, processes, plan)
            assert cluster.router.stats().in_flight == 0
            cluster.router.check_integrity()
            return found

    return asyncio.run(scenario())


@pytest.mark.slow
def test_an_overload_leaves_nothing_and_every_refusal_says_when_to_try_again(
    tiny_llama: Path, tmp_path: Path, processes: Processes
) -> None:
    plan = Plan(seconds=3, peak_s=4, deadline_s=10, output_len=8, at_once=4, step_ms=30, max_queued=4)
    found: Overload = under_pressure(tiny_llama, tmp_path, overload, processes, plan)
    assert found.peak_per_s > 0
    assert found.outcomes["OK"] > 0
    assert found.outcomes["RESOURCE_EXHAUSTED"] > 0
    assert set(found.outcomes) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert found.with_retry_info == 1.0
    assert json.loads(json.dumps(asdict(found)))["left_behind"] == []
    assert "| left behind | nothing | nothing |" in overload_table(found)


@pytest.mark.slow
def test_clients_that_misbehave_leave_nothing_and_end_no_other_stream(
    tiny_llama: Path, tmp_path: Path, processes: Processes
) -> None:
    plan = Plan(streams=4, vanishing=10, phase_s=1.5, turns=1, settle_s=1, at_once=32, step_ms=20)
    found: Crowd = under_pressure(tiny_llama, tmp_path, clients, processes, plan)
    assert found.failures == []
    (did,) = found.trouble
    assert did.stopped_reading
    assert did.vanished_before_tokens + did.vanished_within_stream == 10
    assert len(found.phases_p99_ms) == 2
    assert found.alone_itl_ms.count > 100
    assert json.loads(json.dumps(asdict(found)))["trouble"][0]["stopped_reading"] is True
    assert "| steady streams that failed | none | none |" in clients_table(found)


def test_gaps_are_those_within_a_phase():
    assert gaps_ms([[1.0, 1.5, 2.25, 3.0], [1.9]], 1.2, 3.0) == [pytest.approx(750)]


def test_goodput_is_whole_answers_in_time():
    outcomes = [
        Outcome(0, 0.0, 1.0, "OK"),
        Outcome(0, 0.0, 3.0, "OK"),
        Outcome(0, 1.5, 2.0, "RESOURCE_EXHAUSTED"),
        Outcome(1, 3.5, 4.0, "OK"),
        Outcome(1, 3.5, 5.0, "OK"),
    ]
    assert whole(outcomes, 1.0, 5.0, 2.0) == [outcomes[0], outcomes[3]]


def test_a_retry_time_is_found_among_the_details():
    def error(*details: Any) -> grpc.aio.AioRpcError:
        packed = []
        for each in details:
            box = Packed()
            box.Pack(each)
            packed.append(box)
        value = status_pb2.Status(details=packed).SerializeToString()
        trailing = grpc.aio.Metadata(("grpc-status-details-bin", value))
        return grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), trailing)

    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1))
    assert has_retry_info(error(error_details_pb2.BadRequest(), retry))
    assert not has_retry_info(error(error_details_pb2.BadRequest()))
    assert not has_retry_info(grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata()))


def test_what_a_member_still_holds_is_named():
    blocks = {"free_blocks": 9.0, "num_blocks": 10.0}
    assert held_by(Member("decode-0", "worker", "ready", numbers={**FREE, **blocks, "num_running": 2.0})) == [
        "decode-0: num_running 2",
        "decode-0: 9 of 10 blocks free",
    ]
    assert held_by(Member("router-0", "router", "ready", numbers={"in_flight": 1.0, "queued": 0.0})) == [
        "router-0: in_flight 1"
    ]
    assert held_by(Member("prefill-0", "worker", "silent")) == ["prefill-0 is silent"]
    assert held_by(Member("p", "worker", "ready", numbers={**FREE, "free_blocks": 3.0, "num_blocks": 3.0})) == []


def test_the_cluster_is_paced_and_its_yaml_is_one(tmp_path: Path) -> None:
    plan = Plan(max_queued=7)
    content = paced_yaml(step_ms=plan.step_ms, at_once=16, decode_workers=2, router=plan.router())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    config = load_config(tmp_path / "c.yaml")
    assert config.prefill.pace == PaceOptions(fixed_ms=1, prompt_token_us=20)
    assert config.decode.pace == PaceOptions(fixed_ms=25)
    assert (config.decode.workers, config.router.max_queued) == (2, 7)
    assert Plan().router() == {}
