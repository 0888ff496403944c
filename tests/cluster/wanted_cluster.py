"""A cluster as commands see it: a run directory, a real Valkey with a wish in it, and a controller that is a thread."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from cluster.change_plan import pools_of
from cluster.cluster_store import ClusterStore, Decision, Wish
from cluster.config import from_plain, to_plain
from cluster.members import Member, Phase
from cluster.run_dir import Phase as RunPhase
from cluster.run_dir import ProcessRef, RunDir, RunState
from tests.real_valkey import RealValkey

YAML: dict[str, Any] = {
    "model": {"path": "demo"},
    "prefill": {"workers": 1},
    "decode": {"workers": 2},
    "router": {"port": 0},
    "drain_s": 20,
}


def plain(**sections: Any) -> dict[str, Any]:
    """YAML with some sections replaced, validated, as plain data."""
    return to_plain(from_plain({**YAML, **sections}))


class WantedCluster:
    """Writes what `up` writes; its run directory names this process as the supervisor."""

    def __init__(self, run_dir: RunDir, valkey: RealValkey) -> None:
        self.run_dir = run_dir
        self.store = ClusterStore(valkey.url)
        secret = run_dir.path / "secrets" / "valkey"
        secret.write_text("sesame")
        run_dir.write_state(
            RunState(
                phase=RunPhase.READY,
                run_id="r1",
                supervisor=ProcessRef.of(os.getpid()),
                sockets="",
                redis_url=f"redis://127.0.0.1:{valkey.port}/0",
            )
        )

    def up(self, **sections: Any) -> int:
        """Want YAML with some sections replaced; its router got port 50123."""
        config = plain(**sections)
        config["router"]["port"] = config["router"]["port"] or 50123
        self.run_dir.config_file.write_text(json.dumps(config))
        sizes = {pool: config[pool]["workers"] for pool in pools_of(config)}
        decision = Decision(at=time.time(), by="up", what="up", reason="")
        return self.store.change(0, decision, config=config, sizes=sizes)

    def wish(self) -> Wish:
        wish = self.store.wish()
        assert wish is not None
        return wish

    def put(self, member_id: str, *, phase: Phase = Phase.READY, pool: str = "", born: str = "", why: str = "") -> None:
        """A member that the controller knows."""
        name = member_id.partition("-")[0]
        kind: Any = "router" if name == "router" else "worker"
        of_pool: Any = "" if kind == "router" else pool or name
        of_birth: Any = "" if kind == "router" else born or name
        self.store.put(
            Member(
                member_id=member_id, kind=kind, pool=of_pool, born=of_birth, phase=phase, digest="d", why=why, since=1.0
            )
        )

    def close(self) -> None:
        self.store.close()


class FakeController:
    """Sees each wish at once, says what is under way for `takes_s`, then that all is as wanted."""

    def __init__(self, valkey: RealValkey, takes_s: float = 0.0) -> None:
        self._store = ClusterStore(valkey.url)
        self._takes_s = takes_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> FakeController:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._store.close()

    def _run(self) -> None:
        seen, since = 0, 0.0
        while not self._over.is_set():
            wish = self._store.wish()
            if wish is not None:
                if wish.generation != seen:
                    seen, since = wish.generation, time.monotonic()
                settled = time.monotonic() - since >= self._takes_s
                self._store.say(report(wish, settled=settled), ttl_s=30)
            self._store.wait(0.05)


def report(wish: Wish, *, settled: bool = True, **more: Any) -> dict[str, Any]:
    """What a controller says that has seen this wish."""
    return {
        "state": "deployed",
        "generation": wish.generation,
        "settled": settled,
        "waiting": [] if settled else ["decode-2: starting"],
        "mode": wish.config["scaling"]["mode"],
        "sizes": wish.sizes,
        "advice": None,
        "load": {},
        **more,
    }
