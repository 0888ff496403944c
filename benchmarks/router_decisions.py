"""What one choice of workers costs a router: by the size of the fleet, and of what its caches hold.

Workers are simulated: they describe themselves and send block events as real ones would, into the router's own index
and policies. Conversations begin with one of a few system prompts; each is held by one prefill and one decode worker.
"""

from __future__ import annotations

import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.block_hash import block_hashes, root_hash
from engine.block_log import key_of
from protos import worker_pb2 as pb
from router.chooser import Chooser
from router.config import RouterConfig
from router.info import WorkerInfo, WorkerState
from router.policies import Demand
from router.prefix_index import PrefixIndex
from router.roster import Roster

BLOCK_SIZE = 128
"""As on GPUs, of which a thousand workers are."""
SYSTEM_TOKENS = 512
NUM_SYSTEMS = 8
HISTORY_TOKENS = 2048
"""Of a conversation that is held somewhere; a prompt of it has a block more."""
EVENTS_BLOCKS = 4096
"""Blocks told at once."""
NUM_CHOICES = 2000
TARGET_US = 200.0
Prompts = Callable[[], list[int]]


@dataclass
class Fleet:
    """Workers that exist only as what is known of them."""

    infos: list[WorkerInfo]
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    roster: Roster = field(init=False)

    def __post_init__(self) -> None:
        self.roster = Roster(self.infos)

    def workers(self) -> list[WorkerInfo]:
        """All of them."""
        return self.infos


@dataclass(frozen=True)
class Choices:
    """Times of one kind of prompt, in microseconds."""

    what: str
    p50: float
    p99: float


@dataclass(frozen=True)
class Row:
    """One size of fleet and index."""

    num_workers: int
    num_blocks: int
    index_mib: float
    blocks_per_s: float
    """Taken in, of block events."""
    choices: list[Choices]


def make_fleet(num_workers: int, dice: random.Random) -> Fleet:
    """Half of them for each role, with rates and loads of their own."""
    layout = pb.Layout(
        model_hash="m", num_layers=32, block_size=BLOCK_SIZE, num_kv_heads=8, head_dim=128, dtype="bfloat16"
    )
    described = pb.WorkerDescription(layout=layout, num_blocks=1 << 20, max_model_len=32768, max_running=256)
    infos = []
    for index in range(num_workers):
        role = "prefill" if index % 2 else "decode"
        info = WorkerInfo(f"{role}-{index}", 1, role, "", state=WorkerState.READY, description=described)
        info.pair_bytes_per_s = 2e11
        info.stats.num_blocks, info.stats.free_blocks = 1 << 20, dice.randint(1 << 18, 1 << 20)
        info.stats.num_running, info.stats.waiting_tokens = dice.randint(0, 100), dice.randint(0, 8192)
        info.stats.prompt_tokens_per_s = dice.uniform(2e4, 4e4)
        infos.append(info)
    return Fleet(infos)


def random_tokens(dice: random.Random, count: int) -> list[int]:
    return dice.choices(range(128_000), k=count)


def fill(fleet: Fleet, num_blocks: int, dice: random.Random, prompts: Sequence[list[int]]) -> float:
    """Have workers tell of so many blocks in all: those of the prompts, and others; blocks a second."""
    root = root_hash("m", "bfloat16", BLOCK_SIZE)
    own: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        keys = [key_of(each) for each in block_hashes(prompt, BLOCK_SIZE, root)]
        for index in (2 * number, 2 * number + 1):
            own.setdefault(index % len(fleet.infos), []).extend(keys)
    each = num_blocks // len(fleet.infos)
    spent, told = 0.0, 0
    for index, info in enumerate(fleet.infos):
        keys = own.get(index, [])
        keys += [dice.getrandbits(64) for _ in range(each - len(keys))]
        for number, start in enumerate(range(0, len(keys), EVENTS_BLOCKS)):
            part = keys[start : start + EVENTS_BLOCKS]
            events = pb.BlockEvents(after=number, number=number + 1, stored=part, is_snapshot=not number)
            began = time.perf_counter()
            fleet.prefixes.apply(info, events)
            spent += time.perf_counter() - began
            told += len(part)
    return told / spent


def measure(num_workers: int, num_blocks: int, seed: int = 0) -> Row:
    """One row."""
    dice = random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fleet = make_fleet(num_workers, dice)
    systems = [random_tokens(dice, SYSTEM_TOKENS) for _ in range(NUM_SYSTEMS)]
    held = [dice.choice(systems) + random_tokens(dice, HISTORY_TOKENS - SYSTEM_TOKENS) for _ in range(num_workers)]
    rate = fill(fleet, num_blocks, dice, held)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    chooser = Chooser(fleet, RouterConfig(), split=True)
    kinds: dict[str, Prompts] = {
        "nothing held": lambda: random_tokens(dice, HISTORY_TOKENS + BLOCK_SIZE),
        "system prompt held": lambda: dice.choice(systems) + random_tokens(dice, HISTORY_TOKENS - SYSTEM_TOKENS),
        "all but the last block held": lambda: dice.choice(held) + random_tokens(dice, BLOCK_SIZE),
    }
    choices = [Choices(what, *_times(chooser, prompts)) for what, prompts in kinds.items()]
    return Row(num_workers, fleet.prefixes.num_keys, used / 1024, rate, choices)


def _times(chooser: Chooser, prompts: Prompts) -> tuple[float, float]:
    """Median and 99th percentile of a choice, microseconds."""
    taken = []
    for _ in range(NUM_CHOICES):
        prompt = prompts()
        began = time.perf_counter()
        prefix = chooser.find_prefix(prompt)
        route = chooser.choose(Demand(len(prompt) + 1, prefix=prefix))
        taken.append((time.perf_counter() - began) * 1e6)
        assert route is not None
    taken.sort()
    return statistics.median(taken), taken[int(0.99 * len(taken))]


def table(sizes: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Lines of a Markdown table, each as soon as it is known."""
    prompt = f"prompt of {HISTORY_TOKENS + BLOCK_SIZE:,} tokens"
    yield f"| workers | blocks | index, MiB | blocks taken in a second | {prompt} | a choice, µs: p50 / p99 |"
    yield "|---:|---:|---:|---:|---|---:|"
    for num_workers, num_blocks in sizes:
        row = measure(num_workers, num_blocks)
        for choices in row.choices:
            yield (
                f"| {row.num_workers:,} | {row.num_blocks:,} | {row.index_mib:,.0f} | {row.blocks_per_s:,.0f} "
                f"| {choices.what} | {choices.p50:.0f} / {choices.p99:.0f} |"
            )


def main() -> None:
    for line in table([(10, 100_000), (100, 1_000_000), (1000, 1_000_000), (1000, 10_000_000)]):
        print(line, flush=True)
    print(f"good is {TARGET_US:.0f} µs at 1,000 workers", file=sys.stderr)


if __name__ == "__main__":
    main()
