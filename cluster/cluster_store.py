"""What the controller must find again after its death, and how people tell it what they want: keys in Redis.

    pdserve:cluster:wish         hash: generation, config (JSON), sizes (JSON), turns (JSON), by
    pdserve:cluster:members      hash: member id -> record (JSON)
    pdserve:cluster:history      list of decisions (JSON), newest first
    pdserve:cluster:report       what the controller last said of itself (JSON), expires
    pdserve:cluster              channel: something of these changed

The wish is one document: whoever changes it names the generation that it read, so that two cannot overwrite each other
in silence. The command line writes wishes and reads the rest; the controller does the opposite. Nothing here is on the
way of a token.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from cluster.members import Member

PREFIX = "pdserve:cluster"
MAX_HISTORY = 1000

By = Literal["up", "apply", "scale", "restart", "autoscaler", "controller"]

# KEYS: wish, history. ARGV: expected generation, config (or empty: as it is), sizes, turns (alike), by, entry, most
# entries, channel. Returns the new generation, or -1 if another one stands.
_CHANGE = """
local stands = redis.call('HGET', KEYS[1], 'generation') or '0'
if stands ~= ARGV[1] then return -1 end
if ARGV[2] ~= '' then redis.call('HSET', KEYS[1], 'config', ARGV[2]) end
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'sizes', ARGV[3]) end
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'turns', ARGV[4]) end
redis.call('HSET', KEYS[1], 'by', ARGV[5])
redis.call('LPUSH', KEYS[2], ARGV[6])
redis.call('LTRIM', KEYS[2], 0, ARGV[7] - 1)
local generation = redis.call('HINCRBY', KEYS[1], 'generation', 1)
redis.call('PUBLISH', ARGV[8], 'wish')
return generation
"""


class ClusterStoreError(RuntimeError):
    """Redis did not answer; the message says what was asked of it."""


class WishChangedError(RuntimeError):
    """Somebody else changed the wish meanwhile: read it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is wanted: a configuration, and how many workers each pool is to have."""

    generation: int
    config: dict[str, Any]
    """The validated YAML as plain data."""
    sizes: dict[str, int]
    """Wanted workers by pool; the YAML's, until somebody else decides."""
    turns: dict[str, int] = field(default_factory=dict)
    """How often each of prefill, decode and router was asked to be restarted, one process after the other."""
    by: str
    """Who wrote it last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One line of the history."""

    at: float
    """Unix time."""
    by: str
    """up, apply, scale, restart, autoscaler or controller."""
    what: str
    """What was decided or done, such as `decode 2 -> 3`."""
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """The figures behind it."""


class ClusterStore:
    """The keys above; each call ends within a bound, at worst with ClusterStoreError."""

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        self._redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),
        )
        self._pubsub: Any = None

    def close(self) -> None:
        """Give connections back."""
        if self._pubsub is not None:
            self._pubsub.close()
        self._redis.close()

    def wish(self) -> Wish | None:
        """What is wanted; None before the first one."""
        with _translated("read the wish"):
            fields: Any = self._redis.hgetall(f"{PREFIX}:wish")
        if not fields:
            return None
        return Wish(
            generation=int(fields["generation"]),
            config=json.loads(fields["config"]),
            sizes=json.loads(fields["sizes"]),
            turns=json.loads(fields.get("turns", "{}")),
            by=fields["by"],
        )

    def change(
        self,
        generation: int,
        decision: Decision,
        *,
        config: dict[str, Any] | None = None,
        sizes: dict[str, int] | None = None,
        turns: dict[str, int] | None = None,
    ) -> int:
        """Write what is given of a wish, and the decision, in one go; the new generation.

        `generation` is that of the wish it was decided on (0: there was none): WishChangedError if another one stands.
        """
        args = (
            str(generation),
            *("" if part is None else json.dumps(part) for part in (config, sizes, turns)),
            decision.by,
            json.dumps(asdict(decision)),
            str(MAX_HISTORY),
            PREFIX,
        )
        with _translated("change the wish"):
            new: Any = self._redis.eval(_CHANGE, 2, f"{PREFIX}:wish", f"{PREFIX}:history", *args)
        if new == -1:
            raise WishChangedError(f"the wish is not of generation {generation} any more: somebody else changed it")
        return int(new)

    def note(self, decision: Decision) -> None:
        """Add a line to the history."""
        with _translated("write the history"), self._redis.pipeline() as pipe:
            pipe.lpush(f"{PREFIX}:history", json.dumps(asdict(decision)))
            pipe.ltrim(f"{PREFIX}:history", 0, MAX_HISTORY - 1)
            pipe.publish(PREFIX, "history")
            pipe.execute()

    def history(self, limit: int = MAX_HISTORY) -> list[Decision]:
        """The last decisions, newest first."""
        with _translated("read the history"):
            lines: Any = self._redis.lrange(f"{PREFIX}:history", 0, limit - 1)
        return [Decision(**json.loads(line)) for line in lines]

    def members(self) -> dict[str, Member]:
        """All members by id."""
        with _translated("read the members"):
            records: Any = self._redis.hgetall(f"{PREFIX}:members")
        return {name: Member.from_plain(json.loads(record)) for name, record in sorted(records.items())}

    def put(self, member: Member) -> None:
        """Write one member."""
        with _translated("write a member"):
            self._redis.hset(f"{PREFIX}:members", member.member_id, json.dumps(member.to_plain()))

    def drop(self, member_id: str) -> None:
        """Forget one member, and the role it last had."""
        with _translated("drop a member"):
            self._redis.hdel(f"{PREFIX}:members", member_id)
            self._redis.delete(f"pdserve:role:{member_id}")

    def say(self, report: dict[str, Any], ttl_s: float) -> None:
        """Tell how the controller is; forgotten after `ttl_s`."""
        with _translated("write the report"):
            self._redis.set(f"{PREFIX}:report", json.dumps({**report, "at": time.time()}), px=round(ttl_s * 1000))

    def report(self) -> dict[str, Any] | None:
        """What the controller last said of itself; None if it has been silent for long."""
        with _translated("read the report"):
            text: Any = self._redis.get(f"{PREFIX}:report")
        return None if text is None else dict(json.loads(text))

    def forget(self) -> None:
        """Drop everything, as nothing of it runs any more."""
        with _translated("forget the cluster"):
            roles: Any = self._redis.hkeys(f"{PREFIX}:members")
            keys = [*(f"{PREFIX}:{name}" for name in ("wish", "members", "report"))]
            self._redis.delete(*keys, *(f"pdserve:role:{name}" for name in roles))

    def wait(self, timeout_s: float) -> bool:
        """Wait until something changes, or `timeout_s` is over; whether it did. One thread at a time."""
        with _translated("wait for a change"):
            if self._pubsub is None:
                self._pubsub = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
                self._pubsub.subscribe(PREFIX)
            try:
                return self._pubsub.get_message(timeout=timeout_s) is not None
            except (RedisError, OSError):
                self._pubsub.close()
                self._pubsub = None
                raise


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise ClusterStoreError(f"could not {what}: Redis: {error}") from error
