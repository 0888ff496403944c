"""What a simulated comparison says: a table, JSON, a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.elastic_compare import Result
from benchmarks.elastic_load import Load


def table(title: str, results: Sequence[Result]) -> str:
    """As Markdown; the first result is what the others are compared with."""
    lines = [
        f"| {title} | setting | GPU-hours | to the autoscaler's | TTFT kept | ITL kept | refused | P : D on average |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    ours = results[0].figures.gpu_hours
    for one in results:
        figures = one.figures
        lines.append(
            f"| {one.name} | {one.setting} | {figures.gpu_hours:,.0f} | {figures.gpu_hours / ours - 1:+.1%} | "
            f"{figures.ttft_share:.2%} | {figures.itl_share:.2%} | {figures.refused:.3%} | "
            f"{figures.mean_prefill:.1f} : {figures.mean_decode:.1f} |"
        )
    return "\n".join(lines)


def as_plain(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """For JSON."""
    return {
        load: [
            {"name": one.name, "setting": one.setting, "changes": one.changes, **asdict(one.figures)} for one in some
        ]
        for load, some in results.items()
    }


def plot(path: Path, load: Load, results: Sequence[Result]) -> None:
    """Draw the load, and the workers of each policy, into a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hours, every = np.arange(load.num_steps) * load.step_s / 3600, max(1, round(60 / load.step_s))
    figure, axes = pyplot.subplots(3, 1, figsize=(11, 9), sharex=True, constrained_layout=True)
    per_s = {"uncached prompt tokens/s": load.uncached_tokens, "answer tokens/s": load.answer_tokens}
    for label, tokens in per_s.items():
        axes[0].plot(hours[::every], _means(tokens, every) / load.step_s, label=label)
    axes[0].set_ylabel("tokens/s that come")
    for axis, pool in zip(axes[1:], ("prefill", "decode"), strict=True):
        for one in results:
            axis.plot(hours[::every], _means(getattr(one.run, pool), every), label=one.name, linewidth=1)
        axis.set_ylabel(f"{pool} workers")
    axes[2].set_xlabel("hours")
    for axis in axes:
        axis.legend(fontsize=8)
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _means(values: np.ndarray, every: int) -> np.ndarray:
    starts = np.arange(0, len(values), every)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
