"""KV from one GPU to another: the channel, the pair, what decode loses meanwhile, and whole hand-overs.

    python -m benchmarks.transfer [--json result.json]
    python -m benchmarks.transfer --sections ceiling,pair --ctas 2,4,8 --pieces 8,16,32,64
    python -m benchmarks.transfer --sections decode-load --steps 96
    python -m benchmarks.transfer --sections hand-over --lengths 8192 --repeats 20 --pair-ctas 4
    python -m benchmarks.transfer --sections kernels --lengths 8192 --repeats 4
    python -m benchmarks.transfer --device cpu

Two processes with one GPU each, joined by the product's own TransferNode.

    ceiling      the data channel alone (NCCL with so many CTAs), back to back, by size of the messages
    pair         gather, send and scatter between two caches of an 8B model's shape, over the channel's rate
    decode-load  steps of a batch of 64 while nothing arrives, KV at the rate of one prefill GPU, and all that goes
    hand-over    prefill on one engine and decode on the other, beside the same engine alone; equal answers
    kernels      which of a prompt's kernels take longer while its KV leaves, and beside what (GPUs; only if asked for)

The engines have the shapes of Llama-3.1-8B and random weights. Both GPUs' own ceilings (copy, read, product) are
measured first. Every line is printed as soon as it is known. On a CPU a tiny model runs over gloo: good for trying it
out, its figures mean nothing.
"""

from __future__ import annotations

if __name__ == "transfer":  # a script of this folder was run by its path, and found this file in the package's stead
    raise ImportError("run the benchmarks from the repository's root as modules: python -m benchmarks.NAME")

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.budget import Budget
from benchmarks.llama_8b import LLAMA_8B
from benchmarks.transfer_ceiling import CeilingBook, run_ceiling
from benchmarks.transfer_kernels import run_kernels
from benchmarks.transfer_load import run_load
from benchmarks.transfer_pair import run_pair
from benchmarks.transfer_plan import CPU, GPU, Plan, grid, model_header
from benchmarks.transfer_report import Report, note
from benchmarks.transfer_rig import Rig, RigError, running
from benchmarks.transfer_router import run_handover

SECTIONS = ("ceiling", "pair", "decode-load", "hand-over", "kernels")
DEFAULT_SECTIONS = SECTIONS[:4]
ENGINE_SECTIONS = ("decode-load", "hand-over", "kernels")
START_TIMEOUT_S = 120.0
ENGINE_TIMEOUT_S = 300.0


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections", type=_sections, default=DEFAULT_SECTIONS, help=f"default: {','.join(DEFAULT_SECTIONS)}"
    )
    parser.add_argument("--budget-s", type=float, default=45.0, help="a section begins nothing new after so long")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: GPUs where there are two")
    parser.add_argument("--gpus", type=_names, help="two of them, as in CUDA_VISIBLE_DEVICES; default: the first two")
    parser.add_argument("--ctas", type=_numbers, help="CTAs of ceiling, pair and decode-load")
    parser.add_argument("--pieces", type=_numbers, help="piece_mib of the pair section, and sizes of the ceiling")
    parser.add_argument("--digests", type=_names, default=("auto",), help="policies, with --ctas or --pieces")
    parser.add_argument("--cell-s", type=float, help="seconds of a figure of the pair section")
    parser.add_argument("--steps", type=int, help="decode steps of one phase of decode-load")
    parser.add_argument("--rate-gb-s", type=float, help="KV that arrives when it is paced")
    parser.add_argument("--paced-layers", type=int, help="layers pushed at once when it is paced; GPU default: 16")
    parser.add_argument("--lengths", type=_numbers, help="prompts of hand-over")
    parser.add_argument("--repeats", type=int, help="hand-overs of each length")
    parser.add_argument("--checks", type=int, help="answers that are compared")
    parser.add_argument("--pair-ctas", type=int, help="CTAs of hand-over")
    parser.add_argument("--rest-s", type=float, help="rest of the prefill GPU before each prompt of hand-over")
    parser.add_argument("--reserve-first", action="store_true", help="hand-over: ask for blocks before the prompt goes")
    parser.add_argument("--switch-ms", type=float, help="Python's switch interval in both processes; default: Python's")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(argv)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _sections(text: str) -> tuple[str, ...]:
    if unknown := set(text.split(",")) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: sections are {', '.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in text.split(","))


def plan_of(arguments: argparse.Namespace, device: str, directory: Path) -> Plan:
    """The plan for that device, with what the command line changes."""
    plan = GPU if device == "cuda" else CPU
    changes: dict[str, Any] = {
        "switch_s": arguments.switch_ms and arguments.switch_ms / 1e3,
        "cell_s": arguments.cell_s,
        "ceiling_ctas": arguments.ctas,
        "ceiling_mib": arguments.pieces,
        "load_ctas": arguments.ctas,
        "load_steps": arguments.steps,
        "load_rate": arguments.rate_gb_s and arguments.rate_gb_s * 1e9,
        "load_layers": arguments.paced_layers,
        "lengths": arguments.lengths,
        "repeats": arguments.repeats,
        "checks": arguments.checks,
        "ctas": arguments.pair_ctas,
        "rest_s": arguments.rest_s,
        "reserve_first": arguments.reserve_first or None,
    }
    if arguments.ctas or arguments.pieces or arguments.digests != ("auto",):
        pieces = arguments.pieces or tuple(dict.fromkeys(cell.piece_mib for cell in plan.pair_cells))
        changes["pair_cells"] = grid(arguments.ctas or (plan.ctas,), pieces, arguments.digests)
    return replace(plan, directory=str(directory), **{name: new for name, new in changes.items() if new is not None})


def choose_gpus(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls the two GPUs; none: on a CPU."""
    if arguments.device == "cpu":
        return ()
    count = torch.cuda.device_count()
    if arguments.gpus is None and arguments.device is None and count == 0:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus: tuple[str, ...] = arguments.gpus or tuple(visible.split(",") if visible else map(str, range(count)))
    if len(gpus) < 2 or count < 2:
        raise SystemExit(f"two GPUs are needed, torch sees {count}; --device cpu tries it out without")
    return gpus[:2]


def measure(rig: Rig, plan: Plan, arguments: argparse.Namespace, report: Report) -> list[str]:
    """All sections that are asked for; what failed."""
    about = rig.both("side.describe", timeout_s=START_TIMEOUT_S)
    report.figures["about"] |= {"sender": about[0], "receiver": about[1]}
    note(" | ".join(f"{name} {value}" for name, value in about[0].items() if value) + f" | {time.strftime('%Y-%m-%d')}")
    _measure_gpus(rig, report)
    book = CeilingBook(rig, plan)
    failures: list[str] = []
    for section in arguments.sections:
        try:
            if section in ENGINE_SECTIONS:
                seconds = rig.both("side.start_engine", timeout_s=ENGINE_TIMEOUT_S)
                report.say(f"engines ready in {max(seconds):.1f} s")
            budget = Budget(arguments.budget_s)
            _run(section, rig, plan, report, budget, book)
            if budget.skipped:
                note(f"{section}: time was up before {', '.join(dict.fromkeys(budget.skipped))}")
        except RigError as error:
            failures.append(f"{section}: {error}")
            traceback.print_exc()
        report.figures["failures"] = failures
        report.save()
    return failures


def _run(section: str, rig: Rig, plan: Plan, report: Report, budget: Budget, book: CeilingBook) -> None:
    report.say(f"section {section}")
    if section == "ceiling":
        run_ceiling(rig, plan, report, budget, book)
    elif section == "pair":
        run_pair(rig, plan, report, budget, book)
    elif section == "decode-load":
        run_load(rig, plan, report, budget)
    else:
        header = json.loads((Path(plan.directory) / "config.json").read_text())
        run = run_handover if section == "hand-over" else run_kernels
        run(rig, plan, report, budget, header["vocab_size"])


def _measure_gpus(rig: Rig, report: Report) -> None:
    """What each device reaches at best, beside everything else."""
    report.say("measuring the devices' own ceilings")
    found = report.figures["devices"] = rig.both("side.ceilings")
    for name, each in zip(("sender", "receiver"), found, strict=True):
        note(
            f"{name}: copy {each['copy_bytes_s'] / 1e12:.3f} TB/s, read {each['read_bytes_s'] / 1e12:.3f} TB/s, "
            f"bf16 product {each['matrix_flop_s'] / 1e12:.1f} TFLOP/s in a burst"
        )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    gpus = choose_gpus(arguments)
    if not gpus and "kernels" in arguments.sections:
        raise SystemExit("section kernels needs two GPUs: leave it out of --sections on a CPU")
    command = " ".join(["python -m benchmarks.transfer", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory(prefix="pdserve-config-") as folder:
        plan = plan_of(arguments, "cuda" if gpus else "cpu", Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps(model_header(plan, LLAMA_8B)))
        about = {"command": command, "date": time.strftime("%Y-%m-%d"), "gpus": gpus, "plan": asdict(plan)}
        report = Report(arguments.json, about)
        note(command)
        with running(plan, gpus) as rig:
            failures = measure(rig, plan, arguments, report)
    report.save()
    note(f"\n{report.figures['about']['seconds']:.0f} s in all")
    if failures:
        raise SystemExit(f"{len(failures)} sections failed")


if __name__ == "__main__":
    main()
