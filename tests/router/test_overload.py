"""Ten times as many requests as can be served: who is refused is told so at once, and the others are served in time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from tests.router.fake_worker import Behaviour
from tests.router.harness import Cluster, Refusal, ask, cluster, run

CAPACITY, STEP_S, NUM_TOKENS = 4, 0.02, 10
PEAK_PER_S = CAPACITY / (STEP_S * (NUM_TOKENS + 1))
SLO_S = 0.8
REFUSAL_S, SLACK = 0.05, 5
"""What a refusal may take where clients, workers and router share one event loop; a busy machine fails no one."""


@dataclass
class Account:
    """What clients saw."""

    ttft_s: list[float] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    refused_in_s: list[float] = field(default_factory=list)


async def one(made: Cluster, name: str, account: Account, deadline_s: float) -> None:
    request = ask(name, num=NUM_TOKENS)
    request.deadline_s = deadline_s
    started, first = time.monotonic(), 0.0
    try:
        async for event in made.stub.Generate(request):
            if event.WhichOneof("event") == "tokens" and not first:
                first = time.monotonic() - started
    except grpc.aio.AioRpcError as error:
        account.refusals.append(Refusal.of(error))
        account.refused_in_s.append(time.monotonic() - started)
    else:
        account.ttft_s.append(first)


async def offer(made: Cluster, per_s: float, for_s: float, name: str, deadline_s: float) -> Account:
    """Requests at a fixed rate, whatever becomes of them."""
    account, tasks = Account(), list[asyncio.Task[None]]()
    started = time.monotonic()
    while (passed_s := time.monotonic() - started) < for_s:
        while len(tasks) < passed_s * per_s:
            tasks.append(asyncio.create_task(one(made, f"{name}{len(tasks)}", account, deadline_s)))
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    return account


@pytest.mark.parametrize(("slo_s", "deadline_s"), [(SLO_S, 600.0), (None, SLO_S + 0.4)])
def test_ten_times_too_many_are_refused_fast_and_the_rest_is_served_in_time(
    model: Path, slo_s: float | None, deadline_s: float
) -> None:
    """Those that are not refused have their first token in time, or their whole answer before its deadline."""

    async def scenario() -> None:
        behaviour = Behaviour(capacity=CAPACITY, step_s=STEP_S)
        async with cluster(model, behaviour=behaviour, max_queued=100, ttft_slo_s=slo_s) as made:
            before = await offer(made, 0.8 * PEAK_PER_S, 2.0, "calm", deadline_s)
            assert not before.refusals
            await offer(made, 10 * PEAK_PER_S, 2.0, "warm", deadline_s)
            over = await offer(made, 10 * PEAK_PER_S, 3.0, "over", deadline_s)
            in_time = sum(ttft_s <= SLO_S for ttft_s in over.ttft_s)
            refused_in_s = sorted(over.refused_in_s)
            print(
                f"{in_time / 3.0:.1f} of {PEAK_PER_S:.1f}/s in time, {len(over.ttft_s)} served, {len(over.refusals)} "
                f"refused in {refused_in_s[len(refused_in_s) // 2] * 1000:.1f} ms p50, "
                f"{refused_in_s[int(len(refused_in_s) * 0.9)] * 1000:.1f} ms p90: {made.app.stats().refused}"
            )
            assert in_time / 3.0 >= 0.9 / SLACK * PEAK_PER_S
            codes = Counter(refusal.code for refusal in over.refusals)
            assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED] >= 0.9 * codes.total()
            told = [item for item in over.refusals if item.code is grpc.StatusCode.RESOURCE_EXHAUSTED]
            assert all((refusal.retry_after_s or 0.0) >= 1.0 for refusal in told)
            assert len({refusal.retry_after_s for refusal in told}) > len(told) // 10
            assert refused_in_s[len(refused_in_s) // 2] < REFUSAL_S * SLACK
            await made.idle()

    run(scenario(), timeout_s=60.0)
