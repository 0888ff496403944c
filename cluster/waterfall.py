"""Draws a finished request's timing: where its time went, phase by phase, as text."""

from __future__ import annotations

from protos.inference_pb2 import Finished, Timing

PHASES = (
    ("queue", "queue_s"),
    ("prefill", "prefill_s"),
    ("transfer", "transfer_s"),
    ("first decode step", "first_decode_step_s"),
    ("decode", "decode_s"),
)
"""Label and Timing field of each phase, in the order they happen."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def waterfall(finished: Finished, *, width: int = 40) -> str:
    """Lines of text: one bar a phase, placed where it happened, then totals, then where it happened."""
    timing = finished.timing
    durations = [max(0.0, getattr(timing, field)) for _, field in PHASES]
    scale = width / (sum(durations) or 1.0)
    lines, start_s = [], 0.0
    for (label, _), duration_s in zip(PHASES, durations, strict=True):
        bar = _bar(start_s * scale, duration_s * scale)
        lines.append(f"  {label:<17} {bar:<{width + 1}} {format_seconds(duration_s):>8}")
        start_s += duration_s
    lines += ["  " + " · ".join(parts) for parts in (_totals(finished), _places(finished)) if parts]
    if finished.route:
        lines.append(f"  route: {finished.route}")
    return "\n".join(lines)


def hidden_share(transfer_s: float, transfer_busy_s: float) -> float | None:
    """Share of the pair's time on the pieces that prefill hid; None where nothing was transferred."""
    if transfer_busy_s <= 0.0:
        return None
    return min(1.0, max(0.0, 1.0 - transfer_s / transfer_busy_s))


def format_seconds(seconds: float) -> str:
    """Three digits or so with a unit, as in `1.23 s` or `45.6 ms`."""
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f} ms" if milliseconds >= 99.95 else f"{milliseconds:.1f} ms"


def _totals(finished: Finished) -> list[str]:
    timing, usage = finished.timing, finished.usage
    parts = [f"first token {format_seconds(timing.ttft_s)}", f"total {format_seconds(timing.total_s)}"]
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    parts.append(f"{usage.prompt_tokens} tokens in{cached}, {usage.completion_tokens} out")
    return parts


def _places(finished: Finished) -> list[str]:
    parts = [_transfer(finished.timing)] if finished.timing.transfer_bytes else []
    if finished.decode_worker:
        workers = finished.decode_worker
        if finished.prefill_worker and finished.prefill_worker != finished.decode_worker:
            workers = f"{finished.prefill_worker} → {finished.decode_worker}"
        parts.append(workers)
    return parts


def _transfer(timing: Timing) -> str:
    text = f"KV {timing.transfer_bytes / 2**20:.1f} MiB"
    share = hidden_share(timing.transfer_s, timing.transfer_busy_s)
    return text if share is None else f"{text}, {share:.0%} of its transfer hidden"


def _bar(start: float, length: float) -> str:
    """A bar from start to start + length cells, in eighths of a cell; never invisible."""
    first = int(start)
    eighths = max(1, round((start - first + length) * 8))
    full, rest = divmod(eighths, 8)
    return " " * first + "█" * full + (_EIGHTHS[rest] if rest else "")
