"""Figures as Markdown rows and tables in the style of RESULTS.md; milliseconds, with one decimal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.serve_figures import IdleFigures, LoadFigures, Middle, mean
from benchmarks.serve_reference import (
    LOADED,
    LONG_PROMPT_LEN,
    LONG_RATE,
    LONG_TTFT_P50,
    MATRIX_FLOP_S,
    PROMPT_LEN,
    SOURCE,
    Reference,
)
from cluster.load_report import Slo, Spread

DASH = "–"
LOAD_COLUMNS = (
    "shape", "prompt", "rate/s", "run", "answered / failed", "TTFT p50 / p99", "of the first 20 s",
    "1st→2nd token p50 / p99", "TPOT p50 / p99", "ITL p50 / p99 / max", "output tokens/s", "goodput/s",
    "sent late p99", "client lag p99 / max",
)  # fmt: skip
PHASE_COLUMNS = (
    "shape", "prompt", "rate/s", "run", "queue", "prefill", "transfer not hidden", "first decode step", "decode",
    "KV moved, GB", "transfer hidden", "prefilled locally",
)  # fmt: skip
IDLE_COLUMNS = (
    "what", "prompt", "TTFT median / p90", "over the engine alone", "1st→2nd token median / p90", "ITL median",
    "1st→2nd over ITL", "router's own TTFT", "queue / prefill / transfer not hidden / transfer in all", "KV, MB",
    "client lag p99 / max", "n / failed",
)  # fmt: skip
REFERENCE_COLUMNS = (
    "shape", "rate/s", "", "TTFT p50 / p99", "TPOT p50 / p99", "ITL p99 / max",
)  # fmt: skip


class Document:
    """Where tables go as they grow: Markdown on a stream at once, and everything in a JSON file after each row."""

    def __init__(self, json_path: Path | None, stream: IO[str] | None = None) -> None:
        self._path = json_path
        self._stream = stream or sys.stdout
        self._columns: tuple[str, ...] | None = None
        self.data: dict[str, Any] = {}

    def text(self, text: str) -> None:
        """A paragraph; ends a table."""
        self._columns = None
        print(f"\n{text}", file=self._stream, flush=True)

    def row(self, columns: tuple[str, ...], cells: Sequence[str]) -> None:
        """A row of the table with these columns, which begins with its first row."""
        if self._columns != columns:
            self._columns = columns
            print(f"\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}", file=self._stream)
        print(f"| {' | '.join(cells)} |", file=self._stream, flush=True)

    def save(self) -> None:
        """Replace the JSON file by what `data` is now."""
        if self._path is not None:
            temporary = self._path.with_name(self._path.name + ".part")
            temporary.write_text(json.dumps(self.data, indent=1, default=str))
            temporary.replace(self._path)


def ms(seconds: float | None) -> str:
    """Milliseconds with one decimal."""
    return DASH if seconds is None else f"{seconds * 1e3:.1f}"


def spread(found: Spread | None, *names: str) -> str:
    """Some of a spread's figures."""
    return DASH if found is None else " / ".join(ms(getattr(found, name)) for name in names)


def slo_text(slo: Slo) -> str:
    """The bounds that goodput keeps."""
    bounds = (("TTFT", slo.ttft_s), ("99 % of its ITLs", slo.itl_s))
    return ", ".join(f"{name} ≤ {bound * 1e3:g} ms" for name, bound in bounds if bound is not None) or "none"


def ceilings_texts(probes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each device reached at best, a sentence each."""
    return [
        f"Ceilings of {line['device']} {index} (torch {line['torch']}): copy {line['copy_bytes_s'] / 1e12:.3g} "
        f"TB/s, read {line['read_bytes_s'] / 1e12:.3g} TB/s, bf16 product {line['matrix_flop_s'] / 1e12:.3g} "
        f"TFLOP/s in a burst, {line['sustained_flop_s'] / 1e12:.3g} sustained."
        for index, line in enumerate(line for line in probes if line["kind"] == "ceilings")
    ]


def load_row(figures: LoadFigures) -> list[str]:
    """For LOAD_COLUMNS."""
    report = figures.report
    failures = ", ".join(f"{count} {name}" for name, count in sorted(report.failures.items()))
    return [
        *_names(figures),
        f"{report.num_completed} / {failures or 0}",
        spread(report.ttft_s, "p50", "p99"),
        spread(figures.early_ttft_s, "p50", "p99"),
        spread(figures.second_token_s, "p50", "p99"),
        spread(report.tpot_s, "p50", "p99"),
        spread(report.itl_s, "p50", "p99", "max"),
        f"{report.output_tokens_per_s:.0f}",
        f"{report.goodput_per_s:.2f}",
        spread(report.send_lag_s, "p99"),
        spread(figures.client_lag_s, "p99", "max"),
    ]


def phase_row(figures: LoadFigures) -> list[str]:
    """For PHASE_COLUMNS; means."""
    report = figures.report
    hidden = report.hidden_transfer_share
    return [
        *_names(figures),
        *(ms(report.phases_s.get(name)) for name in ("queue", "prefill", "transfer", "first_decode_step", "decode")),
        f"{report.transfer_bytes / 1e9:.1f}" if hidden is not None else DASH,
        f"{hidden:.1%}" if hidden is not None else DASH,
        f"{figures.local_share:.1%}",
    ]


def _names(figures: LoadFigures) -> list[str]:
    return [figures.shape, f"{figures.prompt_len:,}", f"{figures.rate:g}", str(figures.repeat)]


def idle_row(figures: IdleFigures, alone: Mapping[int, IdleFigures]) -> list[str]:
    """For IDLE_COLUMNS; `alone`: the engine alone, by prompt length."""
    base = alone.get(figures.prompt_len)
    over = None
    if base is not None and base is not figures and figures.ttft_s is not None and base.ttft_s is not None:
        over = figures.ttft_s.median - base.ttft_s.median
    phases = [figures.phases_s.get(name) for name in ("queue_s", "prefill_s", "transfer_s", "transfer_busy_s")]
    count = figures.ttft_s.count if figures.ttft_s is not None else 0
    return [
        figures.what,
        f"{figures.prompt_len:,}",
        _middle(figures.ttft_s),
        ms(over),
        _middle(figures.second_token_s),
        DASH if figures.itl_s is None else ms(figures.itl_s.median),
        ms(figures.second_over_itl_s),
        ms(figures.phases_s.get("ttft_s")),
        " / ".join(map(ms, phases)) if figures.phases_s else DASH,
        f"{figures.transfer_bytes / 1e6:.0f}" if figures.transfer_bytes else DASH,
        spread(figures.client_lag_s, "p99", "max"),
        f"{count} / {figures.num_failed}" + (f" ({figures.failure[:120]})" if figures.failure else ""),
    ]


def _middle(found: Middle | None) -> str:
    return DASH if found is None else f"{ms(found.median)} / {ms(found.p90)}"


def reference_rows(runs: Sequence[LoadFigures], copy_bytes_s: float, matrix_flop_s: float) -> list[list[str]]:
    """For REFERENCE_COLUMNS: for each shape and rate that both have, vLLM's figures, ours, and their ratio."""
    rows = _long_prompt_rows(runs, matrix_flop_s)
    runs = [run for run in runs if run.prompt_len == PROMPT_LEN]
    for shape, rate in dict.fromkeys((run.shape, run.rate) for run in runs):
        reference = LOADED.get(shape, {}).get(rate)
        ours = _ours([run for run in runs if (run.shape, run.rate) == (shape, rate)])
        if reference is None or ours is None:
            continue
        scaled = reference.scaled(copy_bytes_s, matrix_flop_s)
        rows += [
            [shape, f"{rate:g}", "vLLM there", *_cells(reference, 1)],
            ["", "", "vLLM, scaled to these ceilings", *_cells(scaled, 1)],
            ["", "", "**pdserve**", *_cells(ours, 1)],
            ["", "", "pdserve / vLLM scaled", *_cells(_ratio(ours, scaled), 2)],
        ]
    return rows


def _long_prompt_rows(runs: Sequence[LoadFigures], matrix_flop_s: float) -> list[list[str]]:
    """Of the long prompts only the median TTFT is known of vLLM."""
    rows = []
    for shape, theirs in LONG_TTFT_P50.items():
        ours = [
            run.report.ttft_s.p50 * 1e3
            for run in runs
            if (run.shape, run.prompt_len, run.rate) == (shape, LONG_PROMPT_LEN, LONG_RATE) and run.report.ttft_s
        ]
        if ours:
            scaled = theirs * MATRIX_FLOP_S / matrix_flop_s
            what = f"{LONG_PROMPT_LEN:,} tokens: vLLM there, scaled; **pdserve**; ratio"
            cell = f"{theirs:.0f}, {scaled:.1f}; {mean(ours):.1f}; {mean(ours) / scaled:.2f} (p50)"
            rows.append([shape, f"{LONG_RATE:g}", what, cell, DASH, DASH])
    return rows


def _ours(runs: Sequence[LoadFigures]) -> Reference | None:
    """The means of the repeats' figures."""
    found = [
        (each.report.ttft_s, each.report.tpot_s, each.report.itl_s)
        for each in runs
        if each.report.ttft_s is not None and each.report.tpot_s is not None and each.report.itl_s is not None
    ]
    whole = [(ttft, tpot, itl) for ttft, tpot, itl in found if ttft and tpot and itl]
    if not whole:
        return None
    return Reference(
        ttft_p50=mean(ttft.p50 * 1e3 for ttft, _, _ in whole),
        ttft_p99=mean(ttft.p99 * 1e3 for ttft, _, _ in whole),
        tpot_p50=mean(tpot.p50 * 1e3 for _, tpot, _ in whole),
        tpot_p99=mean(tpot.p99 * 1e3 for _, tpot, _ in whole),
        itl_p99=mean(itl.p99 * 1e3 for _, _, itl in whole),
        itl_max=max(itl.max * 1e3 for _, _, itl in whole),
    )


def _ratio(ours: Reference, theirs: Reference) -> Reference:
    names = Reference.__slots__
    return Reference(**{name: getattr(ours, name) / getattr(theirs, name) for name in names})


def _cells(figures: Reference, digits: int) -> list[str]:
    pairs = (("ttft_p50", "ttft_p99"), ("tpot_p50", "tpot_p99"), ("itl_p99", "itl_max"))
    return [" / ".join(f"{getattr(figures, name):.{digits}f}" for name in pair) for pair in pairs]


REFERENCE_NOTE = (
    f"Beside {SOURCE}; scaled: TTFT by the ratio of the bf16 products, TPOT and ITL by that of the copies, which is "
    "rough (queues do not grow in proportion). Ours: the mean of the runs, and of the maxima the largest."
)
