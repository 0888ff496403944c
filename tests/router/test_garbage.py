"""What a request leaves to the garbage collector: no circles, for its pauses hold up others."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import grpc
import pytest

from tests.router.harness import Behaviour, ask, cluster, run

NUM_REQUESTS = 20


@pytest.mark.parametrize("kind", ["answered", "refused"])
def test_a_session_is_freed_when_it_ends(model: Path, kind: str) -> None:
    async def scenario() -> None:
        async with cluster(model, split=True, behaviour=Behaviour()) as made:

            async def one(number: int) -> None:
                if kind == "answered":
                    await made.ask(ask(f"a-{number}", num=3))
                else:
                    refusal = await made.refused(ask(f"r-{number}", num=-1))
                    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT

            await one(-1)
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                for number in range(NUM_REQUESTS):
                    await one(number)
                await made.idle()
                gc.collect()
                found = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
        assert not [name for name in found if name.startswith("router.")], found

    run(scenario())
