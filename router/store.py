"""What must outlive a process: which workers and routers exist, and which life of each is the newest.

A record is a lease: whoever wrote it renews it before its time to live is over, else it is forgotten.
Epochs only grow. A worker that finds itself stale (`StaleEpochError`) must stop serving.

`RedisStore` speaks to any server of the Redis protocol; `MemoryStore` serves one process. Keys:

    pdserve:epoch:<worker_id>    counter, the newest epoch
    pdserve:worker:<worker_id>   record (JSON), expires
    pdserve:role:<worker_id>     prefill, decode or both: the role it was given, kept for its lives to come
    pdserve:workers              set of worker ids
    pdserve:router:<router_id>   record (JSON), expires
    pdserve:routers              set of router ids
    pdserve:fleet                channel: something changed
    pdserve:request:<request_id> see request_store.py
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from router.errors import StaleEpochError, StoreUnavailableError
from router.request_store import MemoryRequestStore, RedisRequestStore, RequestStore
from router.wakeup import Signal

Role = Literal["prefill", "decode", "both"]

PREFIX = "pdserve:"

# KEYS: epoch counter, record, set of ids. ARGV: epoch, record, ttl in ms, id. Returns 0 when stale.
_REGISTER = """
local newest = tonumber(redis.call('GET', KEYS[1]) or '0')
if newest > tonumber(ARGV[1]) then return 0 end
local changed = redis.call('GET', KEYS[2]) ~= ARGV[2]
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[3], ARGV[4])
if changed then return 2 end
return 1
"""

# KEYS: record, set of ids. ARGV: epoch, id. Removes the record only if it is of this epoch.
_DEREGISTER = """
local record = redis.call('GET', KEYS[1])
if not record then return 0 end
if cjson.decode(record)['epoch'] ~= tonumber(ARGV[1]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
return 1
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerRecord:
    """How to reach one life of a worker."""

    worker_id: str
    epoch: int
    role: Role
    address: str
    """host:port of its gRPC server."""
    metrics_address: str = ""
    """host:port of its metrics page; empty: none."""
    pool: str = ""
    started_at: float = 0.0
    """Unix time, for people to read; nothing is decided by it."""
    leaving: bool = False
    """It takes nothing new and ends soon: no place for what another worker gives back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterRecord:
    """How to reach one router."""

    router_id: str
    address: str
    """host:port of its gRPC server."""
    metrics_address: str = ""
    started_at: float = 0.0
    """Unix time, for people to read."""


class FleetStore(Protocol):
    """The registry. Each call ends within a bound, at worst with StoreUnavailableError."""

    @property
    def requests(self) -> RequestStore:
        """Where resumable requests run."""

    async def next_epoch(self, worker_id: str) -> int:
        """A number greater than any this worker had before."""

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        """Write or renew a worker's record; StaleEpochError if a newer epoch was given out."""

    async def deregister(self, worker_id: str, epoch: int) -> None:
        """Remove a worker's record if it is of this epoch."""

    async def workers(self) -> list[WorkerRecord]:
        """All records whose lease holds, by worker_id."""

    async def role_of(self, worker_id: str) -> Role | None:
        """The role that a worker was given; None: it has the one that it was made with."""

    async def set_role(self, worker_id: str, role: Role) -> None:
        """Keep the role that a worker is given, for all its lives to come."""

    async def register_router(self, record: RouterRecord, ttl_s: float) -> None:
        """Write or renew a router's record."""

    async def deregister_router(self, router_id: str) -> None:
        """Remove a router's record."""

    async def routers(self) -> list[RouterRecord]:
        """All records whose lease holds, by router_id."""

    def watch(self) -> AsyncIterator[None]:
        """Yields at once, then whenever the workers may have changed. Never raises for an unreachable store."""

    async def close(self) -> None:
        """Give connections back."""


class RedisStore:
    """The registry in a server of the Redis protocol."""

    def __init__(self, url: str, *, timeout_s: float = 2.0, refresh_s: float = 1.0) -> None:
        """Connects on first use. `timeout_s` bounds each call; `watch` looks at least every `refresh_s`."""
        self._redis = redis.asyncio.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),
        )
        self._timeout_s = timeout_s
        self._refresh_s = refresh_s
        self._requests = RedisRequestStore(self._redis, self._call)

    @property
    def requests(self) -> RequestStore:
        """Where resumable requests run."""
        return self._requests

    async def next_epoch(self, worker_id: str) -> int:
        """A number greater than any this worker had before."""
        return int(await self._call("next_epoch", lambda: self._redis.incr(f"{PREFIX}epoch:{worker_id}")))

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        """Write or renew a worker's record; StaleEpochError if a newer epoch was given out."""
        keys = (f"{PREFIX}epoch:{record.worker_id}", f"{PREFIX}worker:{record.worker_id}", f"{PREFIX}workers")
        body = json.dumps(asdict(record))
        args = (str(record.epoch), body, str(round(ttl_s * 1000)), record.worker_id)
        outcome = await self._call("register", lambda: self._redis.eval(_REGISTER, len(keys), *keys, *args))
        if outcome == 0:
            raise StaleEpochError(
                f"worker {record.worker_id} of epoch {record.epoch} is not its newest life; "
                "stop serving and take a new epoch"
            )
        if outcome == 2:
            await self._announce()

    async def deregister(self, worker_id: str, epoch: int) -> None:
        """Remove a worker's record if it is of this epoch."""
        keys = (f"{PREFIX}worker:{worker_id}", f"{PREFIX}workers")
        await self._call("deregister", lambda: self._redis.eval(_DEREGISTER, len(keys), *keys, str(epoch), worker_id))
        await self._announce()

    async def workers(self) -> list[WorkerRecord]:
        """All records whose lease holds, by worker_id."""
        return [WorkerRecord(**json.loads(body)) for body in await self._records("worker")]

    async def role_of(self, worker_id: str) -> Role | None:
        """The role that a worker was given; None: it has the one that it was made with."""
        role = await self._call("role_of", lambda: self._redis.get(f"{PREFIX}role:{worker_id}"))
        return role if role in get_args(Role) else None

    async def set_role(self, worker_id: str, role: Role) -> None:
        """Keep the role that a worker is given, for all its lives to come."""
        await self._call("set_role", lambda: self._redis.set(f"{PREFIX}role:{worker_id}", role))

    async def register_router(self, record: RouterRecord, ttl_s: float) -> None:
        """Write or renew a router's record."""
        key = f"{PREFIX}router:{record.router_id}"
        body = json.dumps(asdict(record))
        await self._call("register_router", lambda: self._redis.set(key, body, px=round(ttl_s * 1000)))
        await self._call("register_router", lambda: self._redis.sadd(f"{PREFIX}routers", record.router_id))

    async def deregister_router(self, router_id: str) -> None:
        """Remove a router's record."""
        await self._call("deregister_router", lambda: self._redis.delete(f"{PREFIX}router:{router_id}"))
        await self._call("deregister_router", lambda: self._redis.srem(f"{PREFIX}routers", router_id))

    async def routers(self) -> list[RouterRecord]:
        """All records whose lease holds, by router_id."""
        return [RouterRecord(**json.loads(body)) for body in await self._records("router")]

    async def watch(self) -> AsyncIterator[None]:
        """Yields at once, after each announcement, and at least every `refresh_s` (leases run out silently)."""
        yield
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(f"{PREFIX}fleet")
                    yield
                    while True:
                        await channel.get_message(timeout=self._refresh_s)
                        yield
            except (RedisError, OSError, TimeoutError):
                # The bound of the refresh is also the pause before the next attempt to connect.
                await asyncio.sleep(self._refresh_s)
                yield

    async def close(self) -> None:
        """Give connections back."""
        await self._redis.aclose()

    async def _announce(self) -> None:
        await self._call("announce", lambda: self._redis.publish(f"{PREFIX}fleet", "changed"))

    async def _records(self, kind: str) -> list[str]:
        """Bodies of all living records of a kind, by id; ids whose lease ran out are dropped from the set."""
        ids: list[str] = sorted(await self._call(f"{kind}s", lambda: self._redis.smembers(f"{PREFIX}{kind}s")))
        if not ids:
            return []
        keys = [f"{PREFIX}{kind}:{name}" for name in ids]
        bodies = await self._call(f"{kind}s", lambda: self._redis.mget(keys))
        gone = [name for name, body in zip(ids, bodies, strict=True) if body is None]
        if gone:  # one that comes back is added again with its next renewal
            await self._call(f"{kind}s", lambda: self._redis.srem(f"{PREFIX}{kind}s", *gone))
        return [body for body in bodies if body is not None]

    async def _call(self, name: str, start: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await start()
        except ResponseError as error:
            raise StoreUnavailableError(f"the store refused {name}: {error}") from error
        except TimeoutError as error:
            raise StoreUnavailableError(f"the store did not answer {name} within {self._timeout_s:g} s") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"the store cannot be reached for {name}: {error}") from error


class MemoryStore:
    """The registry in one process, for tests and single-process use; leases run on a monotonic clock."""

    def __init__(self, *, refresh_s: float = 1.0) -> None:
        self._epochs: dict[str, int] = {}
        self._workers: dict[str, tuple[WorkerRecord, float]] = {}
        self._routers: dict[str, tuple[RouterRecord, float]] = {}
        self._roles: dict[str, Role] = {}
        self._changed = Signal()
        self._refresh_s = refresh_s
        self._requests = MemoryRequestStore()

    @property
    def requests(self) -> RequestStore:
        """Where resumable requests run."""
        return self._requests

    async def next_epoch(self, worker_id: str) -> int:
        """A number greater than any this worker had before."""
        self._epochs[worker_id] = self._epochs.get(worker_id, 0) + 1
        return self._epochs[worker_id]

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        """Write or renew a worker's record; StaleEpochError if a newer epoch was given out."""
        if self._epochs.get(record.worker_id, 0) > record.epoch:
            raise StaleEpochError(f"worker {record.worker_id} of epoch {record.epoch} is not its newest life")
        known = self._workers.get(record.worker_id)
        self._workers[record.worker_id] = (record, time.monotonic() + ttl_s)
        if known is None or known[0] != record:
            self._changed.notify()

    async def deregister(self, worker_id: str, epoch: int) -> None:
        """Remove a worker's record if it is of this epoch."""
        known = self._workers.get(worker_id)
        if known is not None and known[0].epoch == epoch:
            del self._workers[worker_id]
            self._changed.notify()

    async def workers(self) -> list[WorkerRecord]:
        """All records whose lease holds, by worker_id."""
        now = time.monotonic()
        return [record for _, (record, until) in sorted(self._workers.items()) if until > now]

    async def role_of(self, worker_id: str) -> Role | None:
        """The role that a worker was given; None: it has the one that it was made with."""
        return self._roles.get(worker_id)

    async def set_role(self, worker_id: str, role: Role) -> None:
        """Keep the role that a worker is given, for all its lives to come."""
        self._roles[worker_id] = role

    async def register_router(self, record: RouterRecord, ttl_s: float) -> None:
        """Write or renew a router's record."""
        self._routers[record.router_id] = (record, time.monotonic() + ttl_s)

    async def deregister_router(self, router_id: str) -> None:
        """Remove a router's record."""
        self._routers.pop(router_id, None)

    async def routers(self) -> list[RouterRecord]:
        """All records whose lease holds, by router_id."""
        now = time.monotonic()
        return [record for _, (record, until) in sorted(self._routers.items()) if until > now]

    async def watch(self) -> AsyncIterator[None]:
        """Yields at once, after each change, and at least every `refresh_s`."""
        while True:
            seen = self._changed.version
            yield
            await self._changed.wait(seen, timeout_s=self._refresh_s)

    async def close(self) -> None:
        """Nothing to give back."""
