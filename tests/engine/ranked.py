"""A worker of several ranks in one process: rank 0 is the caller's, each other rank a thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine
from engine.follower import Follower
from engine.ranks import RankGroup
from engine.runner import ModelRunner

TIMEOUT_S = 30.0
CPU = torch.device("cpu")


def model_options(path: Path | str) -> ModelOptions:
    return ModelOptions(path=str(path))


def cache_options(**options: Any) -> CacheOptions:
    return CacheOptions(**{"block_size": 8, "num_blocks": 40} | options)


def engine_options(size: int, **options: Any) -> EngineOptions:
    settings = {"device": "cpu", "max_step_tokens": 64, "max_running": 12, "tensor_parallel": size} | options
    return EngineOptions(**settings)


class RankedEngine:
    """An engine whose worker has `size` ranks; `followers` are the others'."""

    def __init__(
        self,
        path: Path,
        directory: Path,
        options: EngineOptions,
        cache: CacheOptions,
        *,
        timeout_s: float = TIMEOUT_S,
        lost: bool = False,
    ) -> None:
        """`lost`: the other ranks are to end with an error, which `endings` has then."""
        self.endings: list[BaseException | None] = []
        self._lost = lost
        size, socket = options.tensor_parallel, str(directory / "ranks.sock")
        self.group = RankGroup(socket, size, timeout_s=timeout_s)
        self.followers = [Follower(socket, rank, size, timeout_s=timeout_s) for rank in range(1, size)]
        self.runners: dict[int, ModelRunner] = {}
        self._ready = threading.Semaphore(0)
        self._threads = ThreadPoolExecutor(size)
        self._path, self._options, self._cache = path, options, cache
        self._futures: list[Future[None]] = [self._threads.submit(self._follow, each) for each in self.followers]
        self.engine = Engine(model_options(path), cache, options, ranks=self.group)

    def _follow(self, follower: Follower) -> None:
        try:
            parallel = follower.connect(CPU)
            runner = ModelRunner(model_options(self._path), self._cache, self._options, parallel=parallel)
            self.runners[follower.rank] = runner
            self._ready.release()
            follower.serve(runner)
        finally:
            follower.close()

    def __enter__(self) -> RankedEngine:
        for _ in self.followers:
            assert self._ready.acquire(timeout=TIMEOUT_S)
        self.engine.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.stop()
        try:
            self.endings = [future.exception(TIMEOUT_S) for future in self._futures]
        finally:
            self._threads.shutdown()
        for ending in self.endings:
            if ending is not None and not self._lost:
                raise ending
