"""What a front says of itself as its engine comes and goes."""

import asyncio

from cluster.front import FrontOptions, FrontState, WorkerFront
from engine.ipc import EngineServer
from router.store import MemoryStore
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
