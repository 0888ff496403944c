"""The cluster of a shape: what its YAML says, and how it is brought up and down.

A shape is `1p1d` (prefill and decode workers) or `2colocated` (workers that do both jobs); any counts are one. `tp` and
a number before a pool is its tensor parallelism, and a dash then stands between the pools: `tp2p-2d` is one prefill
worker of two ranks and two decode workers, `2p-tp2d` two prefill workers and one decode worker of two ranks.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster import launch
from cluster.config import load_config
from cluster.run_dir import RunDir

DRAIN_S = 2.0
PREFILL_MAX_RUNNING = 64
DECODE_MAX_RUNNING = 256
"""As vLLM's default."""
MAX_QUEUED = 8192
LOG_TAIL = 15
NUM_ERRORS = 5
_POOL = r"([1-9]\d*)?(?:tp([1248]))?"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """How many workers of which kind, and how many ranks each of them has."""

    mode: Literal["split", "colocated"]
    prefill: int
    decode: int
    """Of a colocated shape: all workers."""
    prefill_ranks: int = 1
    decode_ranks: int = 1

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From its name; ValueError for anything else."""
        if (match := re.fullmatch(r"([1-9]\d*)p([1-9]\d*)d", text)) is not None:
            return cls("split", int(match[1]), int(match[2]))
        if (match := re.fullmatch(rf"{_POOL}p-{_POOL}d", text)) is not None:
            prefill, prefill_ranks, decode, decode_ranks = (int(number or 1) for number in match.groups())
            return cls("split", prefill, decode, prefill_ranks, decode_ranks)
        if (match := re.fullmatch(r"([1-9]\d*)(?:tp([1248]))?colocated", text)) is not None:
            return cls("colocated", 0, int(match[1]), 1, int(match[2] or 1))
        raise ValueError(
            "a shape is NpMd, [N][tpK]p-[M][tpK]d or N[tpK]colocated, such as 1p1d, tp2p-2d or 2colocated; "
            f"got {text!r}"
        )

    @property
    def name(self) -> str:
        """What `parse` understands."""
        if self.mode == "colocated":
            return f"{self.decode}{_ranks(self.decode_ranks)}colocated"
        if self.prefill_ranks == self.decode_ranks == 1:
            return f"{self.prefill}p{self.decode}d"
        return f"{_pool(self.prefill, self.prefill_ranks)}p-{_pool(self.decode, self.decode_ranks)}d"

    @property
    def num_workers(self) -> int:
        """Of both kinds."""
        return self.prefill + self.decode

    @property
    def num_gpus(self) -> int:
        """As many as its ranks."""
        return self.prefill * self.prefill_ranks + self.decode * self.decode_ranks


def _pool(workers: int, ranks: int) -> str:
    return _ranks(ranks) if workers == 1 and ranks > 1 else f"{workers}{_ranks(ranks)}"


def _ranks(ranks: int) -> str:
    return f"tp{ranks}" if ranks > 1 else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What is served, and on what."""

    directory: Path
    device: Literal["cpu", "cuda"]
    dtype: str
    num_gpus: int = 0
    """Of the machine, told to Ray rather than left to what it finds."""
    overrides: Sequence[str] = ()
    """`key.key=value` each, put into the YAML last."""


def cluster_yaml(shape: Shape, model: Model) -> dict[str, Any]:
    """The content of the YAML; ValueError for an override that is not of the form key=value."""
    pool = {"device": model.device, "max_running": DECODE_MAX_RUNNING}
    content: dict[str, Any] = {
        "mode": shape.mode,
        "model": {"path": str(model.directory), "name": "bench", "load_format": "dummy", "dtype": model.dtype},
        "cache": {"prefix_caching": False},
        "decode": pool | {"workers": shape.decode, "tensor_parallel": shape.decode_ranks},
        "router": {"port": 0, "max_queued": MAX_QUEUED},
        "drain_s": DRAIN_S,
    }
    if shape.mode == "split":
        content["prefill"] = pool | {
            "workers": shape.prefill,
            "tensor_parallel": shape.prefill_ranks,
            "max_running": PREFILL_MAX_RUNNING,
        }
    if model.device == "cuda":
        content["ray"] = {"num_gpus": model.num_gpus}
    for override in model.overrides:
        key, equals, value = override.partition("=")
        *sections, last = key.split(".")
        if not equals or not all([*sections, last]):
            raise ValueError(f"an override is key.key=value, such as transfer.max_ctas=4, got {override!r}")
        if shape.mode == "colocated" and sections[:1] == ["prefill"]:
            continue
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    return content


class ClusterError(RuntimeError):
    """A cluster did not start, or is no more."""


@dataclass(slots=True)
class Cluster:
    """One that runs."""

    address: str
    start_s: float
    """From nothing to ready."""
    steps: dict[str, float]
    """Seconds of each step of the start; of a worker or router: since the deployment began."""
    run_dir: RunDir
    process: subprocess.Popen[bytes]
    errors: list[str] = field(default_factory=list)
    """What its processes logged as errors until it was stopped."""

    def check(self) -> None:
        """ClusterError unless it still runs."""
        if self.process.poll() is not None:
            raise ClusterError(f"the supervisor ended with {self.process.returncode}")


@contextlib.contextmanager
def running(
    content: Mapping[str, Any], say: Say, *, timeout_s: float, name: str, keep_logs: Path | None = None
) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts; ConfigError, LaunchError or ClusterError if it does not start.

    It ends with this process, however that ends.
    """
    with tempfile.TemporaryDirectory(prefix="pdserve-serve-") as folder:
        file, run_dir = Path(folder) / "cluster.yaml", RunDir(Path(folder) / "run")
        file.write_text(yaml.safe_dump({**content, "start_timeout_s": max(1.0, timeout_s)}))
        began = time.monotonic()
        config = launch.check(load_config(file), run_dir)
        launched = launch.start(config, run_dir, attached=True)
        cluster = Cluster("", 0.0, {}, run_dir, launched.process)
        try:
            _follow(launched, cluster, say)
            cluster.start_s = time.monotonic() - began
            say(f"{name}: ready at {cluster.address} after {cluster.start_s:.1f} s")
            yield cluster
        finally:
            cluster.errors += errors_in(run_dir.logs)
            for line in cluster.errors:
                say(f"{name}: logged: {line}")
            stopping = time.monotonic()
            launch.stop(run_dir, DRAIN_S + launch.STOP_MARGIN_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launched.process.wait(timeout=launch.STOP_MARGIN_S)
            say(f"{name}: down after {time.monotonic() - stopping:.1f} s")
            if keep_logs is not None:
                _keep(run_dir, keep_logs / f"{name}.tar.gz")


def _follow(launched: launch.Launched, cluster: Cluster, say: Say) -> None:
    for event in launched.events:
        match event["event"]:
            case "done":
                cluster.steps[event["what"].partition(" at ")[0]] = event["seconds"]
                say(f"  {event['what']} ({event['seconds']:.1f} s)")
            case "ready":
                cluster.address = event["routers"][0]
                return
            case "failed":
                for line in log_tails(cluster.run_dir.logs):
                    print(line, file=sys.stderr)
                raise ClusterError(f"the cluster did not start: {event['message']}")
    raise ClusterError("the supervisor said nothing more")


def errors_in(logs: Path) -> list[str]:
    """The first errors that each process logged, a line each."""
    found = []
    for file in sorted(logs.glob("*.log")):
        lines = [_error_of(line) for line in file.read_text(errors="replace").splitlines() if line.startswith("{")]
        found += [f"{file.stem}: {line}" for line in [line for line in lines if line][:NUM_ERRORS]]
    return found


def _error_of(line: str) -> str | None:
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if str(entry.get("level", "")).lower() in ("error", "critical"):
            raised = str(entry.get("error", "")).strip().rpartition("\n")[2]
            return f"{entry.get('msg', '')} {raised}".strip()[:500]
    return None


def log_tails(logs: Path) -> list[str]:
    """The last lines of every log, for one who cannot look there any more."""
    lines = []
    for file in sorted(logs.glob("*")):
        tail = file.read_text(errors="replace").splitlines()[-LOG_TAIL:] if file.is_file() else []
        if tail:
            lines += [f"--- {file.name}", *(line[:2000] for line in tail)]
    return lines


def _keep(run_dir: RunDir, file: Path) -> None:
    """Ours and Ray's logs as one archive."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        archive.add(run_dir.logs, "logs")
        for logs in run_dir.path.glob("ray/session_2*/logs"):
            archive.add(logs, f"ray/{logs.parent.name}")
