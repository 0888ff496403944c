"""The CPU's lane; streams are exercised by the `gpu` half of test_processes."""

from __future__ import annotations

import threading

import pytest
import torch

from kv_transfer.lane import CpuLane, CudaLane, make_lane


def test_a_cpu_has_no_stream() -> None:
    lane = make_lane(torch.device("cpu"))
    assert isinstance(lane, CpuLane)
    lane.enter()
    lane.follow(None)
    lane.follow(object())
    lane.mark().wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_lane_waits_for_the_engine_and_nobody_waits_for_it() -> None:
    device = torch.device("cuda:0")
    lane = make_lane(device)
    assert isinstance(lane, CudaLane)
    engine = torch.cuda.Stream(device)
    source, copy = torch.zeros(1 << 20, device=device), torch.zeros(1 << 20, device=device)
    torch.cuda.synchronize()
    written = torch.cuda.Event()
    with torch.cuda.stream(engine):
        torch.cuda._sleep(200_000_000)
        source.fill_(3)
        written.record(engine)
    marks = []

    def work() -> None:  # a thread of its own, as a pair has one: its current stream stays the lane's
        lane.enter()
        lane.follow(written)
        copy.copy_(source)
        marks.append(lane.mark())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not written.query(), "following does not block the caller"
    marks[0].wait()
    assert bool((copy == 3).all())
