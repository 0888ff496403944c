"""Where resumable requests run: what a router must know to go on with one that another router served.

A record is written when a request is accepted and lives as long as the request may take, and a while after its end.
`generation` counts the routers that served it: what an older one still writes is refused. Prompts and keys do not
leave the store in logs; the owner is a digest of the caller's API key.

    pdserve:request:<request_id>    hash, expires
"""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import redis.asyncio

PREFIX = "pdserve:request:"

# KEYS: hash. ARGV: ttl in ms, then fields and values. Returns 1 if it was written, 0 if there is one.
_CLAIM = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""

# KEYS: hash. ARGV: router id. Returns the fields and values, or nothing.
_TAKE_OVER = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
redis.call('HSET', KEYS[1], 'router_id', ARGV[1])
redis.call('HINCRBY', KEYS[1], 'generation', 1)
return redis.call('HGETALL', KEYS[1])
"""

# KEYS: hash. ARGV: generation, ttl in ms (0: as it is), then fields and values. Returns 0 when stale.
_UPDATE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 1 end
if redis.call('HGET', KEYS[1], 'generation') ~= ARGV[1] then return 0 end
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
if ARGV[2] ~= '0' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """One resumable request."""

    request_id: str
    owner: str
    """Digest of the caller's API key; empty: none was asked for."""
    body: str
    """Digest of the request, to tell it from another one of the same id."""
    request: bytes
    """The GenerateRequest, with its seed."""
    router_id: str
    generation: int = 0
    worker_id: str = ""
    """The decode worker that has it, if one does, and which life of it."""
    epoch: int = 0
    attempt: int = -1
    has_ended: bool = False
    """Whether its last word has been said."""


class RequestStore(Protocol):
    """Records of resumable requests. Each call ends within a bound, at worst with StoreUnavailableError."""

    async def claim(self, record: RequestRecord, ttl_s: float) -> bool:
        """Write a record; False if there is one of this id."""

    async def find(self, request_id: str) -> tuple[RequestRecord, float] | None:
        """The record, and the seconds until it expires."""

    async def take_over(self, request_id: str, router_id: str) -> RequestRecord | None:
        """Make a router the one that serves it, in the next generation."""

    async def runs_at(self, record: RequestRecord) -> bool:
        """Note its worker, epoch and attempt; False if the record is of a later generation (not if it is gone)."""

    async def ended(self, request_id: str, generation: int, ttl_s: float) -> None:
        """Nothing runs any more: keep the record for so long."""


class RedisRequestStore:
    """The records in a server of the Redis protocol."""

    def __init__(
        self, client: redis.asyncio.Redis, call: Callable[[str, Callable[[], Awaitable[Any]]], Awaitable[Any]]
    ):
        """`call(name, start)` bounds a command and translates its errors."""
        self._redis = client
        self._call = call

    async def claim(self, record: RequestRecord, ttl_s: float) -> bool:
        """Write a record; False if there is one of this id."""
        fields = [item for pair in _to_fields(record).items() for item in pair]
        args = (str(round(ttl_s * 1000)), *fields)
        key = PREFIX + record.request_id
        return bool(await self._call("claim", lambda: self._redis.eval(_CLAIM, 1, key, *args)))

    async def find(self, request_id: str) -> tuple[RequestRecord, float] | None:
        """The record, and the seconds until it expires."""
        key = PREFIX + request_id
        fields = await self._call("find", lambda: self._redis.hgetall(key))
        if not fields:
            return None
        left_ms = await self._call("find", lambda: self._redis.pttl(key))
        return _from_fields(request_id, fields), max(0.0, left_ms / 1000)

    async def take_over(self, request_id: str, router_id: str) -> RequestRecord | None:
        """Make a router the one that serves it, in the next generation."""
        key = PREFIX + request_id
        flat = await self._call("take_over", lambda: self._redis.eval(_TAKE_OVER, 1, key, router_id))
        return _from_fields(request_id, dict(zip(flat[::2], flat[1::2], strict=True))) if flat else None

    async def runs_at(self, record: RequestRecord) -> bool:
        """Note its worker, epoch and attempt; False if the record is of a later generation."""
        fields = ("worker_id", record.worker_id, "epoch", str(record.epoch), "attempt", str(record.attempt))
        return await self._update(record.request_id, record.generation, 0.0, *fields)

    async def ended(self, request_id: str, generation: int, ttl_s: float) -> None:
        """Nothing runs any more: keep the record for so long."""
        await self._update(request_id, generation, ttl_s, "has_ended", "1")

    async def _update(self, request_id: str, generation: int, ttl_s: float, *fields: str) -> bool:
        key, args = PREFIX + request_id, (str(generation), str(round(ttl_s * 1000)), *fields)
        return bool(await self._call("update", lambda: self._redis.eval(_UPDATE, 1, key, *args)))


class MemoryRequestStore:
    """The records in one process, for tests and single-process use."""

    def __init__(self) -> None:
        self._records: dict[str, tuple[RequestRecord, float]] = {}

    async def claim(self, record: RequestRecord, ttl_s: float) -> bool:
        """Write a record; False if there is one of this id."""
        if self._living(record.request_id) is not None:
            return False
        self._records[record.request_id] = (record, time.monotonic() + ttl_s)
        return True

    async def find(self, request_id: str) -> tuple[RequestRecord, float] | None:
        """The record, and the seconds until it expires."""
        found = self._living(request_id)
        return None if found is None else (found[0], found[1] - time.monotonic())

    async def take_over(self, request_id: str, router_id: str) -> RequestRecord | None:
        """Make a router the one that serves it, in the next generation."""
        found = self._living(request_id)
        if found is None:
            return None
        record = replace(found[0], router_id=router_id, generation=found[0].generation + 1)
        self._records[request_id] = (record, found[1])
        return record

    async def runs_at(self, record: RequestRecord) -> bool:
        """Note its worker, epoch and attempt; False if the record is of a later generation."""
        found = self._living(record.request_id)
        if found is None or found[0].generation != record.generation:
            return found is None
        known = replace(found[0], worker_id=record.worker_id, epoch=record.epoch, attempt=record.attempt)
        self._records[record.request_id] = (known, found[1])
        return True

    async def ended(self, request_id: str, generation: int, ttl_s: float) -> None:
        """Nothing runs any more: keep the record for so long."""
        found = self._living(request_id)
        if found is not None and found[0].generation == generation:
            self._records[request_id] = (replace(found[0], has_ended=True), time.monotonic() + ttl_s)

    def _living(self, request_id: str) -> tuple[RequestRecord, float] | None:
        found = self._records.get(request_id)
        if found is not None and found[1] <= time.monotonic():
            del self._records[request_id]
            return None
        return found


def _to_fields(record: RequestRecord) -> dict[str, str]:
    return {
        "owner": record.owner,
        "body": record.body,
        "request": base64.b64encode(record.request).decode(),
        "router_id": record.router_id,
        "generation": str(record.generation),
        "worker_id": record.worker_id,
        "epoch": str(record.epoch),
        "attempt": str(record.attempt),
        "has_ended": str(int(record.has_ended)),
    }


def _from_fields(request_id: str, fields: dict[str, str]) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        owner=fields["owner"],
        body=fields["body"],
        request=base64.b64decode(fields["request"]),
        router_id=fields["router_id"],
        generation=int(fields["generation"]),
        worker_id=fields["worker_id"],
        epoch=int(fields["epoch"]),
        attempt=int(fields["attempt"]),
        has_ended=fields["has_ended"] == "1",
    )
