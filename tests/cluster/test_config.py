"""The YAML: what is refused, with which words; what is understood; the schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, ConfigError, PoolConfig, from_plain, json_schema, load_config, to_plain
from cluster.placement import wanted_workers
from engine.config import ModelOptions

ROOT = Path(__file__).resolve().parents[2]

BAD = [
    ("", "c.yaml: model is missing"),
    ("model:\n", "c.yaml:1: model is missing"),
    ("model: {}\n", "c.yaml:1: model.path is missing"),
    ("model: demo\n", "c.yaml:1: model must be a section (a mapping of keys), got the text 'demo'"),
    ("model: {path: 3}\n", "c.yaml:1: model.path must be text (in quotes if it looks like a number), got 3"),
    ("model: {path: ''}\n", "c.yaml:1: model.path must name a model"),
    ("model: {path: demo}\nprefil: {}\n", "c.yaml:2: prefil: unknown key; did you mean `prefill`?"),
    ("model: {path: demo}\nzzz: 1\n", "c.yaml:2: zzz: unknown key; known here: admission, cache,"),
    ("model: {path: demo}\ndecode:\n  thread: 2\n", "c.yaml:3: decode.thread: unknown key; did you mean `threads`?"),
    ("model: {path: demo}\ndecode:\n  threads: two\n", "c.yaml:3: decode.threads must be a whole number, got the text"),
    ("model: {path: demo}\ndecode:\n  threads: 1.5\n", "decode.threads must be a whole number, got 1.5"),
    ("model: {path: demo}\ndecode:\n  threads: true\n", "decode.threads must be a whole number, got true"),
    (
        "model: {path: demo}\ndecode:\n  device: cpu\n  threads: 0\n",
        "c.yaml:4: decode.threads must be at least 1, got 0",
    ),
    ("model: {path: demo}\ndecode: {workers: -1}\n", "decode.workers must be between 0 and 1000, got -1"),
    ("model: {path: demo}\ndecode: {workers: 0}\n", "decode.workers must be at least 1, got 0"),
    ("model: {path: demo}\nprefill: {workers: 0}\n", "set `mode: colocated`"),
    ("model: {path: demo}\ndecode: {device: tpu}\n", "decode.device must be one of 'auto', 'cpu' or 'cuda'"),
    ("model: {path: demo}\ndecode: {resources: {fast: -1}}\n", "fast must be at least 0"),
    (
        "model: {path: demo}\ndecode:\n  accelerator_type: H 200\n",
        "c.yaml:3: decode.accelerator_type must be a name that Ray knows, such as H200, got 'H 200'",
    ),
    ("model: {path: demo}\ndecode: {labels: {zone: 3}}\n", "decode.labels.zone must be text (in quotes if"),
    ("model: {path: demo}\ndecode: {labels: {zone: ''}}\n", "decode.labels.zone must be at most 63 letters"),
    ("model: {path: demo}\ndecode: {labels: {zone: '!!a'}}\n", "or '!in(a, b)', got '!!a'"),
    ("model: {path: demo}\ndecode:\n  labels: {_x: a}\n", "c.yaml:3: decode.labels must have keys such as"),
    ("model: {path: demo}\ndecode: {num_gpus: 1.5}\n", "a fraction of one GPU or a whole number, got 1.5"),
    ("model: {path: demo}\ndecode: {tensor_parallel: 3}\n", "decode.tensor_parallel must be 1, 2, 4 or 8, got 3"),
    ("model: {path: demo}\ndecode: {rank_timeout_s: 0}\n", "rank_timeout_s must be more than 0 and at most 3600"),
    (
        "model: {path: demo}\ndecode:\n  pace:\n    fixed_m: 2\n",
        "c.yaml:4: decode.pace.fixed_m: unknown key; did you mean `fixed_ms`?",
    ),
    (
        "model: {path: demo}\ndecode:\n  pace:\n    fixed_ms: -2\n",
        "c.yaml:4: decode.pace.fixed_ms must be at least 0 and at most 60000, got -2",
    ),
    (
        "model: {path: demo}\ndecode:\n  pace: {fixed_ms: fast}\n",
        "c.yaml:3: decode.pace.fixed_ms must be a number, got the text 'fast'",
    ),
    ("model: {path: demo}\nprefill:\n  pace: {}\n", "c.yaml:3: prefill.pace: a pace needs at least one of fixed_ms"),
    ("model: {path: demo}\nprefill:\n  pace: 3\n", "c.yaml:3: prefill.pace must be a section"),
    ("model: {path: demo}\nmode: both\n", "c.yaml:2: mode must be one of 'split' or 'colocated', got the text 'both'"),
    ("model: {path: demo}\ncache: {block_size: 17}\n", "cache.block_size must be 8, 16, 32, 64 or 128, got 17"),
    ("model: {path: demo}\nrouter: {port: 70000}\n", "router.port must be between 0 and 65535, got 70000"),
    ("model: {path: demo}\nray: {address: here}\n", "ray.address must be host:port"),
    ("model: {path: demo}\nray: {object_store_mib: 5}\n", "object_store_mib must be at least 76"),
    ("model: {path: demo}\nray: {num_gpus: -1}\n", "c.yaml:2: ray.num_gpus must be at least 0, got -1"),
    ("model: {path: demo}\ndrain_s: -1\n", "drain_s must be between 0 and 86400 seconds, got -1"),
    ("model: {path: demo}\ndrain_s: .nan\n", "drain_s"),
    ("model: {path: demo}\nmodel: {path: x}\n", "c.yaml:2: model is given twice (first on line 1)"),
    ("model:\n  path: demo\n  path: x\n", "c.yaml:3: model.path is given twice (first on line 2)"),
    ("model: [\n", "not valid YAML"),
    ("model:\n\tpath: demo\n", "c.yaml:2: not valid YAML"),
    ("- 1\n", "the file must be a mapping of sections"),
    ("? [a]\n: 1\n", "c.yaml:1: a key must be a single word"),
    ("model: &m {path: *m}\n", "refers to itself"),
    ("model: {path: demo}\n---\nmode: split\n", "not valid YAML"),
    ("model: !!python/object:os.system {}\n", "not valid YAML"),
]


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "expected"), BAD)
def test_refuses_with_line_and_reason(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value).replace(f"{tmp_path}/", "")


def test_lists_all_problems_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "model: {path: demo}\nmod: split\ndecode:\n  threads: x\nrouter:\n  polcy: round_robin\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    lines = [problem.split(":")[1] for problem in caught.value.problems]
    assert lines == ["2", "4", "6"]
    assert str(caught.value).startswith(f"{tmp_path}/c.yaml: 3 problems\n")


def test_a_url_with_a_password_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "model: {path: demo}\nredis: {url: 'http://u:hunter2@h'}\n"))
    assert "hunter2" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(ConfigError, match="at most 1048576 are read"):
        load_config(tmp_path / "large.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_understands_sections_defaults_and_empty_sections(tmp_path: Path) -> None:
    text = "model: {path: demo}\ncache:\nmode: colocated\nprefill: {workers: 0}\ndecode: {workers: 3, num_cpus: 1}\n"
    config = load_config(write(tmp_path, text))
    assert config.decode == PoolConfig(workers=3, num_cpus=1.0)
    assert config.cache == ClusterConfig(model=ModelOptions(path="demo")).cache


LABELS = {"ray.io/accelerator-type": "in(H200, H100)", "example.com/market": "!spot", "zone": "a-1.b_2", "x": "!in(a)"}


def test_labels_are_what_ray_understands(tmp_path: Path) -> None:
    text = json.dumps({"model": {"path": "demo"}, "decode": {"labels": LABELS}})
    assert load_config(write(tmp_path, text)).decode.labels == LABELS
    code = "import sys, json; from ray._private.label_utils import validate_label_selector as check"
    code += "; sys.exit(check(json.loads(sys.argv[1])))"
    assert subprocess.run([sys.executable, "-c", code, json.dumps(LABELS)], check=False).returncode == 0


def test_a_date_stays_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "model: {path: demo, name: 2026-01-02}\n")).model.name == "2026-01-02"


def test_plain_data_round_trip(tmp_path: Path) -> None:
    text = "model: {path: demo}\ndecode: {workers: 2, resources: {nic: 1}, pace: {fixed_ms: 2, kv_gb_per_s: 3}}\n"
    config = load_config(write(tmp_path, text))
    plain = json.loads(json.dumps(to_plain(config)))
    assert from_plain(plain) == config


def test_schema_describes_every_key_and_forbids_others() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    keys = [(name, key) for section in sections for name, key in section["properties"].items()]
    assert len(keys) > 60
    assert not [name for name, key in keys if not key.get("description")]
    assert schema["required"] == ["model"]
    assert "PaceOptions" in schema["$defs"]


def test_the_examples_are_valid() -> None:
    examples = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
    assert examples
    for example in examples:
        load_config(example)


def test_reading_the_yaml_loads_neither_torch_nor_ray() -> None:
    code = "import sys, cluster.config; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_example_of_two_kinds_of_gpus_asks_ray_for_both_where_there_is_none_yet() -> None:
    config = load_config(ROOT / "deploy" / "examples" / "two-kinds-of-gpus.yaml")
    asked = {(plan.pool, *sorted(plan.bundles[1])): plan.labels["market"] for plan in wanted_workers(config, gpus=0)}
    assert asked == {
        ("prefill", "CPU", "GPU", "accelerator_type:H100"): "in(spot, on-demand)",
        ("decode", "CPU", "GPU", "accelerator_type:H200"): "on-demand",
    }


def test_the_password_of_a_redis_comes_from_its_file(tmp_path: Path) -> None:
    secret, file = tmp_path / "redis", tmp_path / "x.yaml"
    file.write_text(f"model: {{path: x}}\nredis: {{url: 'redis://valkey:6379/1', password_file: {secret}}}\n")
    assert load_config(file).redis.url == "redis://valkey:6379/1", "a check needs no secrets"
    secret.write_text("a/b c\n")
    config = load_config(file)
    assert config.redis.url == "redis://:a%2Fb%20c@valkey:6379/1"
    secret.write_text("other")
    assert from_plain(to_plain(config)) == config
    file.write_text("model: {path: x}\nredis: {password_file: y}\n")
    with pytest.raises(ConfigError, match="set url too"):
        load_config(file)


def test_routers_on_one_port_need_machines_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: {path: x}\nrouter: {replicas: 2, same_port: true}\n")
    with pytest.raises(ConfigError, match=r"set ray\.address"):
        load_config(file)
    file.write_text("model: {path: x}\nrouter: {replicas: 2, same_port: true}\nray: {address: 'head:6379'}\n")
    assert load_config(file).router.same_port
