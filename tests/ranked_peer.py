"""A worker of several ranks for the split tests: rank 0 as a `Peer`, each other rank's host on threads."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from cluster.rank_host import FollowerHost, make_transfers
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine
from engine.follower import Follower
from engine.model_source import fingerprint
from engine.ranks import RankGroup
from engine.runner import ModelRunner
from kv_transfer.config import TransferConfig
from tests.session_pair import Peer

TIMEOUT_S = 30.0


class RankedPeer(Peer):
    """One worker of `size` ranks, spoken to through rank 0's session."""

    def __init__(
        self,
        name: str,
        model: Path,
        directory: Path,
        size: int,
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        max_step_tokens: int = 64,
        transfer: TransferConfig | None = None,
    ) -> None:
        self._settings = (
            ModelOptions(path=str(model)),
            CacheOptions(block_size=block_size, num_blocks=num_blocks),
            EngineOptions(max_step_tokens=max_step_tokens, tensor_parallel=size, device="cpu"),
        )
        self.transfer = transfer or TransferConfig()
        self.followers: dict[int, FollowerHost] = {}
        self._threads = ThreadPoolExecutor(max(1, size))
        self._ended = {rank: threading.Event() for rank in range(1, size)}
        socket = str(directory / f"{name}.ranks")
        group = RankGroup(socket, size, timeout_s=TIMEOUT_S) if size > 1 else None
        self._starting: list[Future[None]] = [
            self._threads.submit(self._follow, Follower(socket, rank, size, timeout_s=TIMEOUT_S))
            for rank in self._ended
        ]
        engine = Engine(*self._settings, ranks=group)
        super().__init__(name, model, directory, engine=engine, transfer=self.transfer)
        for future in self._starting:
            future.result(TIMEOUT_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for ended in self._ended.values():
            assert ended.wait(TIMEOUT_S)
        for host in self.followers.values():
            host.stop()
        self._threads.shutdown()

    def _follow(self, follower: Follower) -> None:
        model, cache, options = self._settings
        parallel = follower.connect(torch.device("cpu"))
        runner = ModelRunner(model, cache, options, parallel=parallel)
        model_hash = fingerprint(runner.source, model.load_format)
        transfers = make_transfers(follower, runner, model_hash=model_hash, config=self.transfer, secret=b"secret")
        host = FollowerHost(follower, runner, transfers, on_end=lambda well: self._ended[follower.rank].set())
        self.followers[follower.rank] = host
        host.start()
