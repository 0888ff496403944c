"""Wake-ups."""

from __future__ import annotations

import asyncio

from router.wakeup import Signal
from tests.router.harness import run


def test_signal_misses_nothing() -> None:
    async def scenario() -> None:
        signal = Signal()
        seen = signal.version
        signal.notify()
        assert await signal.wait(seen, timeout_s=0.01)
        assert not await signal.wait(signal.version, timeout_s=0.01)
        asyncio.get_running_loop().call_soon(signal.notify)
        assert await signal.wait(signal.version, timeout_s=1.0)

    run(scenario())
