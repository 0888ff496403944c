"""What differs between two configurations, and what each difference needs before it counts.

    hot       the controller takes it up; no process is replaced
    drain     the processes it touches are replaced one after another: each drains, stops and starts anew
    restart   the whole cluster: `pdserve down`, `pdserve up`

Pure; a configuration is the plain data of a validated one (`cluster.config.to_plain`), also after JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["prefill", "decode", "router"]
Needs = Literal["hot", "drain", "restart"]
Path = tuple[str, ...]
Rule = tuple[Needs, tuple[Kind, ...]]

KINDS: tuple[Kind, ...] = ("prefill", "decode", "router")

_HOT: Rule = ("hot", ())
_RESTART: Rule = ("restart", ())
_WORKERS: Rule = ("drain", ("prefill", "decode"))
_RULES: Mapping[Path, Rule] = {
    ("scaling",): _HOT,
    ("prefill", "workers"): _HOT,
    ("decode", "workers"): _HOT,
    ("router", "replicas"): _HOT,
    ("drain_s",): _HOT,
    ("move_after_s",): _HOT,
    ("start_timeout_s",): _HOT,
    ("prefill",): ("drain", ("prefill",)),
    ("decode",): ("drain", ("decode",)),
    ("router",): ("drain", ("router",)),
    ("admission",): _WORKERS,
    ("cache",): _WORKERS,
    ("transfer",): _WORKERS,
    ("observability",): ("drain", KINDS),
    ("cache", "block_size"): _RESTART,  # workers of different block sizes cannot exchange KV
    ("model",): _RESTART,
    ("mode",): _RESTART,
    ("redis",): _RESTART,
    ("ray",): _RESTART,
}
"""By the longest path that a key begins with."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs."""

    path: str
    """Such as `decode.pace.fixed_ms`; a section that only one side has is one change."""
    old: Any
    """None also where the key was not there."""
    new: Any
    """None also where the key is not there any more."""
    needs: Needs
    touches: tuple[Kind, ...]
    """Whose processes are replaced; empty unless it needs a drain."""


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The keys that differ, in the order of `new`."""
    return [
        Change(".".join(path), before, after, *rule_of(path))
        for path, before, after in _differences((), _as_json(old), _as_json(new))
    ]


def rule_of(path: Path) -> Rule:
    """What a change of this key needs, and whose processes it touches; an unknown one needs a restart."""
    for length in range(len(path), 0, -1):
        if (rule := _RULES.get(path[:length])) is not None:
            return rule
    return _RESTART


def settings_digest(config: dict[str, Any], kind: Kind, turn: int) -> str:
    """A short name for the settings that processes of this kind start with, and their restart by hand (`turn`).

    It differs exactly where a change of the configuration needs a drain of this kind.
    """
    settings = {".".join(path): value for path, value in _leaves((), _as_json(config)) if kind in rule_of(path)[1]}
    text = json.dumps({"settings": settings, "turn": turn}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(value: Any) -> Any:
    """The value as it comes back from JSON, with 1.0 and 1 the same."""
    match value:
        case dict():
            return {str(key): _as_json(each) for key, each in value.items()}
        case list() | tuple():
            return [_as_json(each) for each in value]
        case float() if value.is_integer():
            return int(value)
    return value


def _differences(path: Path, old: Any, new: Any) -> Iterator[tuple[Path, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _differences((*path, key), old.get(key), new.get(key))
    elif json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):  # 1 and true are equal to Python
        yield path, old, new


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves((*path, key), each)
    else:
        yield path, value
