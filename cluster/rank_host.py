"""A rank other than 0 of a worker, in its process: the counterpart of `engine_host`.

    STARTING --start--> SERVING --rank 0 stops the worker, or stop--> ENDED
                           '--rank 0 is gone, or a step fails----------^

It has no front; what rank 0 orders about KV transfers, this rank's own `RankTransfer` does.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable

from cluster.engine_messages import kv_layout
from engine.errors import RankLostError
from engine.follower import Follower
from engine.runner import ModelRunner
from kv_transfer.config import TransferConfig
from kv_transfer.rank_transfer import RankTransfer

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0


class FollowerHost:
    """One rank's model, computing what rank 0 tells."""

    def __init__(
        self, follower: Follower, runner: ModelRunner, transfers: RankTransfer, *, on_end: Callable[[bool], None]
    ) -> None:
        """`on_end` is called once, on the thread that computes: with True where the worker ended as it should."""
        self.follower = follower
        self.runner = runner
        self._transfers = transfers
        follower.on_order = transfers.obey
        follower.make_hook = transfers.hook
        self._on_end = on_end
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="rank-steps", daemon=True)

    def start(self) -> None:
        """Warm the kernels, together with the other ranks, and begin to compute."""
        self.runner.warm_up()
        gc.freeze()
        self._thread.start()

    def stop(self) -> None:
        """Hang up on rank 0 (which ends the worker's epoch, if it has not ended yet)."""
        self.follower.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(STOP_TIMEOUT_S)

    def drain(self, timeout_s: float) -> bool:
        """Have rank 0 drain and end the worker; False if it has not within the time."""
        try:
            self.follower.leave()
        except RankLostError as error:
            log.warning("rank 0 cannot be asked to drain: %s", error)
            return False
        return self._ended.wait(timeout_s)

    def numbers(self) -> dict[str, float]:
        """For the metrics."""
        return {"steps": self.follower.num_steps, "num_blocks": self.runner.kv_cache.num_blocks}

    def _serve(self) -> None:
        as_it_should = False
        try:
            self.follower.serve(self.runner)
            as_it_should = True
        except Exception:
            log.exception("this rank cannot go on")
        finally:
            self._transfers.stop()
            self._ended.set()
            self._on_end(as_it_should)


def make_transfers(
    follower: Follower, runner: ModelRunner, *, model_hash: str, config: TransferConfig, secret: bytes
) -> RankTransfer:
    """What this rank sends and receives, as rank 0 orders it."""
    return RankTransfer(
        layout=kv_layout(runner, model_hash),
        memory=runner.kv_cache,
        config=config,
        secret=secret,
        report=follower.report,
        mark=runner.mark,
    )
