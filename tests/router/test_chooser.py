"""Choices over many workers: who holds the prompt, unless waiting there costs more."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from engine.block_hash import block_hashes, root_hash
from engine.block_log import key_of
from protos.worker_pb2 import BlockEvents
from router.chooser import Chooser
from router.config import RouterConfig
from router.info import WorkerInfo
from router.local_prefill import LocalPrefillConfig
from router.policies import Demand, Route
from router.prefix_index import PrefixIndex
from router.roster import Roster
from tests.router.test_policies import worker

PROMPT = random.Random(1).choices(range(1000), k=100)
SIZE = 16
NEVER = LocalPrefillConfig(max_share=0.0)


@dataclass
class Fleet:
    infos: list[WorkerInfo]
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)

    def __post_init__(self) -> None:
        self.roster = Roster(self.infos)

    def workers(self) -> list[WorkerInfo]:
        return self.infos

    def hold(self, worker_id: str, num_blocks: int) -> None:
        """A worker has the KV of so many blocks of the prompt."""
        (info,) = [info for info in self.infos if info.worker_id == worker_id]
        hashes = block_hashes(PROMPT, SIZE, root_hash("m", "float32", SIZE))[:num_blocks]
        self.prefixes.apply(info, BlockEvents(number=1, stored=map(key_of, hashes), is_snapshot=True))


def fleet(num: int = 50) -> Fleet:
    rate = {"prompt_tokens_per_s": 1000.0}
    prefillers = [worker(f"p{n}", "prefill", num_blocks=1000, **rate) for n in range(num)]
    decoders = [worker(f"d{n}", "decode", num_blocks=1000, **rate) for n in range(num)]
    for info in decoders:
        info.description.layout.num_kv_heads, info.description.layout.head_dim = 1, 8
    return Fleet(prefillers + decoders)


def choose(known: Fleet, **config: object) -> Route:
    chooser = Chooser(known, RouterConfig(**config), split=True)  # type: ignore[arg-type]
    route = chooser.choose(Demand(len(PROMPT) + 1, prefix=chooser.find_prefix(PROMPT)))
    assert route is not None
    return route


@pytest.mark.parametrize("num", [3, 50])
def test_who_holds_the_prompt_is_found_among_few_and_many(num: int) -> None:
    for _ in range(20):
        known = fleet(num)
        known.hold("p1", 4)
        known.hold("d2", 2)
        route = choose(known, local_prefill=NEVER)
        assert route.prefill is known.infos[1]
        assert route.decode is known.infos[num + 2]
        assert route.reason == "kv_aware: split, 64 and 32 of 101 tokens are held there"


def test_a_long_line_outweighs_what_is_held() -> None:
    known = fleet(3)
    known.hold("p1", 4)
    known.infos[1].stats.waiting_tokens = 63
    assert choose(known, local_prefill=NEVER).prefill is known.infos[1]
    known.infos[1].stats.waiting_tokens = 65
    assert choose(known, local_prefill=NEVER).prefill is not known.infos[1]


def test_the_limit_of_local_prefill_is_kept_choice_by_choice() -> None:
    known = fleet(3)
    known.hold("d2", 6)
    chooser = Chooser(known, RouterConfig(local_prefill=LocalPrefillConfig(max_share=0.04)), split=True)
    routes = []
    for _ in range(10):
        route = chooser.choose(Demand(len(PROMPT) + 1, prefix=chooser.find_prefix(PROMPT)))
        assert route is not None
        chooser.took(route, len(PROMPT) + 1, 0.0)
        routes.append(route)
        assert sum(route.local_tokens for route in routes) <= 0.04 * 101 * len(routes)
    assert [route.local_tokens for route in routes[:6]] == [0, 5, 5, 5, 5, 0]
    chooser.took_back(routes[1], len(PROMPT) + 1)
    again = chooser.choose(Demand(len(PROMPT) + 1, prefix=chooser.find_prefix(PROMPT)))
    assert again is not None
    assert again.local_tokens == 5


def test_if_nobody_drawn_can_serve_everybody_is_asked() -> None:
    known = fleet(50)
    lives = frozenset(info.life for info in known.infos if info.worker_id not in ("p7", "d31"))
    chooser = Chooser(known, RouterConfig(), split=True)
    for _ in range(20):
        route = chooser.choose(Demand(50, excluded=lives))
        assert route is not None
        assert (route.prefill, route.decode) == (known.infos[7], known.infos[81])
