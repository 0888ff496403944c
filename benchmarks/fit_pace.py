"""Turns a measurement of one engine into the `pace` of a rehearsal: a fragment of YAML, ready to be pasted.

    python -m benchmarks.engine --json result.json        # on the hardware that is to be rehearsed
    python -m benchmarks.fit_pace result.json

The costs of a step (see engine/pace.py) are fitted by least squares of the relative errors, none below 0: those of the
prefill pool to the cases of prompts, those of the decode pool to the cases of decode steps; what a pool does rarely
(a decode worker that computes a prompt itself) takes its cost from the other's cases.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from benchmarks.engine_bench import DEFAULT_STEP_TOKENS
from benchmarks.engine_floor import Shape
from benchmarks.llama_8b import LLAMA_8B
from engine.pace import PaceOptions, StepWork

ITEM_BYTES = {"float32": 4}
FIXED, PROMPT, TOKEN, KV = range(4)


class FitError(ValueError):
    """The measurement does not say enough."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure: the steps it took, and seconds for all of them."""

    name: str
    steps: tuple[StepWork, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The paces of the two pools, and by how much each figure is missed (1: predicted / measured is exact)."""

    prefill: PaceOptions
    decode: PaceOptions
    ratios: dict[str, float]


def prompt_steps(num_seqs: int, length: int, step_tokens: int, slack: int) -> tuple[StepWork, ...]:
    """How an engine cuts prompts that come together (see engine/step_budget.py)."""
    steps, left = [], [length] * num_seqs
    while any(left):
        room, tokens, kv_tokens = step_tokens, 0, 0
        for index, missing in enumerate(left):
            taken = missing if room > 0 and missing <= room + slack else min(room, missing)
            if taken > 0:
                left[index] -= taken
                room, tokens, kv_tokens = room - taken, tokens + taken, kv_tokens + length - left[index]
        steps.append(StepWork(prompt_tokens=tokens, tokens=0, kv_tokens=kv_tokens))
    return tuple(steps)


def figures_of(report: Mapping[str, Any]) -> list[Measured]:
    """The figures in the JSON of benchmarks.engine; FitError if that is something else."""
    try:
        settings = report["about"]["settings"]
        on_gpu = settings["device"] != "cpu"
        step_tokens = settings["max_step_tokens"] or DEFAULT_STEP_TOKENS[settings["device"]]
        figures = []
        for case in report["cases"]:
            for milliseconds, context in zip(case["measured_ms"], case["context"], strict=True):
                if case["kind"] == "decode":
                    num = case["num_seqs"]
                    steps = (StepWork(prompt_tokens=0, tokens=num, kv_tokens=round(num * context)),)
                else:
                    steps = prompt_steps(
                        case["num_seqs"], case["length"], step_tokens, step_tokens // 4 if on_gpu else 0
                    )
                figures.append(Measured(case["name"], steps, milliseconds / 1e3))
        return figures
    except (KeyError, TypeError) as error:
        raise FitError(f"this is not what `python -m benchmarks.engine --json` writes: {error!r}") from error


def kv_bytes_of(report: Mapping[str, Any]) -> int:
    """Bytes of one token's KV in the model that was measured; files that do not say so are of Llama-3.1-8B's shapes."""
    itemsize = ITEM_BYTES.get(report["about"]["settings"]["dtype"], 2)
    return int(report["about"].get("kv_bytes_per_token") or Shape.from_header(LLAMA_8B, itemsize).kv_bytes_per_token)


def fit(figures: Sequence[Measured], kv_bytes: int) -> Fit:
    """The paces that miss the figures least."""
    prompts = [each for each in figures if each.steps[0].prompt_tokens]
    decodes = [each for each in figures if not each.steps[0].prompt_tokens]
    if len(prompts) < 2 or len(decodes) < 2:
        raise FitError(
            f"a pace needs at least two figures of prompts and two of decode steps, got {len(prompts)} and "
            f"{len(decodes)}: measure more --cases"
        )
    prefill = _least_squares(prompts, kv_bytes, (FIXED, PROMPT, KV), np.zeros(4))
    decode = _least_squares(decodes, kv_bytes, (FIXED, TOKEN, KV), np.zeros(4))
    decode = _least_squares(prompts, kv_bytes, (PROMPT,), decode)
    prefill[TOKEN] = decode[TOKEN]
    pools = {pool: _options(costs, kv_bytes) for pool, costs in (("prefill", prefill), ("decode", decode))}
    ratios = {}
    for each in figures:
        pace = pools["prefill" if each in prompts else "decode"]
        ratios[each.name] = sum(pace.step_s(step, kv_bytes) for step in each.steps) / each.seconds
    return Fit(pools["prefill"], pools["decode"], ratios)


def _least_squares(
    figures: Sequence[Measured], kv_bytes: int, columns: tuple[int, ...], given: np.ndarray
) -> np.ndarray:
    """Costs in ms, µs, µs and seconds a GB; those of `columns` are fitted and the others given. With so few columns
    the best solution without negative costs is found by trying every set of them."""
    rows = np.array([_row(each, kv_bytes) for each in figures])
    seconds = np.array([each.seconds for each in figures])
    wanted = 1.0 - rows @ given / seconds
    scaled = rows / seconds[:, None]
    best, least = given, float("inf")
    for count in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, count):
            solution = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=None)[0]
            error = float(np.sum((scaled[:, chosen] @ solution - wanted) ** 2))
            if (solution >= 0).all() and error < least - 1e-12:
                best, least = given.copy(), error
                best[list(chosen)] = solution
    return best


def _row(figure: Measured, kv_bytes: int) -> list[float]:
    """Seconds for each unit of each cost."""
    return [
        len(figure.steps) / 1e3,
        sum(step.prompt_tokens for step in figure.steps) / 1e6,
        sum(step.tokens for step in figure.steps) / 1e6,
        sum(step.kv_tokens for step in figure.steps) * kv_bytes / 1e9,
    ]


def _options(costs: np.ndarray, kv_bytes: int) -> PaceOptions:
    fixed, prompt, token, kv = (float(cost) for cost in costs)
    return PaceOptions(
        fixed_ms=round(fixed, 3),
        prompt_token_us=round(prompt, 3),
        token_us=round(token, 3),
        kv_gb_per_s=float(f"{1 / kv:.4g}") if kv > 0 else None,
        kv_bytes_per_token=kv_bytes,
    )


def fragment(found: Fit) -> str:
    """The YAML."""
    pools = {"prefill": found.prefill, "decode": found.decode}
    plain = {pool: {"pace": {k: v for k, v in asdict(pace).items() if v is not None}} for pool, pace in pools.items()}
    return str(yaml.safe_dump(plain, sort_keys=False))


@click.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(result: Path) -> None:
    """Print the paces that fit a RESULT.json of `python -m benchmarks.engine --json` best, as YAML."""
    try:
        report = json.loads(result.read_text())
        found = fit(figures_of(report), kv_bytes_of(report))
    except (FitError, json.JSONDecodeError) as error:
        raise click.ClickException(f"{result}: {error}") from error
    about = report["about"]
    click.echo(f"# {about.get('device_name', 'unknown hardware')}, measured on {about.get('date', 'an unknown day')}")
    for name, ratio in found.ratios.items():
        click.echo(f"#   {name:<20} fitted / measured {ratio:.2f}")
    click.echo(fragment(found), nl=False)


if __name__ == "__main__":
    main()
