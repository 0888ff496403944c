"""Which ratio of prefill to decode wins: the whole cluster in several shapes on the GPUs of one host, load by load.

    python -m benchmarks.ratio --json ratio.json --plot ratio.png
    python -m benchmarks.ratio --shapes 2colocated,1p1d --budget-s 1100 --seconds 30
    python -m benchmarks.ratio --load chat=512:256@8+24 --load mix=512:256*3+8192:128@4 --itl-slo-ms 20
    python -m benchmarks.ratio --from ratio.json --itl-slo-ms 20 --plot ratio.png
    python -m benchmarks.ratio --device cpu --model DIRECTORY --shapes 1p1d,1colocated --load tiny=64:8@4 --seconds 2

A shape is NpMd (prefill and decode workers), Ncolocated (workers that do both), or with ranks, tp2p-2d: one prefill
worker of tensor parallelism 2 and two decode workers; 2p-tp2d: two prefill workers and one decode worker of two ranks.
A load is NAME=PROMPT:ANSWER@RATE+RATE, with several kinds of request as PROMPT:ANSWER*WEIGHT+PROMPT:ANSWER.

Each shape's cluster is started once. While it is idle the same greedy prompts are answered, to be compared between
shapes; then Poisson arrivals are sent at each rate, the same ones to every shape. Models have the shapes of
Llama-3.1-8B and random weights; prompts are random, so no prefix is shared. What --budget-s leaves no time for is
dropped from every shape alike, repeats first, then the rates that a load names last, and said.

--json holds everything measured after each run, so that one that is cut off leaves what it had; --from shows it again,
with another SLO if need be. Progress goes to stderr, the tables to stdout at the end.
"""

from __future__ import annotations

if __name__ == "ratio":  # a script of this folder was run by its path, and found this file in the package's stead
    raise ImportError("run the benchmarks from the repository's root as modules: python -m benchmarks.NAME")

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ratio_report
from benchmarks.budget import Budget
from benchmarks.llama_8b import config_directory
from benchmarks.ratio_options import Case, Load, arguments_of, cases_of, fitting
from benchmarks.ratio_plot import plot
from benchmarks.serve import DOWN_S, SETTLE_S, START_S, WARM_SEED, Bench, sigterm_raises
from benchmarks.serve_clients import AnswersJob, Clients, LoadJob, num_clients
from benchmarks.serve_cluster import Cluster, Shape, cluster_yaml, running
from benchmarks.serve_figures import LoadFigures
from benchmarks.serve_options import model_of, slo_of
from benchmarks.serve_probes import ROOT, num_gpus
from benchmarks.serve_report import Document, ceilings_texts
from benchmarks.split_vs_colocated import machine
from cluster.load import UNFINISHED

CEILINGS_S = 20.0
ANSWERS_S = 15.0
"""Comparing answers and warming up, of each shape."""
ANSWER_SEED = 7
LEAST_START_S = 60.0


class Ratio:
    """One run: its shapes one after another, each with its own share of the time."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._arguments = bench.arguments
        self._data = bench.document.data
        self._overhead_s = START_S[bench.model.device] + ANSWERS_S + DOWN_S

    def run(self, clients: Clients) -> None:
        """All shapes; what fails or does not fit is noted."""
        arguments, bench = self._arguments, self._bench
        shapes = [shape for shape in arguments.shapes if self._fits_machine(shape)]
        every = cases_of(arguments.loads, arguments.repeats)
        cases = fitting(every, len(shapes), self._overhead_s, arguments.seconds, bench.budget.left()) if shapes else []
        if dropped := every[len(cases) :]:
            self._drop(f"of every shape, for want of time: {', '.join(case.name for case in dropped)}")
        for index, shape in enumerate(shapes):
            until = bench.budget.left() - bench.budget.left() / (len(shapes) - index)
            with bench.phase(shape.name):
                if cases or arguments.answers:
                    self._shape(shape, cases, clients, keep_s=until)

    def _fits_machine(self, shape: Shape) -> bool:
        if self._arguments.device == "cpu" or shape.num_gpus <= num_gpus():
            return True
        self._bench.failed = True
        self._drop(f"{shape.name}, which needs {shape.num_gpus} GPUs of {num_gpus()}")
        return False

    def _drop(self, what: str) -> None:
        self._bench.say(f"dropped: {what}")
        self._data.setdefault("dropped", []).append(what)
        self._bench.document.save()

    def _shape(self, shape: Shape, cases: Sequence[Case], clients: Clients, *, keep_s: float) -> None:
        """A cluster's whole life; `keep_s`: what it leaves of the budget to those behind it."""
        bench, document = self._bench, self._bench.document
        if bench.budget.left() - keep_s < self._overhead_s:
            self._drop(
                f"{shape.name}: {self._overhead_s:.0f} s needed, {bench.budget.left() - keep_s:.0f} s left for it"
            )
            return
        content = cluster_yaml(shape, bench.model)
        timeout_s = min(300.0, max(LEAST_START_S, bench.budget.left() - keep_s - DOWN_S))
        logs = self._arguments.logs
        with running(content, bench.say, timeout_s=timeout_s, name=shape.name, keep_logs=logs) as cluster:
            shown = {"shape": shape.name, "num_gpus": shape.num_gpus, "yaml": content, "errors": cluster.errors}
            shown |= {"start_s": cluster.start_s, "steps": cluster.steps}
            self._data.setdefault("shapes", []).append(shown)
            document.save()
            self._answers(shown, cluster, clients)
            self._warm_up(cluster, clients)
            for case in cases:
                cluster.check()
                if bench.budget.left() - keep_s < case.seconds(self._arguments.seconds) + DOWN_S:
                    self._drop(f"{shape.name}, {case.name}: its time was up")
                    continue
                self._measure(shape, case, cluster, clients, keep_s)
        document.save()

    def _answers(self, shown: dict[str, Any], cluster: Cluster, clients: Clients) -> None:
        """Greedy answers to the same prompts in every shape."""
        arguments = self._arguments
        if not arguments.answers:
            return
        first, step = map(int, arguments.answer_prompts.split(":"))
        job = AnswersJob(
            address=cluster.address,
            prompt_lens=tuple(first + index * step for index in range(arguments.answers)),
            output_len=arguments.answer_len,
            limit_s=2 * ANSWERS_S,
            seed=ANSWER_SEED,
        )
        answers = clients.answers(job)
        shown["answers"] = [answer.tokens for answer in answers]
        shown["handed_over"] = sum(answer.handed_over for answer in answers)
        self._bench.say(f"{shown['shape']}: {len(answers)} answers, {shown['handed_over']} handed over")
        self._bench.document.save()

    def _job(self, load: Load, rate: float, seconds: float, seed: int, cluster: Cluster, limit_s: float) -> LoadJob:
        first, *beside = load.profiles(rate, seconds, self._arguments.spread, seed)
        return LoadJob(address=cluster.address, profile=first, beside=tuple(beside), limit_s=limit_s)

    def _warm_up(self, cluster: Cluster, clients: Clients) -> None:
        """All loads at once, each at a fraction of its rate: short, and not counted."""
        arguments, seconds = self._arguments, self._arguments.warmup_s
        if seconds <= 0:
            return
        first, *others = [
            self._job(load, min(load.rates) / len(arguments.loads), seconds, WARM_SEED, cluster, seconds + 60.0)
            for load in arguments.loads
        ]
        beside = first.beside + tuple(profile for job in others for profile in job.profiles)
        job = LoadJob(address=first.address, profile=first.profile, beside=beside, limit_s=first.limit_s)
        records = clients.load(job).load.records
        failed = [record for record in records if record.failure is not None]
        self._bench.say(f"warm-up: {len(records)} requests, {len(failed)} failed")
        if failed:
            self._bench.note(f"the warm-up's first failure: {failed[0].failure}: {failed[0].failure_message}")

    def _measure(self, shape: Shape, case: Case, cluster: Cluster, clients: Clients, keep_s: float) -> None:
        arguments, bench = self._arguments, self._bench
        limit_s = arguments.seconds + min(arguments.tail_s, max(3.0, bench.budget.left() - keep_s - arguments.seconds))
        num = min(num_clients(case.rate, os.cpu_count() or 1), clients.num)
        job = self._job(case.load, case.rate, arguments.seconds, case.seed, cluster, limit_s)
        result = clients.load(job, num)
        figures = LoadFigures.of(
            result,
            bench.slo,
            shape=shape.name,
            prompt_len=case.load.prompt_len,
            rate=case.rate,
            repeat=case.repeat,
            num_clients=num,
        )
        bounds = [kept for record in result.load.records if (kept := ratio_report.kept_bounds(record)) is not None]
        parts = ratio_report.parts_json(result, [part.prompt_len for part in case.load.parts])
        self._data.setdefault("runs", []).append(
            {"load": case.load.name, **figures.as_json(), "parts": parts, "requests": bounds}
        )
        bench.document.save()
        report, ttft, itl = figures.report, figures.report.ttft_s, figures.report.itl_s
        bench.say(
            f"{shape.name}, {case.name}: {report.num_completed} answered, {figures.num_failed} failed, "
            f"TTFT p50 / p99 {ttft and round(ttft.p50 * 1e3)} / {ttft and round(ttft.p99 * 1e3)} ms, "
            f"ITL p99 {itl and round(itl.p99 * 1e3, 1)} ms, goodput {report.goodput_per_s:.2f}/s"
        )
        for message in report.failure_messages.values():
            bench.say(f"  first failure of its kind: {message}")
        if UNFINISHED in report.failures:
            time.sleep(SETTLE_S)


def commit() -> str:
    """Of this tree; `unknown` where it is no git checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the figures must know."""
    return {
        "command": ("python -m benchmarks.ratio " + " ".join(arguments.argv)).strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "num_gpus": num_gpus(),
        "commit": commit(),
        "seconds": arguments.seconds,
        "spread": arguments.spread,
        "loads": [asdict(load) | {"title": load.title} for load in arguments.loads],
    }


def measure(arguments: argparse.Namespace, bench: Bench) -> None:
    """Everything, into the document's data."""
    bench.document.data |= about(arguments)
    if not arguments.no_ceilings:
        with bench.phase("ceilings"):
            bench.probe(["ceilings"])
    rates = [rate for load in arguments.loads for rate in load.rates]
    with Clients(arguments.clients or num_clients(max(rates), os.cpu_count() or 1)) as clients:
        Ratio(bench).run(clients)


def show(data: dict[str, Any], arguments: argparse.Namespace, document: Document) -> None:
    """Tables, words, and the plot."""
    slo = slo_of(arguments)
    document.text(f"`{data['command']}`, {data['date']}, {data['machine']}, {data['num_gpus']} GPUs, {data['commit']}")
    for text in ceilings_texts(data.get("probes", [])) if arguments.source is not None else []:
        document.text(text)
    ratio_report.show(data, slo, document)
    if arguments.plot is not None:
        plot(data, slo, arguments.plot)
        document.text(f"Plot: {arguments.plot}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 1 if a part failed."""
    arguments = arguments_of(sys.argv[1:] if argv is None else argv, __doc__ or "", num_gpus())
    if arguments.source is not None:
        show(json.loads(Path(arguments.source).read_text()), arguments, Document(None))
        return 0
    # The machine's memory may grow with use, which Ray would take for a shortage and end its largest process.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    with sigterm_raises(), config_directory(arguments.model) as directory:
        document = Document(arguments.json)
        bench = Bench(arguments, model_of(arguments, directory), document, Budget(arguments.budget_s))
        try:
            measure(arguments, bench)
        finally:
            document.data["all_s"] = bench.budget.spent()
            document.save()
            if "loads" in document.data:
                show(document.data, arguments, document)
            document.text(f"{bench.budget.spent():.0f} s in all.")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
