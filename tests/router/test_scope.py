"""A scope ends its owner from outside, once, wherever it waits."""

from __future__ import annotations

import asyncio
import time

import pytest

from router.errors import DeadlineExceededError, RequestCancelledError
from router.scope import Scope, ScopeState
from tests.router.harness import run

CANCELLED = RequestCancelledError("asked to")


async def write_in(scope: Scope, written: asyncio.Event) -> None:
    async with scope:
        with scope.writing():
            await written.wait()


async def wait_for_ever(bound_s: float) -> None:
    async with Scope() as scope:
        scope.interrupt_at(asyncio.get_running_loop().time() + bound_s, lambda: DeadlineExceededError("late"))
        await asyncio.Event().wait()


def test_interrupt_raises_where_the_owner_waits() -> None:
    async def scenario() -> None:
        scope = Scope()
        asyncio.get_running_loop().call_soon(scope.interrupt, CANCELLED)
        with pytest.raises(RequestCancelledError):
            async with scope:
                await asyncio.Event().wait()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert not scope.write_cut
        assert scope.state is ScopeState.CLOSED
        await asyncio.sleep(0)

    run(scenario())


def test_only_the_first_interrupt_counts_and_none_after_the_end() -> None:
    async def scenario() -> None:
        scope, outcomes = Scope(), list[bool]()

        def twice() -> None:
            outcomes.append(scope.interrupt(CANCELLED))
            outcomes.append(scope.interrupt(DeadlineExceededError("late")))

        asyncio.get_running_loop().call_soon(twice)
        with pytest.raises(RequestCancelledError):
            async with scope:
                await asyncio.Event().wait()
        assert outcomes == [True, False]
        assert not scope.interrupt(CANCELLED)
        await asyncio.sleep(0)

    run(scenario())


def test_interrupt_lets_a_write_through_within_its_patience() -> None:
    async def scenario() -> None:
        scope, written = Scope(), asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.call_soon(scope.interrupt, CANCELLED, 5.0)
        loop.call_later(0.05, written.set)
        with pytest.raises(RequestCancelledError):
            await write_in(scope, written)
        assert written.is_set()
        assert not scope.write_cut

    run(scenario())


def test_write_that_takes_longer_is_cut() -> None:
    async def scenario() -> None:
        scope = Scope()
        asyncio.get_running_loop().call_soon(scope.interrupt, CANCELLED, 0.05)
        with pytest.raises(RequestCancelledError):
            await write_in(scope, asyncio.Event())
        assert scope.write_cut

    run(scenario())


def test_interrupt_at_a_time() -> None:
    async def scenario() -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            await wait_for_ever(0.1)
        assert 0.1 <= time.monotonic() - started < 0.5
        async with Scope() as scope:
            scope.interrupt_at(asyncio.get_running_loop().time() + 0.05, lambda: DeadlineExceededError("late"))
        await asyncio.sleep(0.1)

    run(scenario())


def test_sealed_scope_is_left_alone() -> None:
    async def scenario() -> None:
        async with Scope() as scope:
            scope.interrupt_at(asyncio.get_running_loop().time() + 0.02, lambda: DeadlineExceededError("late"))
            scope.seal()
            assert not scope.interrupt(CANCELLED)
            await asyncio.sleep(0.05)

    run(scenario())


def test_cancellation_by_others_passes_through() -> None:
    async def scenario() -> None:
        async def serve() -> None:
            async with Scope():
                await asyncio.Event().wait()

        task = asyncio.create_task(serve())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())


def test_client_that_goes_during_an_interrupt_stays_gone() -> None:
    async def scenario() -> None:
        scope = Scope()

        async def serve() -> None:
            async with scope:
                await asyncio.Event().wait()

        task = asyncio.create_task(serve())
        await asyncio.sleep(0)
        scope.interrupt(CANCELLED)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
