"""Runs `benchmarks.serve_probe`, a process for each device at once."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def num_gpus() -> int:
    """GPUs that this process may use, without a library that would take some of their memory."""
    return len(_gpus())


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def run_probes(
    arguments: argparse.Namespace, phases: Sequence[str], engine_yaml: Path, *, timeout_s: float
) -> list[dict[str, Any]]:
    """Every line that the probes wrote, the first device's first; one of kind `failed` for each that failed."""
    devices = _gpus() if arguments.device == "cuda" else [""]
    if not devices:
        return [{"kind": "failed", "message": "there is no GPU (nvidia-smi lists none); try --device cpu"}]
    until = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="pdserve-probe-") as folder:
        started = []
        for index, device in enumerate(devices):
            what = [phase for phase in phases if phase == "ceilings"]
            if index == 0 and "engine" in phases:
                what.append(f"engine:{engine_yaml}")
            if what:
                file = Path(folder) / f"{index}.jsonl"
                started.append((file, _start(arguments, device, file, what)))
        return [line for file, process in started for line in _ended(file, process, until)]


def _start(arguments: argparse.Namespace, device: str, file: Path, what: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if arguments.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "benchmarks.serve_probe", str(file), *what, "--device", arguments.device]
    command += ["--prompt-lens", ",".join(map(str, arguments.handover_lens)), "--rest-s", str(arguments.rest_s)]
    command += ["--repeats", str(arguments.handover_repeats), "--output-len", str(arguments.handover_output_len)]
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def _ended(file: Path, process: subprocess.Popen[bytes], until: float) -> list[dict[str, Any]]:
    problem = ""
    try:
        if process.wait(max(0.0, until - time.monotonic())) != 0:
            problem = f"it ended with {process.returncode}; stderr says why"
    except subprocess.TimeoutExpired:
        problem = "it was cut off by its time bound"
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [*lines, {"kind": "failed", "message": problem}] if problem else lines


def ceilings_of(lines: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Copy (bytes/s) and product (FLOP/s) of the slowest device; None where they were not measured."""
    found = [line for line in lines if line["kind"] == "ceilings"]
    if not found:
        return None
    return min(line["copy_bytes_s"] for line in found), min(line["matrix_flop_s"] for line in found)
