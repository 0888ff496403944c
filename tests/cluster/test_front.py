"""What a front says of itself as its engine comes and goes."""

import asyncio
import math

import pytest

from cluster.front import HAND_BACK_EVERY_S, FrontOptions, FrontState, WorkerFront
from engine.ipc import EngineServer
from protos import worker_pb2 as pb
from router.errors import StoreUnavailableError
from router.store import MemoryStore, Role, WorkerRecord
from tests.engine.test_ipc import EchoSession


def test_a_front_without_its_engine_is_starting_again(tmp_path):
    path = str(tmp_path / "e.sock")
    options = FrontOptions(
        worker_id="w", pool="decode", role="decode", host="127.0.0.1", socket_path=path, secret=b"secret"
    )

    async def main() -> None:
        store = MemoryStore()
        front = WorkerFront(options, store)
        await front.start()
        assert front.state is FrontState.STARTING
        engine = EngineServer(path, lambda send: EchoSession(send, []))
        engine.start()
        await front.ready(10.0)
        async with asyncio.timeout(10.0), front.link.news:
            await front.link.news.wait_for(lambda: front.state is FrontState.SERVING)
        assert [record.worker_id for record in await store.workers()] == ["w"]
        await asyncio.to_thread(engine.stop)
        await asyncio.wait_for(front.link.lost.wait(), 10.0)
        async with asyncio.timeout(10.0), front.link.news:
            await front.link.news.wait_for(lambda: front.state is FrontState.STARTING)
        assert front.status()["state"] == "STARTING"
        await front.stop()
        assert front.state is FrontState.STOPPED

    asyncio.run(main())


class Told(EchoSession):
    """An engine that takes roles, and has requests until it is to hand them back."""

    def __init__(self, send, log: list, roles: list[pb.SetRole], num_running: int = 0) -> None:
        super().__init__(send, log)
        self.roles = roles
        self.num_running = num_running

    def handle(self, command: pb.EngineCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "start":
            self.roles.append(command.start.role)
        elif kind == "set_role":
            self.roles.append(command.set_role)
            self.send(pb.EngineEvent(reply=pb.EngineReply(call_id=command.call_id, description=pb.WorkerDescription())))
        elif kind in ("hand_back", "drain"):
            self.num_running = 0 if kind == "hand_back" else self.num_running
            stats = pb.WorkerStats(num_running=self.num_running)
            self.send(pb.EngineEvent(reply=pb.EngineReply(call_id=command.call_id, stats=stats)))
            self.send(pb.EngineEvent(step=pb.StepEvent(stats=stats)))
        if kind != "renew":
            super().handle(command)
        else:
            stats = pb.WorkerStats(num_running=self.num_running)
            self.send(pb.EngineEvent(reply=pb.EngineReply(call_id=command.call_id, stats=stats)))


class Scene:
    """A front with an engine that takes roles."""

    def __init__(self, tmp_path, store: MemoryStore, num_running: int = 0, **options) -> None:
        self.store = store
        self.roles: list[pb.SetRole] = []
        self.log: list[str] = []
        path = str(tmp_path / "e.sock")
        settings = {"pool": "decode", "role": "decode", "move_after_s": 0.05, "prompt_shares": {"decode": 0.25}}
        self.options = FrontOptions(
            worker_id="w", host="127.0.0.1", socket_path=path, secret=b"secret", **settings | options
        )
        self.engine = EngineServer(path, lambda send: Told(send, self.log, self.roles, num_running))
        self.front = WorkerFront(self.options, store)

    async def __aenter__(self) -> "Scene":
        self.engine.start()
        await self.front.start()
        await self.front.ready(10.0)
        await self.until(lambda: self.front.state is FrontState.SERVING)
        return self

    async def __aexit__(self, *_) -> None:
        await self.front.stop()
        await asyncio.to_thread(self.engine.stop)

    async def until(self, check) -> None:
        async with asyncio.timeout(10.0):
            while not check():  # noqa: ASYNC110 (conditions of several parties)
                await asyncio.sleep(0.005)

    async def listed(self) -> list[tuple[str, str]]:
        return [(record.role, record.pool) for record in await self.store.workers() if record.worker_id == "w"]

    async def list_another(self, *, role: Role = "decode", leaving: bool = False) -> None:
        await self.store.register(
            WorkerRecord(worker_id="x", epoch=0, role=role, address="127.0.0.1:1", leaving=leaving), 100.0
        )


def test_a_role_changes_at_once_and_for_all_lives_to_come(tmp_path):
    async def main() -> None:
        store = MemoryStore()
        async with Scene(tmp_path, store) as scene:
            await scene.list_another()
            assert scene.roles == [pb.SetRole(role="decode", prompt_share=0.25)]
            assert await scene.listed() == [("decode", "decode")]
            for _ in range(2):
                await scene.front.set_role("prefill", 10.0)
            assert scene.roles[1:] == [pb.SetRole(role="prefill")] * 2
            assert await scene.listed() == [("prefill", "prefill")]
            assert scene.front.status()["role"] == scene.front.status()["pool"] == "prefill"
            await scene.until(lambda: "hand_back" in scene.log)
            await scene.front.link.restart()
            await scene.until(lambda: len(scene.roles) == 4)
            assert scene.roles[3] == pb.SetRole(role="prefill")
        async with Scene(tmp_path, store) as scene:
            assert scene.roles == [pb.SetRole(role="prefill")]
            assert scene.front.link.epoch == 3
            assert await scene.listed() == [("prefill", "prefill")]
            assert scene.log.count("hand_back") == 0

    asyncio.run(main())


def test_a_worker_that_is_back_in_the_decode_pool_in_time_moves_nothing(tmp_path):
    async def main() -> None:
        async with Scene(tmp_path, MemoryStore()) as scene:
            await scene.list_another()
            await scene.front.set_role("prefill", 10.0, 0.2)
            await scene.front.set_role("decode", 10.0)
            await asyncio.sleep(0.4)
            assert "hand_back" not in scene.log
            assert await scene.listed() == [("decode", "decode")]

    asyncio.run(main())


def test_a_role_that_cannot_be_changes_nothing(tmp_path):
    class Away(MemoryStore):
        async def set_role(self, worker_id, role) -> None:
            raise StoreUnavailableError("away")

    async def main() -> None:
        async with Scene(tmp_path, Away()) as scene:
            with pytest.raises(ValueError, match=r"must be one of .*, got 'router'"):
                await scene.front.set_role("router", 10.0)
            with pytest.raises(StoreUnavailableError):
                await scene.front.set_role("prefill", 10.0)
            assert (scene.front.role, len(scene.roles)) == ("decode", 1)
        async with Scene(tmp_path, MemoryStore(), pool="decode", role="both") as scene:
            with pytest.raises(ValueError, match="both roles for good"):
                await scene.front.set_role("prefill", 10.0)

    asyncio.run(main())


def test_a_front_that_leaves_gives_everybody_who_asks_the_same_answer(tmp_path):
    async def main() -> None:
        async with Scene(tmp_path, MemoryStore(), num_running=1) as scene:
            await scene.list_another()
            first = asyncio.create_task(scene.front.leave(10.0, 0.3))
            await scene.until(lambda: scene.front.state is FrontState.DRAINING)
            with pytest.raises(ValueError, match="is DRAINING: its role changes no more"):
                await scene.front.set_role("prefill", 10.0)
            assert len(await scene.listed()) == 1, "it is listed as long as it has something"
            second = asyncio.create_task(scene.front.leave(0.0, 0.0))
            await asyncio.sleep(0.1)
            assert not second.done()
            assert "hand_back" not in scene.log
            assert await first == await second == await scene.front.leave(1.0, 1.0)
            assert first.result()["finished"]
            assert scene.log.count("hand_back") == 1
            assert scene.front.state is FrontState.STOPPED
            assert await scene.listed() == []

    asyncio.run(main())


def test_a_front_leaves_when_its_time_is_up(tmp_path):
    async def main() -> None:
        async with Scene(tmp_path, MemoryStore(), num_running=1) as scene:
            answer = await scene.front.leave(0.3, math.inf)
            assert not answer["finished"]
            assert "hand_back" not in scene.log
            assert scene.front.state is FrontState.STOPPED

    asyncio.run(main())


class Forgetful(MemoryStore):
    """A registry that cannot be asked."""

    async def workers(self) -> list[WorkerRecord]:
        raise StoreUnavailableError("away")


@pytest.mark.parametrize("others", ["none", "prefill", "leaving", "unknown"])
def test_nothing_is_handed_back_where_nobody_else_decodes(tmp_path, others):
    async def main() -> None:
        store = Forgetful() if others == "unknown" else MemoryStore()
        async with Scene(tmp_path, store, num_running=1) as scene:
            if others in ("prefill", "leaving"):
                role: Role = "prefill" if others == "prefill" else "decode"
                await scene.list_another(role=role, leaving=others == "leaving")
            assert not (await scene.front.leave(0.5, 0.1))["finished"]
            assert "hand_back" not in scene.log

    asyncio.run(main())


def test_what_a_worker_held_moves_once_there_is_another_one(tmp_path):
    async def main() -> None:
        async with Scene(tmp_path, MemoryStore(), num_running=1) as scene:
            await scene.list_another(leaving=True)
            leave = asyncio.create_task(scene.front.leave(30.0, 0.0))
            await scene.until(lambda: scene.front.state is FrontState.DRAINING)
            await asyncio.sleep(0.5)
            assert not leave.done()
            await scene.list_another()
            assert (await leave)["finished"]
            assert scene.log.count("hand_back") == 1

    asyncio.run(main())


def test_a_front_drains_while_its_engine_process_leaves_and_serves_with_the_next_one(tmp_path):
    async def main() -> None:
        async with Scene(tmp_path, MemoryStore(), num_running=1, move_at_end_after_s=0.05) as scene:
            await scene.list_another()
            scene.front._on_step(pb.StepEvent(draining=True))
            assert scene.front.state is FrontState.DRAINING
            await scene.until(lambda: "hand_back" in scene.log)
            assert (await scene.store.workers())[0].leaving
            await scene.front.link.restart()
            await scene.until(lambda: scene.front.link.epoch == 2 and scene.front.state is FrontState.SERVING)
            assert not (await scene.store.workers())[0].leaving
            num_before = scene.log.count("hand_back")
            await asyncio.sleep(1.5 * HAND_BACK_EVERY_S)
            assert scene.log.count("hand_back") == num_before

    asyncio.run(main())
