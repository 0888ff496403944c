import asyncio
import socket
import threading
import time
from pathlib import Path

import pytest

from engine.ipc import EngineClient, EngineGoneError, EngineServer, socket_path
from engine.link import EngineLink
from protos import framing
from protos import worker_pb2 as pb


class EchoSession:
    """Answers starts and renewals, keeps what it was told."""

    def __init__(self, send, log: list) -> None:
        self.send = send
        self.log = log
        self.closed = threading.Event()

    def handle(self, command: pb.EngineCommand) -> None:
        kind = command.WhichOneof("command")
        self.log.append(kind)
        if kind == "start":
            description = pb.WorkerDescription(identity=command.start.identity)
            self.send(pb.EngineEvent(reply=pb.EngineReply(call_id=command.call_id, description=description)))
        elif kind == "renew":
            stats, pairs = pb.WorkerStats(steps=7), [pb.PairInfo(peer="d/1", direction="to")]
            self.send(pb.EngineEvent(reply=pb.EngineReply(call_id=command.call_id, stats=stats, pairs=pairs)))
            outputs = [pb.RouterOutputs(router_id="r", outputs=[pb.TokenOutput(request_id="x")])]
            self.send(pb.EngineEvent(step=pb.StepEvent(outputs=outputs)))

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def served(tmp_path):
    log: list[str] = []
    sessions: list[EchoSession] = []

    def open_session(send):
        sessions.append(EchoSession(send, log))
        return sessions[-1]

    server = EngineServer(str(tmp_path / "e.sock"), open_session)
    server.start()
    yield str(tmp_path / "e.sock"), sessions, log
    server.stop()
    for session in sessions:
        assert session.closed.wait(5.0)


def test_calls_are_answered_and_steps_arrive(served):
    path, _, _ = served
    steps = []

    async def main():
        client = EngineClient(steps.append)
        await client.connect(path)
        reply = await client.call(pb.EngineCommand(renew=pb.RenewLeases()), 5.0)
        assert reply.stats.steps == 7
        await client.call(pb.EngineCommand(renew=pb.RenewLeases()), 5.0)
        await client.close()

    asyncio.run(main())
    assert steps[0].outputs[0].outputs[0].request_id == "x"


def test_nobody_waits_for_a_front_that_does_not_read_and_order_is_kept(served):
    path, sessions, _ = served
    num_steps, payload = 400, "x" * 20_000  # far more than a socket holds

    def step(number: int) -> pb.EngineEvent:
        output = pb.TokenOutput(request_id=payload, offset=number)
        return pb.EngineEvent(step=pb.StepEvent(outputs=[pb.RouterOutputs(router_id="r", outputs=[output])]))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as front:
        front.connect(path)
        front.settimeout(10.0)
        front.sendall(framing.pack(pb.EngineCommand(call_id=1, renew=pb.RenewLeases())))
        for _ in range(2):
            assert framing.read_message(front, pb.EngineEvent) is not None
        said = threading.Thread(target=lambda: [sessions[0].send(step(number)) for number in range(num_steps)])
        said.start()
        said.join(10.0)
        assert not said.is_alive()
        events = [framing.read_message(front, pb.EngineEvent) for _ in range(num_steps)]
        assert [event.step.outputs[0].outputs[0].offset for event in events] == list(range(num_steps))


def test_an_unanswered_call_ends_in_time_and_names_itself(served):
    path, _, _ = served

    async def main():
        client = EngineClient(lambda step: None)
        await client.connect(path)
        with pytest.raises(EngineGoneError, match=r"did not answer `drain` within 0\.05 s"):
            await client.call(pb.EngineCommand(drain=pb.DrainEngine()), 0.05)
        await client.close()

    asyncio.run(main())


def test_a_newcomer_replaces_the_front_before(served):
    path, sessions, _ = served

    async def main():
        first, second = EngineClient(lambda step: None), EngineClient(lambda step: None)
        await first.connect(path)
        await first.call(pb.EngineCommand(renew=pb.RenewLeases()), 5.0)
        await second.connect(path)
        await asyncio.wait_for(first.closed.wait(), 5.0)
        assert sessions[0].closed.wait(5.0)
        with pytest.raises(EngineGoneError):
            first.send(pb.EngineCommand(drain=pb.DrainEngine()))
        await second.call(pb.EngineCommand(renew=pb.RenewLeases()), 5.0)
        await first.close()
        await second.close()

    asyncio.run(main())


def test_a_link_draws_a_new_epoch_after_each_loss(served):
    path, sessions, log = served
    epochs = iter([3, 8])

    async def next_epoch():
        return next(epochs)

    async def main():
        link = EngineLink(socket_path=path, worker_id="w", next_epoch=next_epoch, on_step=lambda step: None)
        link.open()
        await asyncio.wait_for(link.started.wait(), 5.0)
        assert link.epoch == 3
        lost = link.lost
        await link.restart()
        await asyncio.wait_for(lost.wait(), 5.0)
        await asyncio.wait_for(link.started.wait(), 5.0)
        assert link.epoch == 8
        await link.close()

    asyncio.run(main())
    assert log.count("start") == 2
    assert sessions[0].closed.is_set()


def test_a_link_knows_the_pairs_of_its_epoch_from_pings(served):
    path, _, _ = served

    async def next_epoch():
        return 1

    async def main():
        link = EngineLink(socket_path=path, worker_id="w", next_epoch=next_epoch, on_step=lambda step: None)
        link.open()
        async with asyncio.timeout(5.0), link.news:
            await link.news.wait_for(lambda: link.stats.steps == 7)
        assert [pair.peer for pair in link.pairs] == ["d/1"]
        lost = link.lost
        await link.restart()
        await asyncio.wait_for(lost.wait(), 5.0)
        assert not link.pairs
        await link.close()

    asyncio.run(main())


def test_a_link_waits_for_an_engine_that_is_not_there_yet(tmp_path):
    path = str(tmp_path / "late.sock")

    async def next_epoch():
        return 1

    async def main():
        link = EngineLink(socket_path=path, worker_id="w", next_epoch=next_epoch, on_step=lambda step: None)
        link.open()
        with pytest.raises(EngineGoneError, match="is not up yet"):
            await link.call(pb.EngineCommand(renew=pb.RenewLeases()), 1.0)
        server = EngineServer(path, lambda send: EchoSession(send, []))
        server.start()
        await asyncio.wait_for(link.started.wait(), 5.0)
        server.stop()
        await asyncio.wait_for(link.lost.wait(), 5.0)
        await link.close()

    asyncio.run(main())


def test_socket_paths_stay_short(tmp_path):
    long = tmp_path / ("x" * 120)
    assert len(socket_path(str(long), "w")) < 108
    assert socket_path(str(long), "w") != socket_path(str(long), "v")
    assert socket_path("/run/p", "w") == str(Path("/run/p/ipc/w.sock"))


def test_a_link_outlives_an_event_that_nobody_can_take(served):
    path, _, _ = served
    epochs = iter([1, 2])
    failures = [RuntimeError("the first step is too much")]

    def on_step(step):
        if failures:
            raise failures.pop()

    async def next_epoch():
        return next(epochs)

    async def main():
        link = EngineLink(socket_path=path, worker_id="w", next_epoch=next_epoch, on_step=on_step)
        link.open()
        await asyncio.wait_for(link.started.wait(), 5.0)
        await asyncio.wait_for(link.lost.wait(), 5.0)
        await asyncio.wait_for(link.started.wait(), 5.0)
        assert link.epoch == 2
        await link.close()

    asyncio.run(main())
    assert not failures


def test_a_server_that_stops_writes_out_what_its_session_said(tmp_path):
    said = threading.Event()

    class Talker(EchoSession):
        def handle(self, command: pb.EngineCommand) -> None:
            for step in range(3000):
                outputs = [pb.RouterOutputs(router_id="r" * 200)]
                self.send(pb.EngineEvent(step=pb.StepEvent(outputs=outputs, stats=pb.WorkerStats(steps=step))))
            said.set()

    server = EngineServer(str(tmp_path / "e.sock"), lambda send: Talker(send, []))
    server.start()
    heard = []

    async def main():
        client = EngineClient(heard.append)
        await client.connect(str(tmp_path / "e.sock"))
        client.send(pb.EngineCommand(check=pb.CheckIntegrity()))
        await asyncio.to_thread(said.wait, 5.0)
        await asyncio.to_thread(server.stop)
        await asyncio.wait_for(client.closed.wait(), 5.0)
        await client.close()

    asyncio.run(main())
    assert [step.stats.steps for step in heard] == list(range(3000))


def test_a_link_closes_whatever_it_is_waiting_for(served):
    path, _, _ = served

    async def main():
        for num_turns in range(40):
            link = EngineLink(socket_path=path, worker_id="w", next_epoch=next_epoch, on_step=lambda step: None)
            link.open()
            await asyncio.wait_for(link.started.wait(), 5.0)
            for _ in range(num_turns % 8):
                await asyncio.sleep(0)
            await asyncio.wait_for(link.close(), 5.0)

    async def next_epoch():
        return 1

    asyncio.run(main())


def test_a_cancelled_call_stays_cancelled_though_its_answer_has_just_come(served):
    path, _, _ = served
    cancelled = []

    def on_step(step):  # EchoSession sends it right behind the answer
        for task in calls:
            cancelled.append(task.cancel())

    async def main():
        client = EngineClient(on_step)
        await client.connect(path)
        calls.append(asyncio.create_task(client.call(pb.EngineCommand(renew=pb.RenewLeases()), 5.0)))
        asyncio.get_running_loop().call_soon(time.sleep, 0.1)  # once it has asked: answer and step are read together
        await asyncio.wait(calls, timeout=5.0)
        await client.close()

    calls: list[asyncio.Task] = []
    asyncio.run(main())
    assert cancelled == [True]
    assert calls[0].cancelled()
