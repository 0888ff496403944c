"""The whole cluster on the GPUs of one host under an open-loop load, beside its ceilings and beside vLLM.

    python -m benchmarks.serve --budget-s 570 --seconds 20 --json result.json
    python -m benchmarks.serve --phases ceilings,engine,handover --shapes 1p1d,1colocated
    python -m benchmarks.serve --shapes 1p3d,4colocated --rates 12,24,36 --set transfer.max_ctas=4
    python -m benchmarks.serve --device cpu --model DIRECTORY --prompt-lens 64 --handover-lens 64,128 --rates 2

Phases: `ceilings` (copy and bf16 product of every GPU) and `engine` (one engine, no cluster: the first token and the
gaps behind it) in processes of their own; then each shape's cluster is started once, and while it is idle `handover`
sends requests one after another; then `load` sends Poisson arrivals at each rate, --repeats times over. Client
processes of their own send through the public gRPC API and count from when a request was due.

The model has the shapes of Llama-3.1-8B and random weights, prompts are random token ids, so no prefix is shared.
Tables grow on stdout row by row, and --json after each row: a run that is cut off leaves what it had. What
--budget-s leaves no time for is skipped, and said; a phase that fails is said, and the others run.
"""

from __future__ import annotations

if __name__ == "serve":  # a script of this folder was run by its path, and found this file in the package's stead
    raise ImportError("run the benchmarks from the repository's root as modules: python -m benchmarks.NAME")

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.budget import Budget
from benchmarks.llama_8b import config_directory
from benchmarks.serve_clients import Clients, LoadJob, SequenceJob, num_clients
from benchmarks.serve_cluster import Cluster, Model, Shape, cluster_yaml, running
from benchmarks.serve_figures import IdleFigures, LoadFigures, engine_figures, idle_figures
from benchmarks.serve_options import LoadCase, arguments_of, cases_of, model_of, slo_of
from benchmarks.serve_probes import ceilings_of, num_gpus, run_probes
from benchmarks.serve_report import (
    IDLE_COLUMNS,
    LOAD_COLUMNS,
    PHASE_COLUMNS,
    REFERENCE_COLUMNS,
    REFERENCE_NOTE,
    Document,
    ceilings_texts,
    idle_row,
    load_row,
    phase_row,
    reference_rows,
    slo_text,
)
from benchmarks.split_vs_colocated import machine
from cluster.load import UNFINISHED, Length, LoadProfile

DOWN_S = 12.0
"""What bringing a cluster down may take: kept free of the budget."""
START_S = {"cuda": 60.0, "cpu": 20.0}
"""What a start takes, until one has been seen."""
SETTLE_S = 2.0
"""For a cluster to end what was cut off, before the next run."""
WARM_SEED = 99


class Bench:
    """One run of the benchmark: its options, its clock, and where its figures go."""

    def __init__(self, arguments: argparse.Namespace, model: Model, document: Document, budget: Budget) -> None:
        self.arguments = arguments
        self.model = model
        self.document = document
        self.budget = budget
        self.slo = slo_of(arguments)
        self.alone: dict[int, IdleFigures] = {}
        self.failed = False
        self._start_s = START_S[model.device]

    def say(self, text: str) -> None:
        """Progress."""
        print(f"[{self.budget.spent():6.1f} s] {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something that a reader of the figures must know."""
        self.say(text)
        self.document.text(f"*{text}*")
        self.document.data.setdefault("notes", []).append(text)
        self.document.save()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part whose failure does not end the others."""
        self.say(f"{name}: begins")
        try:
            yield
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            self.note(f"{name} failed: {type(error).__name__}: {error}")

    def probe(self, phases: Sequence[str]) -> None:
        """Ceilings of each device at once, and the engine alone on the first."""
        if not self.budget.fits(need := 60.0 if "engine" in phases else 20.0):
            self.note(f"skipped: {' and '.join(phases)}: {need:.0f} s needed, {self.budget.left():.0f} s left")
            return
        with tempfile.TemporaryDirectory(prefix="pdserve-probe-") as folder:
            file = Path(folder) / "engine.yaml"
            file.write_text(yaml.safe_dump(cluster_yaml(Shape("colocated", 0, 1), self.model)))
            lines = run_probes(self.arguments, phases, file, timeout_s=min(300.0, self.budget.left()))
        self.document.data["probes"] = lines
        for text in ceilings_texts(lines):
            self.document.text(text)
        for line in lines:
            if line["kind"] == "engine_start":
                self.document.text(f"The engine alone was ready after {line['seconds']:.1f} s.")
            elif line["kind"] == "engine":
                self.alone[line["prompt_len"]] = figures = engine_figures(line["prompt_len"], line["moments"])
                self._idle(figures)
            elif line["kind"] == "failed":
                self.failed = True
                self.note(f"a probe failed: {line['message']}")
        self.document.save()

    def _idle(self, figures: IdleFigures) -> None:
        self.document.row(IDLE_COLUMNS, idle_row(figures, self.alone))
        self.document.data.setdefault("handover", []).append(figures.as_json())
        self.document.save()

    def shape(self, shape: Shape, clients: Clients) -> None:
        """A cluster's whole life."""
        cases = cases_of(self.arguments, shape) if "load" in self.arguments.phases else []
        first = "handover" not in self.arguments.phases and cases
        if not self.budget.fits(need := self._start_s + DOWN_S + (self._needed() if first else 5.0)):
            self.note(f"skipped: {shape.name}: {need:.0f} s needed, {self.budget.left():.0f} s left")
            return
        content = cluster_yaml(shape, self.model)
        timeout_s = min(300.0, self.budget.left() - DOWN_S)
        shown: dict[str, Any] = {"shape": shape.name, "yaml": content}
        self.document.data.setdefault("shapes", []).append(shown)
        with running(content, self.say, timeout_s=timeout_s, name=shape.name, keep_logs=self.arguments.logs) as cluster:
            shown |= {"start_s": cluster.start_s, "steps": cluster.steps}
            shown["errors"] = cluster.errors  # filled when it is stopped
            self._start_s = cluster.start_s
            steps = ", ".join(f"{what} {seconds:.1f}" for what, seconds in cluster.steps.items())
            self.document.text(f"{shape.name}: ready after {cluster.start_s:.1f} s ({steps}).")
            self.document.save()
            if "handover" in self.arguments.phases:
                with self.phase(f"{shape.name}, hand-over"):
                    self._handover(shape, cluster, clients)
            if cases:
                with self.phase(f"{shape.name}, load"):
                    self._load(shape, cluster, clients, cases)
        self.document.save()

    def _handover(self, shape: Shape, cluster: Cluster, clients: Clients) -> None:
        arguments = self.arguments
        for length in arguments.handover_lens:
            job = SequenceJob(
                address=cluster.address,
                prompt_len=length,
                output_len=arguments.handover_output_len,
                repeats=2 * shape.num_workers,
                rest_s=0.0,
                limit_s=min(60.0, max(1.0, self.budget.left() - DOWN_S)),
                seed=length,
            )
            clients.sequence(job)
            measured = SequenceJob(
                address=cluster.address,
                prompt_len=length,
                output_len=arguments.handover_output_len,
                repeats=arguments.handover_repeats,
                rest_s=arguments.rest_s,
                limit_s=job.limit_s,
                seed=length + 1,
            )
            self._idle(idle_figures(shape.name, length, clients.sequence(measured)))

    def _load(self, shape: Shape, cluster: Cluster, clients: Clients, cases: Sequence[LoadCase]) -> None:
        self._warm_up(cluster, clients, cases)
        skipped: list[str] = []
        runs: list[LoadFigures] = []
        for case in cases:
            cluster.check()
            name = f"{shape.name}, {case.prompt_len} tokens at {case.rate:g}/s, run {case.repeat}"
            if not self.budget.fits(self._needed() + DOWN_S):
                skipped.append(name)
                continue
            runs.append(figures := self._measure(shape, cluster, clients, case))
            if UNFINISHED in figures.report.failures:
                time.sleep(SETTLE_S)
            self.say(f"{name}: {figures.report.num_completed} answered, {figures.num_failed} failed")
            for message in figures.report.failure_messages.values():
                self.say(f"  first failure of its kind: {message}")
            self.document.row(LOAD_COLUMNS, load_row(figures))
            self.document.data.setdefault("load", []).append(figures.as_json())
            self.document.save()
        for figures in runs:
            self.document.row(PHASE_COLUMNS, phase_row(figures))
        if skipped:
            self.note(f"skipped, {self.budget.left():.0f} s being left: {'; '.join(skipped)}")
        self._compare(runs)

    def _warm_up(self, cluster: Cluster, clients: Clients, cases: Sequence[LoadCase]) -> None:
        """Let everything compile itself that does so at first use: short, and not counted."""
        if self.arguments.warmup_s <= 0:
            return
        case = max(cases, key=lambda each: each.rate)
        profile = self._profile(case, WARM_SEED, self.arguments.warmup_s)
        result = clients.load(LoadJob(address=cluster.address, profile=profile, limit_s=self.arguments.warmup_s + 60.0))
        failed = [record for record in result.load.records if record.failure is not None]
        self.say(f"warm-up: {len(result.load.records)} requests, {len(failed)} failed")
        if failed:
            self.note(f"the warm-up's first failure: {failed[0].failure}: {failed[0].failure_message}")

    def _measure(self, shape: Shape, cluster: Cluster, clients: Clients, case: LoadCase) -> LoadFigures:
        profile = self._profile(case, case.seed, self.arguments.seconds)
        limit_s = min(self.arguments.seconds + self.arguments.tail_s, self.budget.left() - DOWN_S)
        num = min(num_clients(case.rate, os.cpu_count() or 1), clients.num)
        result = clients.load(LoadJob(address=cluster.address, profile=profile, limit_s=limit_s), num)
        return LoadFigures.of(
            result,
            self.slo,
            shape=shape.name,
            prompt_len=case.prompt_len,
            rate=case.rate,
            repeat=case.repeat,
            num_clients=num,
        )

    def _profile(self, case: LoadCase, seed: int, seconds: float) -> LoadProfile:
        return LoadProfile(
            rate=case.rate,
            duration_s=seconds,
            input_len=Length(mean=case.prompt_len, spread=round(case.prompt_len * self.arguments.spread)),
            output_len=Length(mean=self.arguments.output_len),
            seed=seed,
        )

    def _needed(self) -> float:
        """Seconds of a run, if the cluster keeps up."""
        return float(self.arguments.seconds + max(3.0, 0.02 * self.arguments.output_len))

    def _compare(self, runs: Sequence[LoadFigures]) -> None:
        """Beside vLLM's figures, where the workload is the same."""
        ceilings = ceilings_of(self.document.data.get("probes", []))
        if ceilings is None or not self.arguments.comparable or self.arguments.model is not None:
            return
        rows = reference_rows(runs, *ceilings)
        if rows:
            self.document.text(REFERENCE_NOTE)
        for row in rows:
            self.document.row(REFERENCE_COLUMNS, row)


def run(arguments: argparse.Namespace, bench: Bench) -> None:
    """All phases, in order."""
    document = bench.document
    command = "python -m benchmarks.serve " + " ".join(arguments.argv)
    document.data |= {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    document.text(f"`{command.strip()}`, {document.data['date']}, {machine()}, {num_gpus()} GPUs")
    document.text(
        "Latencies in ms, of requests answered whole, counted from when each was due; goodput: "
        f"answered whole with {slo_text(bench.slo)}; "
        f"{arguments.output_len} output tokens; prompts ± {arguments.spread:.0%}; {arguments.seconds:g} s of arrivals "
        "a run."
    )
    probed = [phase for phase in ("ceilings", "engine") if phase in arguments.phases]
    if probed:
        with bench.phase(" and ".join(probed)):
            bench.probe(probed)
    if {"handover", "load"}.isdisjoint(arguments.phases):
        return
    rates = [case.rate for shape in arguments.shapes for case in cases_of(arguments, shape)]
    with Clients(arguments.clients or num_clients(max(rates, default=1.0), os.cpu_count() or 1)) as clients:
        for shape in arguments.shapes:
            if arguments.device == "cuda" and shape.num_gpus > num_gpus():
                bench.failed = True
                bench.note(f"skipped: {shape.name} needs {shape.num_gpus} GPUs, there are {num_gpus()}")
                continue
            with bench.phase(shape.name):
                bench.shape(shape, clients)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 1 if a phase failed."""
    arguments = arguments_of(sys.argv[1:] if argv is None else argv, __doc__ or "")
    # The machine's memory may grow with use, which Ray would take for a shortage and end its largest process.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    budget = Budget(arguments.budget_s)
    with sigterm_raises(), config_directory(arguments.model) as directory:
        bench = Bench(arguments, model_of(arguments, directory), Document(arguments.json), budget)
        run(arguments, bench)
        bench.document.data["seconds"] = budget.spent()
        bench.document.text(f"{budget.spent():.0f} s in all.")
        bench.document.save()
    return 1 if bench.failed else 0


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """So that what runs is brought down."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    old: Callable[..., object] | int | None = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


if __name__ == "__main__":
    sys.exit(main())
