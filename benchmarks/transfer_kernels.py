"""Section `kernels`: where the time goes that a prompt loses while its KV is sent. GPUs alone.

The sender computes the same number of prompts alone and with the transfer, under torch's profiler. A prompt's products,
attention and so on come in the same order each time, on the engine's stream, so each can be compared with itself: what
it takes longer is put down to what ran beside it on other streams (NCCL's send, the gather or the checksum of a piece,
nothing), and what is left are gaps.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.budget import Budget
from benchmarks.engine_trace import Kernel, exclusive_us
from benchmarks.transfer_plan import Plan
from benchmarks.transfer_report import Report, Sheet, note
from benchmarks.transfer_rig import Rig
from benchmarks.transfer_router import NUM_WARM, Router, Times

REST_US = 50_000.0
"""A pause of the GPU that parts two prompts."""
NUM_TOP = 8
BESIDE = (("nccl", "send"), ("kv_pack", "gather"), ("checksum", "checksum"))
"""Part of a transfer kernel's name in lower case -> what it is called here."""
OTHER = "other"
COLUMNS = ("beside", "kernels", "lost, ms")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Of one prompt, in microseconds; medians over the prompts."""

    alone_us: float
    """First to last kernel of the prompt."""
    split_us: float
    alone_gaps_us: float
    """Of that, in which nothing computed."""
    split_gaps_us: float
    by_neighbour: dict[str, tuple[int, float]]
    """What ran beside -> how many kernels, and how much longer they took in all than alone."""
    by_name: list[tuple[str, int, float, float]]
    """Kernels that lost most: name, runs, time alone, time with the transfer."""
    sends_us: list[float]
    """Each send's own kernel."""


def kind_of(name: str) -> str:
    """What a kernel of another stream than the engine's is called here."""
    lower = name.lower()
    return next((kind for part, kind in BESIDE if part in lower), OTHER)


def engine_stream(kernels: Sequence[Kernel]) -> int | None:
    """The stream of most kernels; None if there are none."""
    most = Counter(kernel.stream for kernel in kernels).most_common(1)
    return most[0][0] if most else None


def prompts_of(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels of each prompt, which long pauses part; those without any of the engine's are none."""
    prompts: list[list[Kernel]] = []
    main = engine_stream(kernels)
    end = float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if kernel.start - end > REST_US:
            prompts.append([])
        prompts[-1].append(kernel)
        end = max(end, kernel.end)
    return [each for each in prompts if any(kernel.stream == main for kernel in each)]


def compare(alone: list[list[Kernel]], split: list[list[Kernel]]) -> Loss:
    """ValueError where the prompts are not of the same kernels in the same order."""
    main = engine_stream([kernel for prompt in (*alone, *split) for kernel in prompt])
    computed = [[kernel for kernel in prompt if kernel.stream == main] for prompt in (*alone, *split)]
    names = [[kernel.name for kernel in prompt] for prompt in computed]
    if not alone or not split or any(each != names[0] for each in names):
        raise ValueError(f"prompts of {', '.join(str(len(each)) for each in names)} kernels cannot be compared")
    usual = [statistics.median(runs) for runs in zip(*map(_lengths, computed[: len(alone)]), strict=True)]
    sums: list[dict[str, list[float]]] = []
    for prompt, kernels in zip(split, computed[len(alone) :], strict=True):
        beside = [kernel for kernel in prompt if kernel.stream != main]
        found: dict[str, list[float]] = {}
        for kernel, usual_us in zip(kernels, usual, strict=True):
            found.setdefault(_neighbour(kernel, beside), []).append(kernel.end - kernel.start - usual_us)
        sums.append(found)
    kinds = sorted({kind for found in sums for kind in found})
    return Loss(
        alone_us=statistics.median(map(_window, computed[: len(alone)])),
        split_us=statistics.median(map(_window, computed[len(alone) :])),
        alone_gaps_us=statistics.median(map(_gaps, computed[: len(alone)])),
        split_gaps_us=statistics.median(map(_gaps, computed[len(alone) :])),
        by_neighbour={
            kind: (
                round(statistics.median(len(found.get(kind, ())) for found in sums)),
                statistics.median(sum(found.get(kind, ())) for found in sums),
            )
            for kind in kinds
        },
        by_name=_by_name(computed[: len(alone)], computed[len(alone) :]),
        sends_us=[k.end - k.start for prompt in split for k in prompt if kind_of(k.name) == "send"],
    )


def _lengths(kernels: list[Kernel]) -> list[float]:
    return [kernel.end - kernel.start for kernel in kernels]


def _window(kernels: list[Kernel]) -> float:
    return max(kernel.end for kernel in kernels) - kernels[0].start


def _gaps(kernels: list[Kernel]) -> float:
    window = (kernels[0].start, max(kernel.end for kernel in kernels))
    return window[1] - window[0] - sum(time_us for _, time_us in exclusive_us(kernels, window))


def _neighbour(kernel: Kernel, beside: list[Kernel]) -> str:
    kinds = {kind_of(each.name) for each in beside if each.start < kernel.end and each.end > kernel.start}
    return " + ".join(sorted(kinds)) or "nothing"


def _by_name(alone: list[list[Kernel]], split: list[list[Kernel]]) -> list[tuple[str, int, float, float]]:
    def sums(prompts: list[list[Kernel]], name: str) -> float:
        return statistics.median(sum(k.end - k.start for k in prompt if k.name == name) for prompt in prompts)

    counts = {name: sum(kernel.name == name for kernel in alone[0]) for name in {kernel.name for kernel in alone[0]}}
    rows = [(name, count, sums(alone, name), sums(split, name)) for name, count in counts.items()]
    return sorted(rows, key=lambda row: row[2] - row[3])[:NUM_TOP]


def run_kernels(rig: Rig, plan: Plan, report: Report, budget: Budget, vocab_size: int) -> list[dict[str, Any]]:
    """The section."""
    found: list[dict[str, Any]] = report.figures.setdefault("kernels", [])
    rig.both("node.open", plan.ctas)
    try:
        rig.both("crafts.open")
        router = Router(rig, vocab_size, reserve_first=plan.reserve_first)
        for length in plan.lengths:
            if budget.allows(f"kernels of {length} tokens"):
                loss = _measure(rig, router, plan, length)
                found.append({"length": length, **_shown(length, loss)})
                report.say(f"kernels: {length} tokens")
    finally:
        rig.both("crafts.close")
    return found


def _measure(rig: Rig, router: Router, plan: Plan, length: int) -> Loss:
    traced: list[list[list[Kernel]]] = []
    for is_split in (False, True):
        for number in range(NUM_WARM + plan.repeats):
            if number == NUM_WARM:
                rig.sender.call("crafts.begin_trace")
            router.rest(max(plan.rest_s, 2 * REST_US / 1e6))
            if is_split:
                router.split([router.request(length, plan.answer)], Times())
            else:
                router.alone(router.request(length, 1)[1])
        kernels = [Kernel(*each) for each in rig.sender.call("crafts.end_trace")]
        traced.append(prompts_of(kernels))
    return compare(*traced)


def _shown(length: int, loss: Loss) -> dict[str, Any]:
    """As JSON; prints it, too."""
    sheet = Sheet(f"kernels: {length} tokens, what a prompt's own kernels take longer while its KV leaves", COLUMNS)
    for kind, (count, lost_us) in loss.by_neighbour.items():
        sheet.row([kind, count, lost_us / 1e3])
    sheet.row(["gaps", None, (loss.split_gaps_us - loss.alone_gaps_us) / 1e3])
    sheet.row(["all", None, (loss.split_us - loss.alone_us) / 1e3])
    for name, count, alone_us, split_us in loss.by_name:
        note(f"{(split_us - alone_us) / 1e3:+.2f} ms of {alone_us / 1e3:.2f} in {count} runs of {name[:100]}")
    if loss.sends_us:
        each = ", ".join(f"{us / 1e3:.2f}" for us in loss.sends_us[:NUM_TOP])
        note(f"{len(loss.sends_us)} sends, {sum(loss.sends_us) / 1e3:.2f} ms in all; the first: {each}")
    return {
        "alone_ms": loss.alone_us / 1e3,
        "split_ms": loss.split_us / 1e3,
        "gaps_ms": [loss.alone_gaps_us / 1e3, loss.split_gaps_us / 1e3],
        "lost_ms": {kind: lost_us / 1e3 for kind, (_, lost_us) in loss.by_neighbour.items()},
        "by_name_ms": [[name, count, alone / 1e3, split / 1e3] for name, count, alone, split in loss.by_name],
        "sends_ms": [us / 1e3 for us in loss.sends_us],
    }
