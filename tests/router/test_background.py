"""Tasks that nobody awaits."""

from __future__ import annotations

import asyncio
import logging

import pytest

from router.background import Background
from tests.router.harness import run


def test_background_logs_failures_and_settles(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        background = Background()

        async def fail() -> None:
            raise RuntimeError("told to")

        background.spawn(fail(), "a failing task")
        stuck = background.spawn(asyncio.Event().wait(), "stuck")
        with caplog.at_level(logging.ERROR):
            await background.settle(0.05)
        assert stuck.cancelled()
        assert not len(background)
        assert "a failing task" in caplog.text

    run(scenario())


def test_a_task_that_loses_its_first_cancellation_is_cancelled_again() -> None:
    async def forgetful() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    async def scenario() -> None:
        background = Background()
        task = background.spawn(forgetful(), "forgetful")
        await asyncio.sleep(0)
        await background.cancel()
        assert task.cancelled()
        assert not len(background)

    run(scenario())


def test_tasks_that_give_way_begin_one_a_turn() -> None:
    async def scenario() -> None:
        background = Background()
        began = 0

        async def begin() -> None:
            nonlocal began
            began += 1

        for number in range(10):
            background.spawn_in_turn(begin(), f"number {number}")
        seen = []
        while len(background):
            await asyncio.sleep(0)
            seen.append(began)
        assert began == 10
        assert max(later - earlier for earlier, later in zip([0, *seen], seen, strict=False)) == 1

    run(scenario())


def test_tasks_that_have_not_begun_settle_or_are_closed() -> None:
    async def scenario() -> None:
        began = []

        async def begin(name: str) -> None:
            began.append(name)

        background = Background()
        background.spawn_in_turn(begin("settled"), "settled")
        await background.settle(1.0)
        background.spawn_in_turn(begin("closed"), "closed")
        await background.cancel()
        await asyncio.sleep(0)
        assert began == ["settled"]
        assert not len(background)

    run(scenario())
