"""Conversations with growing histories on one cluster, policy by policy: what is computed, how soon it answers.

Starts a cluster of two prefill and two decode workers for each policy in turn (in a run directory of its own), and
has some people talk to it: each says something, reads the answer, and goes on with the whole history; all talks begin
with the same words. What was computed is told by the workers' own counters.

    python -m benchmarks.multi_turn
    python -m benchmarks.multi_turn --model DIRECTORY --policies kv_aware,round_robin --turns 6 --said 64 --json
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.split_vs_colocated import EXAMPLE, machine, running
from cluster.client import Client, Endpoint
from cluster.health import gather
from cluster.load_report import Spread
from cluster.run_dir import RunDir
from protos.inference_pb2 import GenerateRequest, Sampling, TokenIds

POLICIES: dict[str, dict[str, Any]] = {
    "kv_aware": {"policy": "kv_aware"},
    "kv_aware without local prefill": {"policy": "kv_aware", "local_prefill": {"max_share": 0.0}},
    "least_loaded": {"policy": "least_loaded", "local_prefill": {"max_share": 0.0}},
    "round_robin": {"policy": "round_robin", "local_prefill": {"max_share": 0.0}},
}


@dataclass(frozen=True)
class Talk:
    """What all conversations are like; lengths in tokens."""

    talks: int
    at_once: int
    turns: int
    system: int
    said: int
    answer: int
    pause_s: float
    seed: int


@dataclass(frozen=True)
class Figures:
    """Of one policy."""

    seconds: float
    prompt_tokens: int
    computed_tokens: int
    """Of prompts, by all workers."""
    local_tokens: int
    """Of these, by decode workers."""
    ttft_s: Spread
    itl_s: Spread


class Audience:
    """Those who talk to one cluster."""

    def __init__(self, client: Client, shape: Talk, vocab_size: int) -> None:
        self.prompt_tokens = 0
        self.ttfts: list[float] = []
        self.itls: list[float] = []
        self._client = client
        self._shape = shape
        self._vocab_size = vocab_size
        self._turn = asyncio.Semaphore(shape.at_once)

    async def talk(self, number: int) -> None:
        """One conversation."""
        shape = self._shape
        system, dice = random.Random(shape.seed), random.Random(f"{shape.seed} {number}")
        history = self._words(system, shape.system)
        for _ in range(shape.turns):
            history += self._words(dice, shape.said)
            async with self._turn:
                history += await self._ask(history)
            await asyncio.sleep(dice.expovariate(1 / shape.pause_s))

    async def _ask(self, prompt: list[int]) -> list[int]:
        request = GenerateRequest(
            token_ids=TokenIds(ids=prompt), sampling=Sampling(max_tokens=self._shape.answer, ignore_eos=True)
        )
        self.prompt_tokens += len(prompt)
        answer: list[int] = []
        last = time.monotonic()
        async for event in self._client.generate(request):
            if event.WhichOneof("event") == "tokens":
                now = time.monotonic()
                (self.itls if answer else self.ttfts).append(now - last)
                last = now
                answer += event.tokens.token_ids
        return answer

    def _words(self, dice: random.Random, count: int) -> list[int]:
        return dice.choices(range(10, self._vocab_size), k=count)


async def measure(endpoint: Endpoint, run_dir: RunDir, shape: Talk) -> Figures:
    """Have everybody talk, and read the counters before and behind."""
    async with Client(endpoint) as client:
        vocab_size = (await client.list_models())[0].vocab_size
        before = await asyncio.to_thread(computed_tokens, run_dir)
        audience = Audience(client, shape, vocab_size)
        began = time.monotonic()
        await asyncio.gather(*(audience.talk(number) for number in range(shape.talks)))
        seconds = time.monotonic() - began
        after = await asyncio.to_thread(computed_tokens, run_dir)
    computed = {pool: after[pool] - before[pool] for pool in after}
    ttfts, itls = Spread.of(audience.ttfts), Spread.of(audience.itls)
    assert ttfts is not None
    assert itls is not None
    return Figures(seconds, audience.prompt_tokens, sum(computed.values()), computed["decode"], ttfts, itls)


def computed_tokens(run_dir: RunDir) -> dict[str, int]:
    """Tokens that each pool has computed and that were no step's own."""
    computed = {"prefill": 0, "decode": 0}
    for member in gather(run_dir).members:
        if member.kind == "worker":
            numbers = member.numbers
            computed[member.pool] += int(numbers["computed_tokens_total"] - numbers["generated_tokens_total"])
    return computed


def table(figures: dict[str, Figures]) -> str:
    """As Markdown; latencies in ms."""
    lines = ["| policy | seconds | prompt tokens | computed | by decode workers | TTFT p50 / p99 | ITL p50 / p99 |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, one in figures.items():
        ttft, itl = (f"{each.p50 * 1e3:.1f} / {each.p99 * 1e3:.1f}" for each in (one.ttft_s, one.itl_s))
        counts = f"{one.prompt_tokens:,} | {one.computed_tokens:,} | {one.local_tokens:,}"
        lines.append(f"| {name} | {one.seconds:.1f} | {counts} | {ttft} | {itl} |")
    return "\n".join(lines)


@click.command()
@click.option("-f", "--config", type=click.Path(exists=True, path_type=Path), default=EXAMPLE)
@click.option("--model", help="Another model than the YAML's; of a config.json alone weights are made up.")
@click.option("--policies", default=",".join(POLICIES), help="Some of: " + "; ".join(POLICIES))
@click.option("--talks", type=int, default=8, show_default=True)
@click.option("--at-once", type=int, default=3, show_default=True, help="Answers awaited at the same time.")
@click.option("--turns", type=int, default=8, show_default=True)
@click.option("--system", type=int, default=256, show_default=True, help="Tokens that all talks begin with.")
@click.option("--said", type=int, default=32, show_default=True)
@click.option("--answer", type=int, default=64, show_default=True)
@click.option("--pause-s", type=float, default=0.3, show_default=True, help="Mean time to read an answer.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of Markdown.")
def main(config: Path, model: str | None, policies: str, as_json: bool, **shape: Any) -> None:
    """Measure each policy under the same conversations."""
    base = yaml.safe_load(config.read_text())
    base["prefill"]["workers"] = base["decode"]["workers"] = 2
    if model is not None:
        base["model"] = {"path": model, "load_format": "dummy", "dtype": "float32"}
    figures: dict[str, Figures] = {}
    for name in (each.strip() for each in policies.split(",") if each.strip()):
        wanted = {**base, "router": {"port": 0, **POLICIES[name]}}
        with running(wanted) as cluster:
            click.echo(f"{name}: measuring at {cluster.endpoint.address}", err=True)
            figures[name] = asyncio.run(measure(cluster.endpoint, cluster.run_dir, Talk(**shape)))
    date = time.strftime("%Y-%m-%d")
    if as_json:
        reports = {name: asdict(one) for name, one in figures.items()}
        click.echo(json.dumps({"date": date, "machine": machine(), "talk": shape, "figures": reports}))
        return
    click.echo(f"`python -m benchmarks.multi_turn {' '.join(sys.argv[1:])}`, {date}, {machine()}\n\n{table(figures)}")


if __name__ == "__main__":
    main()
