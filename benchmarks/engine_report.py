"""Floors beside what was measured, as a table for people and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engine_bench import Outcome
from benchmarks.engine_cases import Case, Figure
from benchmarks.engine_floor import Ceilings, Shape, decode_floor_s, prefill_floor_s
from benchmarks.engine_trace import CLASS_NAMES, LONG_GAP_US, Breakdown

MAX_NAME = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case with its floor."""

    name: str
    case: Case
    block_size: int | None
    """None: another system's figure."""
    floor_s: float
    figures: list[Figure]
    breakdown: Breakdown | None = None

    @property
    def ratios(self) -> list[float]:
        """Floor / measured of each figure."""
        return [self.floor_s / figure.time_s for figure in self.figures]

    @property
    def target(self) -> float | None:
        """The case's target; none for another system."""
        return None if self.block_size is None else self.case.target

    @property
    def met(self) -> bool | None:
        """Whether every figure reaches the target; None where there is no target."""
        return None if self.target is None else all(ratio >= self.target for ratio in self.ratios)

    @property
    def traced_slowdown(self) -> float | None:
        """How much longer a traced step took than a measured one (decode only)."""
        if self.breakdown is None or self.case.kind != "decode":
            return None
        traced_s = self.breakdown.window_us / self.breakdown.num_steps / 1e6
        return traced_s / statistics.mean(figure.time_s for figure in self.figures)

    def as_json(self) -> dict[str, Any]:
        """Times in milliseconds, shares from 0 to 1."""
        return {
            "name": self.name,
            "kind": self.case.kind,
            "num_seqs": self.case.num_seqs,
            "length": self.case.length,
            "block_size": self.block_size,
            "floor_ms": self.floor_s * 1e3,
            "measured_ms": [figure.time_s * 1e3 for figure in self.figures],
            "median_ms": [figure.median_s * 1e3 for figure in self.figures],
            "best_ms": [figure.best_s * 1e3 for figure in self.figures],
            "context": [figure.context for figure in self.figures],
            "count": [figure.count for figure in self.figures],
            "ratio": self.ratios,
            "target": self.target,
            "met": self.met,
            "trace": asdict(self.breakdown) if self.breakdown is not None else None,
            "traced_slowdown": self.traced_slowdown,
        }


@dataclass(kw_only=True, slots=True)
class Report:
    """Everything one run of the benchmark found out."""

    about: dict[str, Any]
    ceilings: list[Ceilings]
    """At the beginning and at the end."""
    rows: list[Row]
    peer: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The whole report as plain values."""
        return {
            "about": self.about,
            "ceilings": [asdict(each) for each in self.ceilings],
            "cases": [row.as_json() for row in self.rows],
            "peer": [row.as_json() for row in self.peer],
        }


def row_of(outcome: Outcome, shape: Shape, ceilings: Ceilings, *, with_block_size: bool = False) -> Row:
    """An outcome of this engine beside its floor."""
    name = outcome.case.name + (f", block {outcome.block_size}" if with_block_size else "")
    return Row(
        name=name,
        case=outcome.case,
        block_size=outcome.block_size,
        floor_s=floor_s(outcome.case, outcome.figures, shape, ceilings),
        figures=outcome.figures,
        breakdown=outcome.breakdown,
    )


def peer_row(case: Case, figure: Figure, shape: Shape, ceilings: Ceilings) -> Row:
    """A figure of transformers beside the same floor."""
    floor = floor_s(case, [figure], shape, ceilings)
    return Row(name=f"transformers: {case.name}", case=case, block_size=None, floor_s=floor, figures=[figure])


def floor_s(case: Case, figures: list[Figure], shape: Shape, ceilings: Ceilings) -> float:
    """The case's floor, for decode at the context that it really had."""
    if case.kind == "prefill":
        return prefill_floor_s(shape, ceilings, num_seqs=case.num_seqs, length=case.length)
    context = statistics.mean(figure.context for figure in figures)
    return decode_floor_s(shape, ceilings, batch=case.num_seqs, context=context)


def print_report(report: Report, console: Console, *, verbose: bool) -> None:
    """Ceilings, the table, and what the traces say beyond it."""
    for when, each in zip(("first", "last"), report.ceilings, strict=False):
        console.print(
            f"ceilings, {when}: copy {each.copy_bytes_s / 1e12:.3f} TB/s, read {each.read_bytes_s / 1e12:.3f} TB/s, "
            f"bf16 product {each.matrix_flop_s / 1e12:.1f} TFLOP/s in a burst, "
            f"{each.sustained_flop_s / 1e12:.1f} sustained",
            highlight=False,
        )
    console.print(_table(report))
    for row in report.rows:
        if row.breakdown is not None:
            _print_trace(row, row.breakdown, console, verbose=verbose)


def _table(report: Report) -> Table:
    about = report.about
    table = Table(title=f"{about['device_name']}, torch {about['torch']}, {about['date']}", highlight=False)
    table.add_column("case")
    for name in ("floor ms", "run 1 / run 2 ms", "floor / measured", "good", "attention", "products", "rest", "gaps"):
        table.add_column(name, justify="right")
    for row in [*report.rows, *report.peer]:
        target = "" if row.target is None else f"{row.target:.2f} {'yes' if row.met else 'no'}"
        table.add_row(
            row.name,
            f"{row.floor_s * 1e3:.2f}",
            " / ".join(f"{figure.time_s * 1e3:.2f}" for figure in row.figures),
            " / ".join(f"{ratio:.2f}" for ratio in row.ratios),
            target,
            *_shares(row.breakdown),
        )
    return table


def _shares(breakdown: Breakdown | None) -> list[str]:
    if breakdown is None:
        return [""] * (len(CLASS_NAMES) + 1)
    return [f"{share:.1%}" for share in (*(breakdown.shares[name] for name in CLASS_NAMES), breakdown.gaps)]


def _print_trace(row: Row, breakdown: Breakdown, console: Console, *, verbose: bool) -> None:
    if row.case.kind == "decode":
        console.print(
            f"{row.name}: no kernel runs for {breakdown.gaps:.2%} of a step; gaps of {LONG_GAP_US:.0f} µs and more "
            f"are {breakdown.long_gaps:.2%}; the largest gap of a step is {breakdown.largest_gap_us:.1f} µs (median of "
            f"{breakdown.num_steps} steps); a traced step took {row.traced_slowdown:.2f} times a measured one",
            highlight=False,
        )
    if verbose:
        for name, share in breakdown.top:
            console.print(f"    {share:6.2%}  {name[:MAX_NAME]}", highlight=False, markup=False)
