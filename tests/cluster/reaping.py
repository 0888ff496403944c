"""An event loop that reaps children, as the supervisor's does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from cluster.children import Children


@asynccontextmanager
async def reaping() -> AsyncIterator[Children]:
    children = Children()
    children.start()
    try:
        yield children
    finally:
        children.close()


def with_children(body: Callable[[Children], Awaitable[Any]], timeout_s: float = 60.0) -> Any:
    """Run a coroutine in a loop that reaps children."""

    async def run() -> Any:
        async with asyncio.timeout(timeout_s), reaping() as children:
            return await body(children)

    return asyncio.run(run())
