"""Section `pair`: the product's own path between two caches, gather and scatter included, beside the channel alone.

Tickets of which all KV is there are pushed at once, several at a time. What counts is the time from the first push to
the last ticket's being home.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.budget import Budget
from benchmarks.transfer_ceiling import CeilingBook
from benchmarks.transfer_plan import Cell, Plan
from benchmarks.transfer_report import Report, Sheet, note
from benchmarks.transfer_rig import Rig, RigError

NUM_FIGURES = 2
TARGET, AIM = 0.75, 0.95
COLUMNS = ("CTAs", "MiB", "digest", "GB/s", "again", "channel", "ratio", "self-test")


def run_pair(rig: Rig, plan: Plan, report: Report, budget: Budget, book: CeilingBook) -> list[dict[str, Any]]:
    """The section."""
    rows: list[dict[str, Any]] = report.figures.setdefault("pair", [])
    cells = [cell for cell in plan.pair_cells if budget.allows(f"pair {asdict(cell)}")]
    ceilings = {cell: book.rate(cell.ctas, cell.piece_mib) for cell in cells}
    sheet = Sheet(f"pair: tickets of {plan.pair_tokens} tokens, {plan.in_flight} at a time (GB/s)", COLUMNS)
    rig.both("side.make_cache")
    try:
        for cell in cells:
            if not budget.allows(f"pair {asdict(cell)}"):
                continue
            row = _measure(rig, plan, cell, check=not rows)
            ratio = max(row["gb_s"]) * 1e9 / ceilings[cell]
            row |= {"channel_gb_s": ceilings[cell] / 1e9, "ratio": ratio, "target": TARGET, "met": ratio >= TARGET}
            rows.append(row)
            shown = (cell.ctas, cell.piece_mib, cell.digest, *row["gb_s"], row["channel_gb_s"], ratio)
            sheet.row((*shown, row["self_test_gb_s"]))
            report.say(f"pair: {cell.ctas} CTAs, {cell.piece_mib} MiB, digest {cell.digest}: {ratio:.2f}")
    finally:
        rig.both("side.drop_cache")
    note(
        f"good is {TARGET}, {AIM} is what we are after; every delivered ticket's bytes were compared in the first cell"
    )
    return rows


def _measure(rig: Rig, plan: Plan, cell: Cell, *, check: bool) -> dict[str, Any]:
    """One cell, twice."""
    rig.both("node.open", cell.ctas, cell.piece_mib, cell.digest)
    try:
        rig.receiver.call("node.grant", plan.pair_tickets, plan.pair_tokens)
        warm = rig.sender.call("node.push", plan.pair_tickets)
        rig.receiver.call("node.arrivals", len(warm))
        if check:
            _compare(rig)
        figures, counts = [], []
        before = rig.receiver.call("node.traffic")
        for _ in range(NUM_FIGURES):
            pushed = rig.sender.call("node.push", None, plan.cell_s)
            arrivals = rig.receiver.call("node.arrivals", len(pushed))
            seconds = arrivals[-1].moment - pushed[0].moment
            figures.append(sum(arrival.num_bytes for arrival in arrivals) / seconds / 1e9)
            counts.append(len(pushed))
        after = rig.receiver.call("node.traffic")
    finally:
        rig.both("node.close")
    if after["digest_mismatches"]:
        raise RigError(f"{after['digest_mismatches']} digests differed")
    pieces = after["received_pieces"] - before["received_pieces"]
    latency_s, rate = rig_pair(after)
    return asdict(cell) | {
        "gb_s": figures,
        "tickets": counts,
        "mean_piece_mib": (after["received_bytes"] - before["received_bytes"]) / max(1, pieces) / (1 << 20),
        "self_test_gb_s": rate / 1e9,
        "self_test_us": latency_s * 1e6,
    }


def rig_pair(traffic: dict[str, Any]) -> tuple[float, float]:
    """What the pair's own self-test gave: seconds of a small message, bytes a second."""
    latency_s, rate = traffic["pairs"][-1] if traffic["pairs"] else (0.0, 0.0)
    return latency_s, rate


def _compare(rig: Rig) -> None:
    """The receiver has what the sender had, token by token and layer by layer."""
    (wanted,) = rig.sender.call("node.fingerprints")
    found = rig.receiver.call("node.fingerprints")
    if wrong := sum(each != wanted for each in found):
        raise RigError(f"the KV of {wrong} of {len(found)} tickets is not what was sent")
