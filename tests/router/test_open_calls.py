"""Calls that are open before there is a request for them."""

import asyncio
import contextlib

import grpc
import pytest

from protos import worker_pb2, worker_pb2_grpc
from router.open_calls import NUM_OPEN, OpenCalls


class Worker(worker_pb2_grpc.DecodeWorkerServicer):
    """Answers a request by its router's id; counts what comes."""

    def __init__(self):
        self.num_opened = 0
        self.asked = []
        self.called = []
        self.whole = []
        self.cancelled = asyncio.Event()

    async def Reserve(self, request, context):
        self.called.append((request.router_id, request.epoch))
        return worker_pb2.ReserveReply(cached_tokens=1000)

    async def OpenReserve(self, request_iterator, context):
        self.num_opened += 1
        async for request in request_iterator:
            self.asked.append(request.router_id)
            if request.router_id == "in parts":
                request.MergeFrom(await anext(request_iterator))
                self.whole.append((request.router_id, request.epoch))
            if request.router_id == "knows":
                yield worker_pb2.ReserveReply(cached_tokens=7)
                return
            if request.router_id == "full":
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no blocks")
            if request.router_id == "slow":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
            yield worker_pb2.ReserveReply(cached_tokens=len(self.asked))
            return


@contextlib.asynccontextmanager
async def calls_to(worker):
    server = grpc.aio.server()
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = worker_pb2_grpc.DecodeWorkerStub(channel)
        calls = OpenCalls(stub.OpenReserve, lambda request, timeout_s: stub.Reserve(request, timeout=timeout_s))
        yield calls
        calls.close()
    await server.stop(0)


def request(name):
    return worker_pb2.ReserveRequest(router_id=name)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_each_call_is_for_one_request_and_another_is_opened():
    async def scenario():
        worker = Worker()
        async with calls_to(worker) as calls:
            assert (await calls.ask(request("early"), 10)).cached_tokens == 1000
            assert worker.called == [("early", 0)]
            calls.fill()
            replies = [await calls.ask(request(f"{index}"), 10) for index in range(NUM_OPEN)]
            assert [reply.cached_tokens for reply in replies] == [1, 2, 3, 4]
            await until(lambda: worker.num_opened >= 2 * NUM_OPEN)
            assert worker.asked == ["0", "1", "2", "3"]

    asyncio.run(scenario())


def test_more_at_once_than_are_open_are_unary_calls():
    async def scenario():
        worker = Worker()
        async with calls_to(worker) as calls:
            calls.fill()
            replies = await asyncio.gather(*(calls.ask(request("x"), 10) for _ in range(NUM_OPEN + 2)))
            assert sum(reply.cached_tokens == 1000 for reply in replies) == 2
            assert len(worker.asked) == NUM_OPEN
            assert len(worker.called) == 2

    asyncio.run(scenario())


def test_a_refusal_is_the_status_of_the_call():
    async def scenario():
        async with calls_to(Worker()) as calls:
            calls.fill()
            with pytest.raises(grpc.aio.AioRpcError, match="no blocks") as caught:
                await calls.ask(request("full"), 10)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["time is up", "cancelled"])
def test_the_worker_hears_that_nobody_waits_any_more(how):
    async def scenario():
        worker = Worker()
        async with calls_to(worker) as calls:
            calls.fill()
            asking = asyncio.create_task(calls.ask(request("slow"), 0.2 if how == "time is up" else 60))
            await until(lambda: worker.asked)
            if how == "cancelled":
                asking.cancel()
            with pytest.raises(TimeoutError if how == "time is up" else asyncio.CancelledError):
                await asking
            async with asyncio.timeout(10):
                await worker.cancelled.wait()

    asyncio.run(scenario())


def test_nothing_is_opened_after_close():
    async def scenario():
        worker = Worker()
        async with calls_to(worker) as calls:
            calls.close()
            calls.fill()
            assert (await calls.ask(request("late"), 10)).cached_tokens == 1000
            assert worker.num_opened == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("are_open", [True, False], ids=["open", "unary"])
def test_a_request_in_two_parts(are_open):
    """An open call has the first part while the second is still to come; a unary call is made with both."""

    async def scenario():
        worker = Worker()
        async with calls_to(worker) as calls:
            if are_open:
                calls.fill()
            rest = asyncio.get_running_loop().create_future()
            asking = asyncio.create_task(calls.ask(request("in parts"), 10, rest))
            if are_open:
                await until(lambda: worker.asked)
            rest.set_result(worker_pb2.ReserveRequest(epoch=7))
            await asking
            assert (worker.whole if are_open else worker.called) == [("in parts", 7)]

    asyncio.run(scenario())


def test_what_never_comes_is_not_waited_for_longer():
    async def scenario():
        worker = Worker()
        async with calls_to(worker) as calls:
            with pytest.raises(TimeoutError):
                await calls.ask(request("in parts"), 0.1, asyncio.get_running_loop().create_future())
            assert worker.called == []

    asyncio.run(scenario())


@pytest.mark.parametrize("pause_s", [0.0, 0.001, 0.05])
def test_an_answer_that_comes_before_the_rest_of_the_request(pause_s):
    """The rest may be written while the call ends, or behind its end."""

    async def scenario():
        worker = Worker()
        async with calls_to(worker) as calls:
            for _ in range(50):
                calls.fill()
                rest = asyncio.get_running_loop().create_future()
                asking = asyncio.create_task(calls.ask(request("knows"), 10, rest))
                await asyncio.sleep(pause_s)
                rest.set_result(worker_pb2.ReserveRequest(epoch=7))
                assert (await asking).cached_tokens == 7
            assert worker.called == []

    asyncio.run(scenario())
