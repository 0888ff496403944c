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
