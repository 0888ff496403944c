"""The ratio benchmark's figures by rate, a column of plots for each load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.ratio_report import Cell, cells_of
from benchmarks.serve_report import slo_text
from cluster.load_report import Slo

ROWS = (
    ("TTFT p99, ms", "log"),
    ("ITL p99, ms", "log"),
    ("output tokens/s", "linear"),
    ("goodput, requests/s", "linear"),
)


def plot(data: dict[str, Any], slo: Slo, file: Path) -> None:
    """Draw; ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cells = cells_of(data, slo)
    loads = [load for load in data["loads"] if any(cell.load == load["name"] for cell in cells)]
    shapes = list(dict.fromkeys(shape["shape"] for shape in data["shapes"]))
    figure, axes = plt.subplots(
        len(ROWS), max(1, len(loads)), figsize=(4 * max(1, len(loads)), 11), squeeze=False, sharex="col"
    )
    for column, load in enumerate(loads):
        for row, (name, scale) in enumerate(ROWS):
            ax = axes[row][column]
            for number, shape in enumerate(shapes):
                mine = [cell for cell in cells if (cell.load, cell.shape) == (load["name"], shape)]
                points = [(cell.rate, value) for cell in mine if (value := _values(cell)[row]) is not None]
                style = "--" if shape.endswith("colocated") else "-"
                ax.plot(
                    *zip(*points, strict=True), style, marker="o", color=f"C{number}", label=shape
                ) if points else None
            ax.set_yscale(scale)
            ax.grid(visible=True, alpha=0.3)
            if scale == "linear":
                ax.set_ylim(bottom=0)
            if column == 0:
                ax.set_ylabel(name)
        axes[0][column].set_title(load["title"], fontsize=9)
        axes[-1][column].set_xlabel("requests/s")
        for row, bound in ((0, slo.ttft_s), (1, slo.itl_s)):
            if bound is not None:
                axes[row][column].axhline(bound * 1e3, color="grey", linewidth=0.8, linestyle=":")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{data['machine']}, {data['num_gpus']} GPUs, {data['date']}; SLO: {slo_text(slo)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _values(cell: Cell) -> tuple[float | None, ...]:
    """For ROWS."""
    ttft, itl = (value and value * 1e3 for value in (cell.ttft_p99, cell.itl_p99))
    return ttft, itl, cell.tokens_per_s, cell.goodput
