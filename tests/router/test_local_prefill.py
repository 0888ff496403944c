"""A decode worker computes a prompt itself where it would wait too long, and only so many."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from router.info import WorkerInfo
from router.local_prefill import MEMORY_S, LocalPrefillConfig, LocalShare
from router.policies import Demand, Route, choose
from tests.router.fake_worker import Behaviour, expected_answer
from tests.router.harness import PROMPT, ask, cluster, eventually, run
from tests.router.test_policies import worker

RULE = LocalPrefillConfig(max_share=0.5, when_waiting_s=0.2, max_load=0.8)


def route(*workers: WorkerInfo, rule: LocalPrefillConfig | None = RULE, num_tokens: int = 100) -> Route:
    made = choose(workers, Demand(num_tokens), split=True, policy="least_loaded", turn=0, local=rule)
    assert made is not None
    return made


def prefiller(waiting_tokens: int, rate: float = 1000.0) -> WorkerInfo:
    return worker("p0", "prefill", waiting_tokens=waiting_tokens, prompt_tokens_per_s=rate)


def decoder(name: str = "d0", **known: Any) -> WorkerInfo:
    return worker(name, "decode", **known)


def test_a_prompt_that_would_wait_is_computed_where_it_is_decoded() -> None:
    made = route(prefiller(500), decoder())
    assert made.prefill is None
    assert made.reason == "prefilled where it is decoded: 0.50 s to wait at p0/1"


@pytest.mark.parametrize(
    ("why", "workers", "rule"),
    [
        ("the wait is short", [prefiller(200), decoder()], RULE),
        ("nobody knows how fast it is", [prefiller(500, rate=0.0), decoder()], RULE),
        ("the limit is reached", [prefiller(500), decoder()], None),
        ("another prefill worker is free", [prefiller(500), worker("p1", "prefill"), decoder()], RULE),
        ("its places are taken", [prefiller(500), decoder(num_running=8)], RULE),
        ("it has prompts of its own", [prefiller(500), decoder(waiting_tokens=300)], RULE),
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
    assert not share.allows(10)
    share.count(300, 0.0, local=False)
    assert share.allows(100)
    share.count(100, 1.0, local=True)
    assert not share.allows(1)
    share.count(300, 1.0 + 3 * MEMORY_S, local=False)
    assert share.allows(80)
    assert not LocalShare(0.0).allows(1)


@pytest.mark.parametrize("setting", [{"max_share": 1.5}, {"max_load": -0.1}, {"when_waiting_s": -1.0}])
def test_settings_that_cannot_be(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        LocalPrefillConfig(**setting)


def test_a_queue_of_prompts_is_shared_with_the_decode_worker(model: Path) -> None:
    async def scenario() -> None:
        rule = LocalPrefillConfig(max_share=0.5, when_waiting_s=0.02)
        behaviour = Behaviour(prefill_s=0.2, prompt_tokens_per_s=100.0)
        async with cluster(model, behaviour=behaviour, local_prefill=rule) as made:
            (prefill,) = [each for each in made.workers.values() if each.role == "prefill"]
            first = asyncio.create_task(made.ask(ask("r0", num=8)))
            await eventually(lambda: prefill.prefilling)
            answers = await asyncio.gather(first, *(made.ask(ask(f"r{n}", num=8)) for n in range(1, 12)))
            assert all(answer.token_ids == expected_answer(PROMPT, 8) for answer in answers)
            assert 6 <= len(prefill.prefilled) < 12
            local = [answer for answer in answers if answer.finished.prefill_worker == "d0/1"]
            assert len(local) == 12 - len(prefill.prefilled)
            await made.idle()

    run(scenario())
