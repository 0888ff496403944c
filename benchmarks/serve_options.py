"""The command line of the serving benchmark, and what is measured of each shape by it."""

from __future__ import annotations

import argparse
import shlex
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serve_cluster import Model, Shape
from benchmarks.serve_probes import num_gpus
from benchmarks.serve_reference import OUTPUT_LEN, PROMPT_LEN, SPREAD
from cluster.load_report import Slo

PHASES = ("ceilings", "engine", "handover", "load")
SPLIT_RATES = (1.0, 6.0, 12.0, 18.0)
COLOCATED_RATES = (*SPLIT_RATES, 24.0)


@dataclass(frozen=True, slots=True)
class LoadCase:
    """One run under load."""

    prompt_len: int
    rate: float
    repeat: int
    """From 1."""

    @property
    def seed(self) -> int:
        """Of its prompts and arrivals: the same for every shape, another one for each repeat."""
        return zlib.crc32(f"{self.prompt_len} {self.rate} {self.repeat}".encode())


@dataclass(frozen=True, slots=True)
class PromptLen:
    """A mean length of prompts, and its own rates where it has any."""

    tokens: int
    rates: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> PromptLen:
        """From `2048`, or `8192@1+2` (at 1 and 2 requests/s)."""
        tokens, _, rates = text.partition("@")
        return cls(int(tokens), tuple(float(rate) for rate in rates.split("+") if rate))


def cases_of(arguments: argparse.Namespace, shape: Shape) -> list[LoadCase]:
    """Every rate once, then every rate again: what a budget cuts off are repeats."""
    default = SPLIT_RATES if shape.mode == "split" else COLOCATED_RATES
    return [
        LoadCase(length.tokens, rate, repeat)
        for repeat in range(1, arguments.repeats + 1)
        for length in arguments.prompt_lens
        for rate in (length.rates or arguments.rates or default)
    ]


def model_of(arguments: argparse.Namespace, directory: Path) -> Model:
    """What is served."""
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    gpus = num_gpus() if arguments.device == "cuda" else 0
    return Model(directory=directory, device=arguments.device, dtype=dtype, num_gpus=gpus, overrides=arguments.set)


def slo_of(arguments: argparse.Namespace) -> Slo:
    """What goodput counts."""
    return Slo(ttft_s=arguments.slo_ttft_ms / 1e3, itl_s=arguments.slo_itl_ms / 1e3)


def arguments_of(argv: Sequence[str], description: str) -> argparse.Namespace:
    """Parsed; exits with 2 where they contradict each other."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _what(parser)
    _load(parser)
    _handover(parser)
    parser.add_argument("--budget-s", type=float, help="seconds for everything; what does not fit is skipped")
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after each row")
    parser.add_argument("--logs", type=Path, help="keep each cluster's logs in this folder, SHAPE.tar.gz")
    arguments = parser.parse_args(argv)
    arguments.argv = [shlex.quote(word) for word in argv]
    arguments.comparable = (arguments.output_len, arguments.spread) == (OUTPUT_LEN, SPREAD)
    if unknown := set(arguments.phases) - set(PHASES):
        parser.error(f"--phases: {', '.join(sorted(unknown))}: choose from {', '.join(PHASES)}")
    if arguments.repeats < 1 or arguments.handover_repeats < 1:
        parser.error("--repeats and --handover-repeats must be at least 1")
    return arguments


def _what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--phases", type=_words, default=list(PHASES), help=f"comma-separated; default: {','.join(PHASES)}"
    )
    parser.add_argument("--shapes", type=_shapes, default=_shapes("1p1d,2colocated"), help="default: 1p1d,2colocated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", type=Path, help="a directory with another config.json; weights are made up still")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.KEY=VALUE", help="into the YAML: --set transfer.max_ctas=4"
    )


def _load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rates", type=_numbers, help="requests/s; default: 1,6,12,18, and 24 where colocated")
    parser.add_argument(
        "--prompt-lens",
        type=_prompt_lens,
        default=[PromptLen(PROMPT_LEN)],
        help="default: 2048; 8192@1 has a rate of its own",
    )
    parser.add_argument("--spread", type=float, default=SPREAD, help="of a prompt's length, as a share; default 0.25")
    parser.add_argument("--output-len", type=int, default=OUTPUT_LEN)
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals at each rate; default 60")
    parser.add_argument(
        "--tail-s", type=float, default=60.0, help="longest wait for what is in flight then; default 60"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warmup-s", type=float, default=4.0, help="of load before the first rate; default 4")
    parser.add_argument("--clients", type=int, help="client processes; default: one for each 6 requests/s")
    parser.add_argument("--slo-ttft-ms", type=float, default=500.0)
    parser.add_argument("--slo-itl-ms", type=float, default=50.0)


def _handover(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--handover-lens", type=_integers, default=[2048, 8192], help="prompt tokens; default: 2048,8192"
    )
    parser.add_argument("--handover-repeats", type=int, default=8)
    parser.add_argument("--handover-output-len", type=int, default=32)
    parser.add_argument("--rest-s", type=float, default=0.3, help="rest of the GPU before each of them; default 0.3")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[float]:
    return [float(word) for word in _words(text)]


def _integers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _prompt_lens(text: str) -> list[PromptLen]:
    return [PromptLen.parse(word) for word in _words(text)]


def _shapes(text: str) -> list[Shape]:
    try:
        return [Shape.parse(word) for word in _words(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
