"""What a run of the ratio benchmark found, as tables and words; from the plain values that its JSON file holds.

Goodput is counted here, from each request's TTFT and from the least ITL bound that it keeps, so that a file tells it
for any SLO.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serve_clients import ClientResult
from benchmarks.serve_figures import mean
from benchmarks.serve_report import DASH, Document, ms, slo_text
from cluster.load import RequestRecord
from cluster.load_report import Slo, Spread

CARRIED = 0.9
"""A rate is carried where so large a share of its requests keeps the SLO."""
ALIKE = 0.01
"""Figures that differ by no more than this share of the larger are called alike."""
COLUMNS = (
    "load", "rate/s", "shape", "run", "answered / failed", "TTFT p50 / p99", "1st→2nd token p50 / p99",
    "TPOT p50 / p99", "ITL p50 / p99 / max", "output tokens/s", "within the SLO", "goodput/s", "transfer hidden",
    "prefilled locally", "client lag p99",
)  # fmt: skip
PART_COLUMNS = ("load", "rate/s", "shape", "run", "requests", "answered", "TTFT p50 / p99", "ITL p50 / p99")
ANSWER_COLUMNS = ("shape", "beside", "answers", "equal", "parted at token: first / median", "handed over")
WINNER_COLUMNS = ("load", "rate/s", "most goodput/s", "least TTFT p50", "least TTFT p99", "least ITL p99")


def kept_bounds(record: RequestRecord) -> tuple[float, float] | None:
    """TTFT of a request, and the least ITL bound that it keeps (with the 1 % that `Slo` tolerates); None: no answer."""
    if record.failure is not None or record.ttft_s is None:
        return None
    gaps = sorted(record.itls_s(), reverse=True)
    tolerated = math.floor(len(gaps) * 0.01)
    return record.ttft_s, gaps[tolerated] if gaps else 0.0


def parts_json(result: ClientResult, prompt_lens: Sequence[int]) -> list[dict[str, Any]]:
    """Of a mix: latencies of the requests nearest to each prompt length; empty for one kind of request."""
    if len(prompt_lens) < 2:
        return []
    whole = [each for each in result.load.records if each.failure is None and each.finished is not None]
    found = []
    for length in prompt_lens:
        mine = [each for each in whole if _nearest(each, prompt_lens) == length]
        spreads = {
            "ttft_s": Spread.of(each.ttft_s for each in mine if each.ttft_s is not None),
            "itl_s": Spread.of(gap for each in mine for gap in each.itls_s()),
        }
        shown = {name: spread and {"p50": spread.p50, "p99": spread.p99} for name, spread in spreads.items()}
        found.append({"prompt_len": length, "count": len(mine), **shown})
    return found


def _nearest(record: RequestRecord, lengths: Sequence[int]) -> int:
    assert record.finished is not None, "only whole answers are asked for"
    tokens = record.finished.usage.prompt_tokens
    return min(lengths, key=lambda length: abs(math.log(max(1, tokens) / length)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A shape under one load and rate: the means of its runs; seconds."""

    load: str
    rate: float
    shape: str
    num_gpus: int
    share: float
    """Of the requests, those that kept the SLO."""
    goodput: float
    ttft_p50: float | None
    ttft_p99: float | None
    itl_p99: float | None
    tokens_per_s: float

    @property
    def is_colocated(self) -> bool:
        """Whether its workers do both jobs."""
        return self.shape.endswith("colocated")


def share_kept(run: dict[str, Any], slo: Slo) -> float:
    """Of all requests of a run, those that kept the SLO."""
    ttft, itl = slo.ttft_s or math.inf, slo.itl_s or math.inf
    kept = sum(each[0] <= ttft and each[1] <= itl for each in run["requests"])
    return kept / max(1, run["report"]["num_requests"])


def goodput(run: dict[str, Any], slo: Slo) -> float:
    """Requests/s that kept the SLO, from the beginning of the run to the end of its last request."""
    return float(share_kept(run, slo) * run["report"]["num_requests"] / max(run["report"]["wall_s"], 1e-9))


def cells_of(data: dict[str, Any], slo: Slo) -> list[Cell]:
    """One for each load, rate and shape, in this order."""
    gpus = {shape["shape"]: shape["num_gpus"] for shape in data.get("shapes", [])}
    cells = []
    for (load, rate, shape), group in itertools.groupby(_ordered(data), key=_key):
        runs = list(group)

        def middle(name: str, quantile: str, runs: list[dict[str, Any]] = runs) -> float | None:
            found = [run["report"][name][quantile] for run in runs if run["report"][name] is not None]
            return mean(found) if found else None

        cells.append(
            Cell(
                load=load,
                rate=rate,
                shape=shape,
                num_gpus=gpus[shape],
                share=mean(share_kept(run, slo) for run in runs),
                goodput=mean(goodput(run, slo) for run in runs),
                ttft_p50=middle("ttft_s", "p50"),
                ttft_p99=middle("ttft_s", "p99"),
                itl_p99=middle("itl_s", "p99"),
                tokens_per_s=mean(run["report"]["output_tokens_per_s"] for run in runs),
            )
        )
    return cells


def _key(run: dict[str, Any]) -> tuple[str, float, str]:
    return run["load"], run["rate"], run["shape"]


def _ordered(data: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs by load (as given), rate, shape (as given) and repeat."""
    loads = [load["name"] for load in data["loads"]]
    shapes = [shape["shape"] for shape in data.get("shapes", [])]
    return sorted(
        data.get("runs", []),
        key=lambda run: (loads.index(run["load"]), run["rate"], shapes.index(run["shape"]), run["repeat"]),
    )


def show(data: dict[str, Any], slo: Slo, document: Document) -> None:
    """Everything: the table, the mixes' parts, who wins where, and the answers."""
    titles = {load["name"]: load["title"] for load in data["loads"]}
    document.text(
        "Latencies in ms, of requests answered whole, counted from when each was due. Goodput: answered whole with "
        f"{slo_text(slo)}; prompts ± {data['spread']:.0%}; {data['seconds']:g} s of arrivals a run. "
        + "; ".join(f"{load['title']}" for load in data["loads"])
        + "."
    )
    runs = _ordered(data)
    for run in runs:
        document.row(COLUMNS, _row(run, slo))
    for run in runs:
        for part in run["parts"]:
            document.row(PART_COLUMNS, _part_row(run, part))
    cells = cells_of(data, slo)
    for cell_group in _by_load_and_rate(cells):
        document.row(WINNER_COLUMNS, _winner_row(cell_group))
    for load, title in titles.items():
        if words := verdict(title, [cell for cell in cells if cell.load == load], slo):
            document.text(words)
    for row in answer_rows(data.get("shapes", [])):
        document.row(ANSWER_COLUMNS, row)
    for what in ("dropped", "notes"):
        if data.get(what):
            document.text(f"{what.capitalize()}: {'; '.join(data[what])}.")


def _row(run: dict[str, Any], slo: Slo) -> list[str]:
    report = run["report"]
    failures = ", ".join(f"{count} {name}" for name, count in sorted(report["failures"].items()))
    hidden = report["hidden_transfer_share"]
    return [
        run["load"],
        f"{run['rate']:g}",
        run["shape"],
        str(run["repeat"]),
        f"{report['num_completed']} / {failures or 0}",
        _spread(report["ttft_s"], "p50", "p99"),
        _spread(run["second_token_s"], "p50", "p99"),
        _spread(report["tpot_s"], "p50", "p99"),
        _spread(report["itl_s"], "p50", "p99", "max"),
        f"{report['output_tokens_per_s']:.0f}",
        f"{share_kept(run, slo):.1%}",
        f"{goodput(run, slo):.2f}",
        DASH if hidden is None else f"{hidden:.1%}",
        f"{run['local_share']:.1%}" if not run["shape"].endswith("colocated") else DASH,
        _spread(run["client_lag_s"], "p99"),
    ]


def _part_row(run: dict[str, Any], part: dict[str, Any]) -> list[str]:
    return [
        run["load"],
        f"{run['rate']:g}",
        run["shape"],
        str(run["repeat"]),
        f"{part['prompt_len']:,} tokens",
        str(part["count"]),
        _spread(part["ttft_s"], "p50", "p99"),
        _spread(part["itl_s"], "p50", "p99"),
    ]


def _spread(found: dict[str, float] | None, *names: str) -> str:
    return DASH if found is None else " / ".join(ms(found[name]) for name in names)


# -- who wins


def _by_load_and_rate(cells: Sequence[Cell]) -> list[list[Cell]]:
    return [list(group) for _, group in itertools.groupby(cells, key=lambda cell: (cell.load, cell.rate))]


def baseline_of(cells: Sequence[Cell], like: Cell) -> Cell | None:
    """Colocated replicas on as many GPUs, those of one rank before others; None where none were measured."""
    found = [cell for cell in cells if cell.is_colocated and cell.num_gpus == like.num_gpus]
    return min(found, key=lambda cell: "tp" in cell.shape, default=None)


def _winner_row(cells: Sequence[Cell]) -> list[str]:
    """Of one load and rate."""
    return [
        cells[0].load,
        f"{cells[0].rate:g}",
        _winner(cells, lambda cell: cell.goodput, largest=True, text=lambda value: f"{value:.2f}"),
        *(
            _winner(cells, choose, largest=False, text=ms)
            for choose in (
                lambda cell: cell.ttft_p50,
                lambda cell: cell.ttft_p99,
                lambda cell: cell.itl_p99,
            )
        ),
    ]


def _winner(
    cells: Sequence[Cell],
    choose: Callable[[Cell], float | None],
    *,
    largest: bool,
    text: Callable[[float], str],
) -> str:
    """The best shape, its figure, and how far that is from the colocated one's."""
    found = [(value, cell) for cell in cells if (value := choose(cell)) is not None]
    if not found:
        return DASH
    best, winner = (max if largest else min)(found, key=lambda each: each[0])
    alike = [cell.shape for value, cell in found if abs(value - best) <= ALIKE * max(value, best)]
    base = baseline_of(cells, winner)
    if base is None or base.shape in alike:
        return f"{' = '.join(alike)} {text(best)}"
    other = choose(base)
    return f"{' = '.join(alike)} **{text(best)}** ({base.shape} {_beside(best, other, text)})"


def _beside(best: float, other: float | None, text: Callable[[float], str]) -> str:
    """Another figure, and how far the best one is from it."""
    if not other:
        return DASH if other is None else text(other)
    ratio = best / other
    return (
        f"{text(other)}, {ratio - 1:+.0%}" if 0.25 < ratio < 4 else f"{text(other)}, {max(ratio, 1 / ratio):.1f} times"
    )


def verdict(title: str, cells: Sequence[Cell], slo: Slo) -> str:
    """Which ratio wins under a load, and by how much over colocated replicas on as many GPUs; empty without cells."""
    if not cells:
        return ""
    shapes = list(dict.fromkeys(cell.shape for cell in cells))
    peaks = {shape: max((c for c in cells if c.shape == shape), key=lambda cell: cell.goodput) for shape in shapes}
    carried = {
        shape: max((c.rate for c in cells if c.shape == shape and c.share >= CARRIED), default=None) for shape in shapes
    }
    best = max(peaks.values(), key=lambda cell: cell.goodput)
    words = [f"**{title}.** Most goodput of any rate: {best.shape}, {best.goodput:.2f}/s (at {best.rate:g}/s)"]
    base = baseline_of(list(peaks.values()), best)
    if base is not None and base.shape != best.shape:
        more = f", {best.goodput / base.goodput - 1:+.0%}" if base.goodput else ""
        words[0] += f"; {base.shape} {base.goodput:.2f}/s (at {base.rate:g}/s){more}"
    words[0] += "."
    others = [f"{s} {peaks[s].goodput:.2f}" for s in shapes if s != best.shape and (base is None or s != base.shape)]
    if others:
        words.append(f"The others: {', '.join(others)}.")
    reached = ", ".join(f"{shape} {f'{rate:g}/s' if rate else 'none'}" for shape, rate in carried.items())
    words.append(f"Highest rate measured at which {CARRIED:.0%} of the requests keep {slo_text(slo)}: {reached}.")
    return " ".join(words)


# -- answers


def first_divergence(found: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Index of the first token that differs (or that only one has); None where they are equal."""
    pairs = enumerate(itertools.zip_longest(found, wanted))
    return next((index for index, (ours, theirs) in pairs if ours != theirs), None)


def answer_rows(shapes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For ANSWER_COLUMNS: each shape's answers beside those of the first colocated one (else of the first)."""
    answered = [shape for shape in shapes if shape.get("answers")]
    base = next(
        (shape for shape in answered if shape["shape"].endswith("colocated")), answered[0] if answered else None
    )
    rows = []
    for shape in answered:
        if base is None or shape is base:
            continue
        pairs = list(zip(shape["answers"], base["answers"], strict=False))
        parted = [index for ours, theirs in pairs if (index := first_divergence(ours, theirs)) is not None]
        where = f"{min(parted)} / {statistics.median(parted):g}" if parted else DASH
        lengths = f"{len(pairs)} of {max(map(len, base['answers']))} tokens"
        equal = f"{len(pairs) - len(parted)}"
        rows.append([shape["shape"], base["shape"], lengths, equal, where, str(shape["handed_over"])])
    return rows
