"""What differs between two configurations, and what it needs."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from cluster.config import ClusterConfig, from_plain, to_plain
from cluster.config_diff import KINDS, Change, diff, rule_of, settings_digest

PACE = {"fixed_ms": 4.0, "prompt_token_us": 20.0}


def plain(**sections: Any) -> dict[str, Any]:
    return to_plain(from_plain({"model": {"path": "demo"}, **sections}))


def with_value(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    *sections, key = path.split(".")
    section = changed
    for name in sections:
        section = section[name]
    section[key] = value
    return changed


def test_the_same_is_no_change_also_after_json() -> None:
    config = plain(decode={"workers": 2, "resources": {"nic": 1}, "pace": PACE})
    assert diff(config, config) == []
    assert diff(json.loads(json.dumps(config)), config) == []
    assert diff(config, with_value(config, "drain_s", int(config["drain_s"]))) == []


def test_a_nested_key_is_named_by_its_path() -> None:
    old, new = plain(decode={"pace": PACE}), plain(decode={"pace": {**PACE, "fixed_ms": 5.5}})
    assert diff(old, new) == [Change("decode.pace.fixed_ms", 4, 5.5, "drain", ("decode",))]


def test_a_section_that_comes_or_goes_is_one_change() -> None:
    old, new = plain(), plain(decode={"pace": PACE})
    (come,) = diff(old, new)
    assert (come.path, come.old, come.new["fixed_ms"]) == ("decode.pace", None, 4)
    (gone,) = diff(new, old)
    assert (gone.path, gone.new) == ("decode.pace", None)


def test_keys_of_a_users_mapping_come_and_go() -> None:
    old, new = plain(prefill={"resources": {"a": 1}}), plain(prefill={"resources": {"b": 2}})
    assert [(change.path, change.old, change.new) for change in diff(old, new)] == [
        ("prefill.resources.b", None, 2),
        ("prefill.resources.a", 1, None),
    ]


def test_true_is_not_one() -> None:
    assert len(diff({"scaling": {"role_change": 1}}, {"scaling": {"role_change": True}})) == 1


WHAT_EACH_NEEDS = [
    ("scaling.mode", "on", "hot", ()),
    ("scaling.decode.max", 9, "hot", ()),
    ("prefill.workers", 3, "hot", ()),
    ("decode.workers", 3, "hot", ()),
    ("router.replicas", 2, "hot", ()),
    ("drain_s", 5.0, "hot", ()),
    ("move_after_s", 5.0, "hot", ()),
    ("start_timeout_s", 5.0, "hot", ()),
    ("prefill.max_step_tokens", 128, "drain", ("prefill",)),
    ("decode.max_running", 5, "drain", ("decode",)),
    ("decode.num_gpus", 2.0, "drain", ("decode",)),
    ("router.policy", "round_robin", "drain", ("router",)),
    ("router.kv_aware.handover_s", 7.0, "drain", ("router",)),
    ("admission.answer_margin", 7.0, "drain", ("prefill", "decode")),
    ("cache.memory_mib", 99, "drain", ("prefill", "decode")),
    ("transfer.transport", "gloo", "drain", ("prefill", "decode")),
    ("observability.log_level", "debug", "drain", ("prefill", "decode", "router")),
    ("cache.block_size", 64, "restart", ()),
    ("model.path", "/other", "restart", ()),
    ("mode", "colocated", "restart", ()),
    ("redis.port", 6379, "restart", ()),
    ("ray.address", "a:1", "restart", ()),
]


@pytest.mark.parametrize(("path", "value", "needs", "touches"), WHAT_EACH_NEEDS, ids=lambda value: str(value))
def test_what_each_needs_and_what_its_digests_say(path: str, value: Any, needs: str, touches: tuple[str, ...]) -> None:
    config = plain()
    changed = with_value(config, path, value)
    assert diff(config, changed) == [Change(path, _value_at(config, path), value, needs, touches)]
    for kind in KINDS:
        same = settings_digest(config, kind, 0) == settings_digest(changed, kind, 0)
        assert same is (kind not in touches), kind


def _value_at(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = None if value is None else value.get(name)
    return value


def test_a_digest_says_settings_and_turn_and_lives_through_json() -> None:
    config = plain(decode={"pace": PACE})
    digest = settings_digest(config, "decode", 0)
    assert digest == settings_digest(json.loads(json.dumps(config)), "decode", 0)
    assert digest != settings_digest(config, "decode", 1)
    assert digest != settings_digest(config, "prefill", 0)


def test_every_key_of_the_yaml_has_a_rule_of_its_own() -> None:
    unknown = {"needs": rule_of(("nonsense",))[0]}
    assert unknown == {"needs": "restart"}
    known = {change[0].split(".")[0] for change in WHAT_EACH_NEEDS}
    assert {field.name for field in dataclasses.fields(ClusterConfig)} <= known
