"""A decode worker computes a prompt itself where it would wait too long, and only so many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from protos.worker_pb2 import BlockEvents
from router.info import WorkerInfo
from router.local_prefill import MEMORY_S, LocalPrefillConfig, LocalShare
from router.policies import Demand, Route, choose
from router.prefix_index import NOTHING_KNOWN, KnownPrefix, PrefixIndex
from tests.router.fake_worker import Behaviour, expected_answer
from tests.router.harness import PROMPT, ask, cluster, eventually, run
from tests.router.test_policies import worker

RULE = LocalPrefillConfig(short_tokens=10, when_waiting_s=0.2, max_load=0.8)


def route(
    *workers: WorkerInfo,
    rule: LocalPrefillConfig | None = RULE,
    num_tokens: int = 100,
    prefix: KnownPrefix = NOTHING_KNOWN,
    allows: Callable[[int, int], bool] = lambda num_tokens, num_local: True,
) -> Route:
    made = choose(
        workers,
        Demand(num_tokens, prefix=prefix),
        split=True,
        policy="least_loaded",
        turn=0,
        local=rule,
        allows=allows,
    )
    assert made is not None
    return made


def held(**blocks: int) -> Callable[[Sequence[WorkerInfo]], KnownPrefix]:
    """So many blocks of ten tokens of the prompt are held by the workers of these names."""

    def prefix(workers: Sequence[WorkerInfo]) -> KnownPrefix:
        index = PrefixIndex()
        for info in workers:
            keys = range(blocks.get(info.worker_id, 0))
            index.apply(info, BlockEvents(number=1, stored=keys, is_snapshot=True))
        return index.find(range(100), 10)

    return prefix


def prefiller(waiting_tokens: int, rate: float = 1000.0) -> WorkerInfo:
    return worker("p0", "prefill", waiting_tokens=waiting_tokens, prompt_tokens_per_s=rate)


def decoder(name: str = "d0", **known: Any) -> WorkerInfo:
    return worker(name, "decode", **known)


def test_a_prompt_that_would_wait_is_computed_where_it_is_decoded() -> None:
    made = route(prefiller(500), decoder())
    assert made.prefill is None
    assert made.reason == "prefilled where it is decoded: 0.50 s to wait at p0/1"
    assert made.local_tokens == 100


def test_a_prompt_of_which_little_is_missing_is_computed_where_it_is_decoded() -> None:
    workers = [prefiller(0), decoder(waiting_tokens=500)]
    made = route(*workers, num_tokens=96, prefix=held(d0=9)(workers))
    assert (made.prefill, made.local_tokens) == (None, 6)
    assert made.reason == "prefilled where it is decoded: 6 tokens are missing there"
    assert route(*workers, num_tokens=96, prefix=held(d0=8)(workers)).prefill is not None


@pytest.mark.parametrize(("running", "chosen"), [(0, "d0"), (3, "d1")])
def test_short_prompts_that_one_worker_holds_do_not_all_go_there(running: int, chosen: str) -> None:
    workers = [prefiller(0), decoder("d0", num_running=running), decoder("d1")]
    made = route(*workers, num_tokens=10, prefix=held(d0=1)(workers))
    assert (made.prefill, made.decode.worker_id) == (None, chosen)


def test_load_sends_no_prompt_from_the_worker_that_holds_it_to_one_that_lacks_more_than_a_short_one() -> None:
    workers = [prefiller(0), decoder("d0", num_running=3), decoder("d1")]
    made = route(*workers, num_tokens=96, prefix=held(d0=9)(workers))
    assert (made.prefill, made.decode.worker_id, made.local_tokens) == (None, "d0", 6)


def test_a_prompt_that_the_decode_worker_holds_most_of() -> None:
    workers = [prefiller(0), decoder()]
    made = route(*workers, prefix=held(d0=7, p0=2)(workers))
    assert (made.prefill, made.local_tokens) == (None, 30)
    assert made.reason == "prefilled where it is decoded: 30 tokens are missing there, 80 at p0/1"
    assert route(*workers, prefix=held(d0=7, p0=6)(workers)).prefill is None, "it is taken to be as fast"
    slower = [workers[0], decoder(prompt_tokens_per_s=600.0)]
    assert route(*slower, prefix=held(d0=7, p0=6)(slower)).prefill is not None
    assert route(*workers, prefix=held(d0=7, p0=7)(workers)).prefill is not None
    busy = [workers[0], decoder(waiting_tokens=60)]
    assert route(*busy, prefix=held(d0=7, p0=2)(busy)).prefill is not None


def test_the_limit_is_asked_for_what_is_computed() -> None:
    workers, asked = [prefiller(0), decoder()], []

    def allows(*tokens: int) -> bool:
        asked.append(tokens)
        return False

    assert route(*workers, prefix=held(d0=7)(workers), allows=allows).prefill is not None
    assert asked == [(100, 30)]


@pytest.mark.parametrize(
    ("why", "workers", "rule"),
    [
        ("the wait is short", [prefiller(200), decoder()], RULE),
        ("nobody knows how fast it is", [prefiller(500, rate=0.0), decoder()], RULE),
        ("it is switched off", [prefiller(500), decoder()], None),
        ("another prefill worker is free", [prefiller(500), worker("p1", "prefill"), decoder()], RULE),
        ("its places are taken", [prefiller(500), decoder(num_running=8)], RULE),
        ("it has prompts of its own", [prefiller(500), decoder(waiting_tokens=600)], RULE),
        ("it is slow", [prefiller(500), decoder(prompt_tokens_per_s=160.0)], RULE),
    ],
)
def test_otherwise_it_waits(why: str, workers: list[WorkerInfo], rule: LocalPrefillConfig | None) -> None:
    assert route(*workers, rule=rule).prefill is not None, why


def test_the_decode_worker_that_is_soonest() -> None:
    busy, slow, best = (
        decoder("d0", waiting_tokens=100),
        decoder("d1", prompt_tokens_per_s=200.0),
        decoder("d2", num_running=3, prompt_tokens_per_s=600.0),
    )
    assert route(prefiller(5000), busy, slow, best).decode is best
    with best.prefilling(1000):  # sent a moment ago
        assert route(prefiller(5000), busy, slow, best).decode is busy


def test_the_share_is_of_late() -> None:
    share = LocalShare(0.25)
    assert not share.allows(10, 10)
    assert share.allows(40, 10)
    share.count(300, 0, 0.0)
    assert share.allows(100, 100)
    share.count(100, 100, 1.0)
    assert not share.allows(1, 1)
    share.count(300, 0, 1.0 + 3 * MEMORY_S)
    assert share.allows(80, 80)
    assert not LocalShare(0.0).allows(1, 1)


@pytest.mark.parametrize(
    "setting", [{"max_share": 1.5}, {"max_load": -0.1}, {"when_waiting_s": -1.0}, {"short_tokens": -1}]
)
def test_settings_that_cannot_be(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        LocalPrefillConfig(**setting)


def test_a_queue_of_prompts_is_shared_with_the_decode_worker(model: Path) -> None:
    async def scenario() -> None:
        rule = LocalPrefillConfig(max_share=0.5, short_tokens=0, when_waiting_s=0.02)
        behaviour = Behaviour(prefill_s=0.2, prompt_tokens_per_s=100.0)
        async with cluster(model, behaviour=behaviour, local_prefill=rule) as made:
            (prefill,) = [each for each in made.workers.values() if each.role == "prefill"]
            first = asyncio.create_task(made.ask(ask("r0", num=8)))
            await eventually(lambda: prefill.prefilling)
            answers = await asyncio.gather(first, *(made.ask(ask(f"r{n}", num=8)) for n in range(1, 12)))
            assert all(answer.token_ids == expected_answer(PROMPT, 8) for answer in answers)
            assert 6 <= len(prefill.prefilled) < 12, "a burst does not pass the limit of one half"
            local = [answer for answer in answers if answer.finished.prefill_worker == "d0/1"]
            assert len(local) == 12 - len(prefill.prefilled)
            await made.idle()

    run(scenario())
