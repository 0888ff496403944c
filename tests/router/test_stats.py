"""The router's figures."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from router.stats import Histogram, Routed
from tests.router.harness import PROMPT, Behaviour, ask, cluster, eventually, run


def test_histogram_counts_by_bound() -> None:
    histogram = Histogram()
    for value in (0.0005, 0.001, 0.5, 1000.0, None):
        histogram.observe(value)
    assert (histogram.num, histogram.counts[0], histogram.counts[-1]) == (4, 2, 1)
    assert histogram.total == pytest.approx(1000.5015)


def test_what_is_routed_is_counted_by_where_it_is_computed() -> None:
    routed = Routed()
    routed.count(prompt_tokens=100, missing=40, is_local=False, spills=False)
    routed.count(prompt_tokens=50, missing=10, is_local=True, spills=False)
    routed.count(prompt_tokens=50, missing=30, is_local=True, spills=True)
    assert (routed.prompts, routed.prompt_tokens, routed.missing_tokens) == (3, 200, 80)
    assert (routed.local_tokens, routed.spilled_tokens, routed.missing_squares) == (40, 30, 2600.0)


def test_load_is_counted_when_it_comes(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, split=True, behaviour=Behaviour(step_s=0.02)) as made:
            asking = asyncio.ensure_future(made.ask(ask("r1", num=50)))
            await eventually(lambda: made.app.stats().sent_tokens > 2)
            stats = made.app.stats()
            assert (stats.accepted, stats.accepted_prompt_tokens, stats.routed_prompts) == (1, len(PROMPT), 1)
            assert stats.routed_missing_tokens == stats.routed_prompt_tokens > 0
            assert stats.ttft_s.num == 1
            assert stats.outcomes == {}
            answer = await asking
            assert made.app.stats().sent_tokens == len(answer.token_ids)

    run(scenario())
