from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

from kv_transfer.courier import Courier
from tests.kv_transfer.conftest import BOUND_S


def test_jobs_are_delivered_in_order_also_those_posted_before_the_start() -> None:
    delivered: queue.SimpleQueue[object] = queue.SimpleQueue()
    courier = Courier("test", delivered.put)
    jobs = [SimpleNamespace(number=number) for number in range(3)]
    courier.post(jobs[0])  # type: ignore[arg-type]
    courier.start()
    for job in jobs[1:]:
        courier.post(job)  # type: ignore[arg-type]
    assert [delivered.get(timeout=BOUND_S) for _ in jobs] == jobs
    courier.stop()


def test_it_ends_also_where_it_never_began_and_from_its_own_thread() -> None:
    Courier("test", lambda job: None).stop()
    ended = threading.Event()

    def deliver(job: object) -> None:
        courier.stop()
        ended.set()

    courier = Courier("test", deliver)
    courier.start()
    courier.post(SimpleNamespace())  # type: ignore[arg-type]
    assert ended.wait(BOUND_S)
    courier.stop()
