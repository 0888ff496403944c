"""One engine on one GPU against what the GPU can do: decode steps and prefill beside their floors, and where time goes.

    python -m benchmarks.engine [--json result.json]
    python -m benchmarks.engine --cases decode-1,decode-64,prefill-2048 --quick --verbose
    python -m benchmarks.engine --block-sizes 16,32,64,128
    python -m benchmarks.engine --peer

The model has the shapes of Llama-3.1-8B and random weights. Ceilings (copy, read, bf16 product) are measured at the
beginning and at the end of the run, and the better ones make the floors. Every case is measured twice: a decode
step is the mean over consecutive steps in which all sequences decode, gaps between steps included; prefill is the
median time from posting fresh random prompts, to a GPU that has rested half a second (--no-rest: that has not), to the
first token of the last one. Prefix caching is off. Then some
steps of each case run under torch.profiler, which tells attention, matrix products, other kernels and gaps apart.
Without a GPU it runs on the CPU, which is good for trying it out with a tiny --model.
"""

from __future__ import annotations

if __name__ == "engine":  # a script of this folder was run by its path, and found this file in the package's stead
    raise ImportError("run the benchmarks from the repository's root as modules: python -m benchmarks.NAME")

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.engine_bench import NUM_FIGURES, Outcome, Settings, measure_cases
from benchmarks.engine_cases import CASES, Case
from benchmarks.engine_ceilings import measure_ceilings
from benchmarks.engine_floor import Ceilings, Shape
from benchmarks.engine_peer import measure_peer
from benchmarks.engine_report import Report, peer_row, print_report, row_of
from benchmarks.llama_8b import config_directory
from engine.runner import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE

BLOCK_SIZE_CASES = ("decode-64", "prefill-8192")
PEER_CASES = ("decode-1", "prefill-2048")
PEER_TIMEOUT_S = 300.0
STEPS, QUICK_STEPS = 128, 32
MIN_WIDTH = 132


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=_names, help=f"comma-separated; default: {','.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--steps", type=int, help=f"decode steps of one figure; default {STEPS}, quick {QUICK_STEPS}")
    parser.add_argument("--model", type=Path, help="a directory with another config.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--block-size", type=int, help="default: the engine's own")
    parser.add_argument("--block-sizes", type=_numbers, help=f"measure {' and '.join(BLOCK_SIZE_CASES)} at each")
    parser.add_argument("--attention", choices=("auto", "sdpa", "triton", "flash"), default="auto")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--no-rest", action="store_true", help="prefill prompts back to back, on a hot GPU")
    parser.add_argument("--no-trace", action="store_true", help="without the profiler")
    parser.add_argument("--max-step-tokens", type=int, help="default: the engine's own")
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--peer", action="store_true", help=f"transformers too, {' and '.join(PEER_CASES)}")
    parser.add_argument("--verbose", action="store_true", help="the most expensive kernels of each case by name")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(argv)


def _names(text: str) -> list[Case]:
    try:
        return [Case.parse(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def settings_of(arguments: argparse.Namespace, directory: Path) -> Settings:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(
        directory=directory,
        device=device,
        dtype=arguments.dtype,
        block_size=arguments.block_size or (CPU_BLOCK_SIZE if device == "cpu" else GPU_BLOCK_SIZE),
        attention=arguments.attention,
        cuda_graphs=not arguments.no_graphs,
        max_step_tokens=arguments.max_step_tokens,
        max_running=arguments.max_running,
        steps=arguments.steps or (QUICK_STEPS if arguments.quick else STEPS),
        quick=arguments.quick,
        rest=not arguments.no_rest,
        trace=not (arguments.no_trace or arguments.block_sizes),
    )


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Somewhere to say what is being done: `total` times for a full bar. Without a terminal it prints lines."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)

        def say(text: str) -> None:
            bar.update(task, description=text, advance=1)
            bar.console.print(f"{time.perf_counter() - start:6.1f} s  {text}", highlight=False, markup=False)

        yield say


def measure(arguments: argparse.Namespace, directory: Path) -> Report:
    """The whole run, in order: ceilings, this engine (one for each block size), ceilings, the peer."""
    settings = settings_of(arguments, directory)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    shape = Shape.load(directory, dtype.itemsize)
    names = BLOCK_SIZE_CASES if arguments.block_sizes else CASES
    cases = arguments.cases or [Case.parse(name) for name in names]
    block_sizes = arguments.block_sizes or [settings.block_size]
    about = describe(settings)
    ceilings: list[Ceilings] = []
    outcomes: list[Outcome] = []
    peer: list[tuple[Case, Any]] = []
    start, starts = time.perf_counter(), []
    with progress(3 + len(block_sizes) * (2 + len(cases) * (NUM_FIGURES + 2))) as say:
        say("measuring ceilings")
        ceilings.append(measure_ceilings(device))
        for block_size in block_sizes:
            found, start_s = measure_cases(replace(settings, block_size=block_size), cases, say)
            outcomes += found
            starts.append(start_s)
        say("measuring ceilings again")
        ceilings.append(measure_ceilings(device))
        if arguments.peer:
            say("measuring transformers")
            try:
                peer = run_peer(settings)
            except Exception as error:
                say(f"transformers could not be measured: {error!r}")
    best = Ceilings.best(ceilings)
    about |= {
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "engine_start_s": starts,
        "seconds": time.perf_counter() - start,
    }
    return Report(
        about=about,
        ceilings=ceilings,
        rows=[row_of(outcome, shape, best, with_block_size=len(block_sizes) > 1) for outcome in outcomes],
        peer=[peer_row(case, figure, shape, best) for case, figure in peer],
    )


def run_peer(settings: Settings) -> list[tuple[Case, Any]]:
    """transformers in a process of its own, which no profiler has touched."""
    cases = [Case.parse(name) for name in PEER_CASES]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(
            measure_peer, settings.directory, settings.device, settings.dtype, cases=cases, steps=settings.steps
        )
        return list(zip(cases, future.result(PEER_TIMEOUT_S), strict=True))


def describe(settings: Settings) -> dict[str, Any]:
    """What the figures depend on, for the record beside them."""
    options = asdict(settings) | {"directory": str(settings.directory)}
    on_gpu = settings.device == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device_name": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "settings": options,
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    # The profiler must not be torn down between two traces: graphs recorded meanwhile would not survive it.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    with config_directory(arguments.model) as directory:
        report = measure(arguments, directory)
    console = Console()
    if not console.is_terminal:
        console = Console(width=MIN_WIDTH)
    print_report(report, console, verbose=arguments.verbose)
    console.print(f"{report.about['seconds']:.0f} s in all", highlight=False)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_json(), indent=2))


if __name__ == "__main__":
    main()
