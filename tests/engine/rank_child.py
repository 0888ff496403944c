"""One rank of a worker in a process of its own: `python -m tests.engine.rank_child '{"rank": ..., ...}'`.

It prints a line of JSON when it is ready, and one for each thing that happens; rank 0 then answers one endless
request after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).parents[2]
BOUND_S = 60.0
EXIT_LOST = 3


class RankChild:
    """The parent's handle of a rank."""

    def __init__(
        self, path: str, model: Path, rank: int, size: int, timeout_s: float, *, device: str = "cpu", gpu: str = ""
    ) -> None:
        start = {"path": path, "model": str(model), "rank": rank, "size": size, "timeout_s": timeout_s}
        start["device"] = device
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.rank_child", json.dumps(start)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if gpu else None,
        )
        self._events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def event(self, name: str) -> dict[str, Any]:
        """The next event, which must be of this name."""
        found = self._events.get(timeout=BOUND_S)
        assert name in found, found
        return found

    def wait(self, timeout_s: float) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Kill the process if it still runs."""
        self.process.kill()
        self.process.wait(BOUND_S)
        self._reader.join(BOUND_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self._events.put(json.loads(line))


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


ending = threading.Lock()
"""Taken for good by the first thread that finds another rank lost."""


def lost(*what: object) -> None:
    ending.acquire()
    say(lost=[str(word) for word in what])
    os._exit(EXIT_LOST)


def follow(path: str, model: str, rank: int, size: int, timeout_s: float, device: str) -> None:
    from engine.errors import RankLostError
    from engine.follower import Follower
    from engine.runner import ModelRunner, choose_device
    from tests.engine.ranked import cache_options, engine_options, model_options

    follower = Follower(path, rank, size, timeout_s=timeout_s)
    follower.on_lost = lost
    options = engine_options(size, device=device)
    parallel = follower.connect(choose_device(options.device))
    block_size = 8 if options.device == "cpu" else 16
    runner = ModelRunner(model_options(model), cache_options(block_size=block_size), options, parallel=parallel)
    say(ready=rank)
    try:
        follower.serve(runner)
    except RankLostError as error:  # found out by the step that computes, before the reader has
        lost(error)
    say(ended=rank)


def lead(path: str, model: str, rank: int, size: int, timeout_s: float, device: str) -> None:
    from engine.engine import Engine
    from engine.ranks import RankGroup
    from tests.engine.ranked import cache_options, engine_options, model_options
    from tests.session_pair import make_request

    group = RankGroup(path, size, timeout_s=timeout_s)
    group.on_lost = lost
    with Engine(model_options(model), cache_options(), engine_options(size, device=device), ranks=group) as engine:
        say(ready=rank)
        until = time.monotonic() + BOUND_S
        while time.monotonic() < until:
            engine.generate([make_request("x", [5] * 20, max_tokens=100)])


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    (lead if settings["rank"] == 0 else follow)(**settings)
