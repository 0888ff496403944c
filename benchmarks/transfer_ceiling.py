"""Section `ceiling`: the data channel alone, messages of one size back to back.

The channel is kv_transfer's own transport (NCCL with so many CTAs between GPUs, gloo on a CPU), without gather, scatter
and announcements: what a pair's throughput is compared with.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from typing import Any

import torch

from benchmarks.budget import Budget
from benchmarks.transfer_plan import Plan
from benchmarks.transfer_report import Report, Sheet
from benchmarks.transfer_rig import Rig
from benchmarks.transfer_side import Side
from kv_transfer.context import MIB
from kv_transfer.rendezvous import pair_store
from kv_transfer.transport import ChannelOptions, Transfer, Transport, open_transport
from kv_transfer.transport import Side as End
from protos.rendezvous import Rendezvous

CONNECT_TIMEOUT_S = 30.0
NUM_BUFFERS = 4
"""Messages in flight, as in a pair."""
NUM_FIRST = 8
"""Messages that pay for first-time work; the second half of them tells how many make a figure."""
MOST = 1000
NUM_FIGURES = 2


class Channel:
    """One end of a data channel."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._numbers = itertools.count(1)
        self._store: Rendezvous | None = None
        self._transport: Transport | None = None
        self._buffers: list[torch.Tensor] = []
        self._done = threading.Event()

    def open(self, ctas: int) -> float:
        """Connect with the other process, which does the same; seconds it took."""
        began = time.monotonic()
        side, kind = self._side, f"store {next(self._numbers)}"
        store = pair_store(lambda key, value: side.link.send(kind, (key, value)), CONNECT_TIMEOUT_S)
        inbox = side.link.inbox(kind)
        self._done = done = threading.Event()
        pump = threading.Thread(target=_pump, args=(inbox, store, done), name=kind, daemon=True)
        pump.start()
        options = ChannelOptions(
            side=End.SENDER if side.is_sender else End.RECEIVER,
            host="127.0.0.1",
            connect_timeout_s=CONNECT_TIMEOUT_S,
            transfer_timeout_s=CONNECT_TIMEOUT_S,
            device=side.device,
            max_ctas=ctas,
        )
        self._transport = open_transport("nccl" if side.device.type == "cuda" else "gloo", options, store)
        self._store = store
        largest = max(side.plan.ceiling_mib) * MIB
        self._buffers = [torch.zeros(largest, dtype=torch.uint8, device=side.device) for _ in range(NUM_BUFFERS)]
        return time.monotonic() - began

    def run(self, num_bytes: int, count: int) -> float:
        """Move `count` messages of that size; seconds from the end of the one before them to the end of the last."""
        assert self._transport is not None, "the channel is open"
        move = self._transport.send if self._side.is_sender else self._transport.recv
        buffers = itertools.cycle([buffer[:num_bytes] for buffer in self._buffers])
        under_way: deque[Transfer] = deque()
        move(next(buffers)).wait()
        start = _stamp(self._side.device)
        for _ in range(count):
            under_way.append(move(next(buffers)))
            if len(under_way) == NUM_BUFFERS:
                under_way.popleft().wait()
        while under_way:
            under_way.popleft().wait()
        return _seconds(start, _stamp(self._side.device))

    def close(self) -> None:
        """Disconnect."""
        if self._transport is not None:
            self._transport.close()
        self._done.set()
        self._transport, self._store, self._buffers = None, None, []
        if self._side.device.type == "cuda":
            torch.cuda.empty_cache()


def _pump(inbox: queue.SimpleQueue[Any], store: Rendezvous, done: threading.Event) -> None:
    """Bring what the other end sets."""
    while not done.is_set():
        try:
            store.put(*inbox.get(timeout=0.2))
        except queue.Empty:
            continue


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class CeilingBook:
    """What the channel reached, by CTAs and size; what is missing is measured when it is asked for."""

    def __init__(self, rig: Rig, plan: Plan) -> None:
        self._rig = rig
        self._plan = plan
        self._found: dict[tuple[int, int], float] = {}

    def rate(self, ctas: int, mib: int) -> float:
        """Bytes a second."""
        if (ctas, mib) not in self._found:
            self._rig.both("channel.open", ctas)
            try:
                self.measure(ctas, mib)
            finally:
                self._rig.both("channel.close")
        return self._found[ctas, mib]

    def measure(self, ctas: int, mib: int) -> dict[str, Any]:
        """Measure on the open channel, twice; the better one counts."""
        num_bytes = mib * MIB
        self._rig.both("channel.run", num_bytes, NUM_FIRST)
        _, first_s = self._rig.both("channel.run", num_bytes, NUM_FIRST)
        figure_s = self._plan.cell_s / 3 / NUM_FIGURES
        count = min(MOST, max(NUM_FIRST, int(figure_s / first_s * NUM_FIRST)))
        times = [self._rig.both("channel.run", num_bytes, count)[1] / count for _ in range(NUM_FIGURES)]
        self._found[ctas, mib] = num_bytes / min(times)
        return {
            "ctas": ctas,
            "mib": mib,
            "gb_s": num_bytes / min(times) / 1e9,
            "us": [each * 1e6 for each in times],
            "count": count,
        }


def run_ceiling(rig: Rig, plan: Plan, report: Report, budget: Budget, book: CeilingBook) -> list[dict[str, Any]]:
    """The section."""
    sheet = Sheet("ceiling: the data channel alone, back to back", ("CTAs", "MiB", "GB/s", "µs", "µs again"))
    rows: list[dict[str, Any]] = report.figures.setdefault("ceiling", [])
    for ctas in plan.ceiling_ctas:
        if not budget.allows(f"ceiling with {ctas} CTAs"):
            continue
        open_s = max(rig.both("channel.open", ctas))
        report.say(f"ceiling: {ctas} CTAs, connected in {open_s:.2f} s")
        try:
            for mib in plan.ceiling_mib:
                row = book.measure(ctas, mib) | {"open_s": open_s}
                rows.append(row)
                sheet.row((ctas, mib, row["gb_s"], *row["us"]))
        finally:
            rig.both("channel.close")
    return rows
