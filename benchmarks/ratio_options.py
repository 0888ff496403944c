"""The command line of the ratio benchmark, its loads, and which of its runs a budget leaves room for."""

from __future__ import annotations

import argparse
import re
import shlex
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serve_cluster import Shape
from cluster.load import Length, LoadProfile

FOUR_GPUS = "4colocated,1p3d,2p2d,3p1d,tp2p-2d,2p-tp2d"
TWO_GPUS = "2colocated,1p1d"
RUN_EXTRA_S = 2.0
"""Of a run: to plan its requests and to gather what became of them."""
ROUTER_TOKENS_S = 16_000
"""Tokens/s that one router hands on without being what is measured."""
TOKEN_S = 0.02
"""Of an answer, where the cluster keeps up: what the last request of a run is waited for."""


@dataclass(frozen=True, slots=True)
class Part:
    """Requests of one kind."""

    prompt_len: int
    output_len: int
    weight: int = 1

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.prompt_len:,}→{self.output_len}"


@dataclass(frozen=True, slots=True)
class Load:
    """A kind of traffic: one kind of request, or a mix of several, and the rates at which it is sent."""

    name: str
    parts: tuple[Part, ...]
    rates: tuple[float, ...]
    """Requests/s to the whole cluster, the one that is dropped last first."""

    @classmethod
    def parse(cls, text: str) -> Load:
        """From `chat=512:256@8+24`, or `mix=512:256*3+8192:128@4+10`; ValueError for anything else."""
        match = re.fullmatch(r"([\w-]+)=([\d:*+]+)@([\d.+]+)", text)
        parts = [re.fullmatch(r"(\d+):(\d+)(?:\*(\d+))?", part) for part in match[2].split("+")] if match else []
        if match is None or not all(parts):
            raise ValueError(
                "a load is NAME=PROMPT:ANSWER[*WEIGHT][+PROMPT:ANSWER...]@RATE[+RATE...], such as chat=512:256@8+24; "
                f"got {text!r}"
            )
        found = tuple(Part(int(part[1]), int(part[2]), int(part[3] or 1)) for part in parts if part is not None)
        rates = tuple(float(rate) for rate in match[3].split("+"))
        if any(min(part.prompt_len, part.output_len, part.weight) < 1 for part in found) or min(rates) <= 0:
            raise ValueError(f"lengths, weights and rates of a load are above 0, got {text!r}")
        return cls(match[1], found, rates)

    @property
    def title(self) -> str:
        """As tables show it."""
        return f"{self.name} {' + '.join(self.part_title(part) for part in self.parts)}"

    def part_title(self, part: Part) -> str:
        """A part with its share of the requests, where it is not all of them."""
        share = part.weight / sum(each.weight for each in self.parts)
        return part.name if share == 1 else f"{share:.0%} {part.name}"

    @property
    def prompt_len(self) -> int:
        """The mean."""
        weights = sum(part.weight for part in self.parts)
        return round(sum(part.prompt_len * part.weight for part in self.parts) / weights)

    @property
    def longest_answer(self) -> int:
        """Of its parts."""
        return max(part.output_len for part in self.parts)

    def profiles(self, rate: float, seconds: float, spread: float, seed: int) -> list[LoadProfile]:
        """An open loop for each part."""
        weights = sum(part.weight for part in self.parts)
        return [
            LoadProfile(
                rate=rate * part.weight / weights,
                duration_s=seconds,
                input_len=Length(mean=part.prompt_len, spread=round(part.prompt_len * spread)),
                output_len=Length(mean=part.output_len),
                seed=seed + index,
            )
            for index, part in enumerate(self.parts)
        ]


def default_loads(num_gpus: int) -> list[Load]:
    """Rates that a pair of GPUs carries with ease, well, and just so with an 8B model, for as many GPUs."""
    pair = (
        Load("short", (Part(512, 256),), (24.0, 40.0, 8.0)),
        Load("medium", (Part(2048, 256),), (12.0, 18.0, 6.0)),
        Load("long", (Part(8192, 128),), (2.5, 4.0, 1.0)),
        Load("mix", (Part(512, 256, 3), Part(8192, 128)), (10.0, 14.0, 4.0)),
    )
    return [
        replace(
            load, rates=tuple(min(rate * num_gpus / 2, ROUTER_TOKENS_S / load.longest_answer) for rate in load.rates)
        )
        for load in pair
    ]


@dataclass(frozen=True, slots=True)
class Case:
    """One run under load."""

    load: Load
    rate: float
    repeat: int
    """From 1."""

    @property
    def seed(self) -> int:
        """Of its prompts and arrivals: the same for every shape, another one for each repeat."""
        return zlib.crc32(f"{self.load.name} {self.rate} {self.repeat}".encode())

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.load.name} at {self.rate:g}/s, run {self.repeat}"

    def seconds(self, arrivals_s: float) -> float:
        """What it takes, if the cluster keeps up."""
        return arrivals_s + max(3.0, TOKEN_S * self.load.longest_answer) + RUN_EXTRA_S


def cases_of(loads: Sequence[Load], repeats: int) -> list[Case]:
    """All runs of a shape, the one that is dropped last first: repeats go first, then the rates named last."""
    most = max(len(load.rates) for load in loads)
    return [
        Case(load, load.rates[index], repeat)
        for repeat in range(1, repeats + 1)
        for index in range(most)
        for load in loads
        if index < len(load.rates)
    ]


def fitting(cases: Sequence[Case], num_shapes: int, shape_s: float, arrivals_s: float, left_s: float) -> list[Case]:
    """As many cases from the first on as every shape has time for; `shape_s`: of a shape without its cases."""
    share = left_s / num_shapes - shape_s
    kept: list[Case] = []
    for case in cases:
        share -= case.seconds(arrivals_s)
        if share < 0:
            break
        kept.append(case)
    return kept


def arguments_of(argv: Sequence[str], description: str, num_gpus: int) -> argparse.Namespace:
    """Parsed; exits with 2 where they contradict each other. `num_gpus`: of this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ratio", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _what(parser, num_gpus)
    _load(parser, num_gpus)
    parser.add_argument("--ttft-slo-ms", type=float, default=500.0, help="of goodput; default 500")
    parser.add_argument(
        "--itl-slo-ms", type=float, default=50.0, help="of goodput, for 99 %% of a request's; default 50"
    )
    parser.add_argument("--budget-s", type=float, help="seconds for everything; what does not fit is dropped, and said")
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after each run")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing, show what --json wrote to this file")
    parser.add_argument("--plot", type=Path, help="draw the figures into this file (.png, .svg); needs matplotlib")
    parser.add_argument("--logs", type=Path, help="keep each cluster's logs in this folder, SHAPE.tar.gz")
    parser.set_defaults(handover_lens=[1], handover_repeats=1, handover_output_len=1, rest_s=0.0)  # the probes' options
    arguments = parser.parse_args(argv)
    arguments.argv = [shlex.quote(word) for word in argv]
    arguments.slo_ttft_ms, arguments.slo_itl_ms = arguments.ttft_slo_ms, arguments.itl_slo_ms
    arguments.loads = arguments.loads or default_loads(max(shape.num_gpus for shape in arguments.shapes))
    if len({load.name for load in arguments.loads}) < len(arguments.loads):
        parser.error("two loads have the same name")
    if arguments.only:
        arguments.loads = [load for load in arguments.loads if load.name in arguments.only.split(",")]
    if arguments.repeats < 1 or not arguments.loads:
        parser.error("there must be at least one repeat and one load")
    return arguments


def _what(parser: argparse.ArgumentParser, num_gpus: int) -> None:
    default = FOUR_GPUS if num_gpus >= 4 else TWO_GPUS
    parser.add_argument("--shapes", type=_shapes, default=_shapes(default), help=f"default here: {default}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", type=Path, help="a directory with another config.json; weights are made up still")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.KEY=VALUE", help="into the YAML: --set transfer.max_ctas=4"
    )
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure what each device reaches at best")
    parser.add_argument("--answers", type=int, default=16, help="answers compared between shapes; default 16")
    parser.add_argument("--answer-len", type=int, default=64, help="tokens of each of them; default 64")
    parser.add_argument(
        "--answer-prompts", default="300:250", metavar="FIRST:STEP", help="tokens of their prompts; default 300:250"
    )


def _load(parser: argparse.ArgumentParser, num_gpus: int) -> None:
    shown = " ".join(f"{load.name}={load.title.partition(' ')[2]}".replace("%", "%%") for load in default_loads(2))
    parser.add_argument(
        "--load", dest="loads", action="append", type=_one_load,
        metavar="NAME=PROMPT:ANSWER[*WEIGHT][+...]@RATE[+RATE]",
        help=f"default: {shown}, with rates for the number of GPUs; the rate named last is dropped first",
    )  # fmt: skip
    parser.add_argument("--only", help="of the loads, those of these names; comma-separated")
    parser.add_argument("--spread", type=float, default=0.25, help="of a prompt's length, as a share; default 0.25")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals at each rate; default 30")
    parser.add_argument(
        "--tail-s", type=float, default=20.0, help="longest wait for what is in flight then; default 20"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warmup-s", type=float, default=4.0, help="of all loads at once, first; default 4")
    parser.add_argument("--clients", type=int, help="client processes; default: one for each 6 requests/s")


def _shapes(text: str) -> list[Shape]:
    try:
        return [Shape.parse(word) for word in text.split(",") if word]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _one_load(text: str) -> Load:
    try:
        return Load.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
