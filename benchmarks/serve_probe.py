"""What one device does alone, measured in a process of its own so that its memory is free again afterwards.

    python -m benchmarks.serve_probe RESULT ceilings
    python -m benchmarks.serve_probe RESULT ceilings engine:CLUSTER.YAML --prompt-lens 2048,8192 --repeats 8

Writes a line of JSON to RESULT for each thing measured, at once, so that a run that is cut off leaves what it had. The
engine is built from the YAML's decode pool, as a worker builds it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_cases import random_prompts
from benchmarks.engine_ceilings import measure_ceilings
from benchmarks.engine_driver import Driver
from cluster.config import load_config
from engine.engine import Engine

NUM_WARMUP = 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--prompt-lens", type=lambda text: [int(each) for each in text.split(",")], default=[2048])
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--rest-s", type=float, default=0.3)
    arguments = parser.parse_args(argv)
    for what in arguments.what:
        kind, _, file = what.partition(":")
        if kind == "ceilings":
            tell(arguments.result, {"kind": "ceilings", **measured_ceilings(arguments.device)})
        else:
            measure_engine(arguments, Path(file))


def tell(result: Path, line: dict[str, Any]) -> None:
    with result.open("a") as file:
        print(json.dumps(line), file=file, flush=True)


def measured_ceilings(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    about = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "cores": torch.get_num_threads()}
    return about | asdict(measure_ceilings(torch.device(device)))


def measure_engine(arguments: argparse.Namespace, file: Path) -> None:
    """TTFT and the gaps behind it, prompt after prompt, each to an engine that has rested."""
    began = time.perf_counter()
    config = load_config(file)
    engine = Engine(config.model, config.cache, config.decode)
    engine.runner.warm_up()
    engine.start()
    try:
        driver = Driver(engine)
        vocab_size = engine.runner.config.vocab_size
        tell(arguments.result, {"kind": "engine_start", "seconds": time.perf_counter() - began})
        for length in arguments.prompt_lens:
            moments = []
            for index in range(NUM_WARMUP + arguments.repeats):
                prompts = random_prompts((length,), vocab_size, length * 1000 + index)
                time.sleep(arguments.rest_s)
                run = driver.run(prompts, (arguments.output_len,))
                moments.append([step.moment - run.start for step in run.steps])
            tell(arguments.result, {"kind": "engine", "prompt_len": length, "moments": moments[NUM_WARMUP:]})
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
