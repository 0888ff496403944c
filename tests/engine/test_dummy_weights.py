import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.dummy_weights import STD, dummy_weights
from engine.loader import weight_shapes
from engine.model_source import resolve
from engine.models.config import ModelConfig
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("header")
    made = make_checkpoint(tmp_path_factory.mktemp("whole"), CheckpointFamily.QWEN2, tied=False)
    (folder / "config.json").write_text((made / "config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def config(header: Path) -> ModelConfig:
    return ModelConfig.load(resolve(str(header), "dummy"))


def test_every_weight_has_its_shape_type_and_spread(config: ModelConfig) -> None:
    told: list[tuple[int, int]] = []
    weights = dict(
        dummy_weights(config, dtype=torch.bfloat16, on_progress=lambda done, total: told.append((done, total)))
    )
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == weight_shapes(config)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    sizes = [weight.nbytes for weight in weights.values()]
    assert told == [(done, sum(sizes)) for done in itertools.accumulate(sizes, initial=0)]
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            assert torch.all(weight == 1), name
        elif name.endswith(".bias"):
            assert torch.all(weight == 0), name
        else:
            assert weight.float().std().item() == pytest.approx(STD, rel=0.1), name
            assert weight.float().mean().item() == pytest.approx(0.0, abs=STD / 10), name


def test_weights_of_equal_shape_differ(config: ModelConfig) -> None:
    weights = dict(dummy_weights(config, dtype=torch.float32))
    first, second = (weights[f"model.layers.{layer}.mlp.gate_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_another_process_makes_equal_weights(header: Path, config: ModelConfig) -> None:
    code = (
        "import sys, json, torch\n"
        "from engine.dummy_weights import dummy_weights\n"
        "from engine.models.config import ModelConfig\n"
        "from engine.model_source import resolve\n"
        "config = ModelConfig.load(resolve(sys.argv[1], 'dummy'))\n"
        "print(json.dumps({n: w.double().sum().item() for n, w in dummy_weights(config, dtype=torch.float32)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(header)], capture_output=True, text=True, check=True, timeout=120
    )
    sums = {name: weight.double().sum().item() for name, weight in dummy_weights(config, dtype=torch.float32)}
    assert json.loads(done.stdout) == sums
    assert len(set(sums.values())) > 10


@pytest.mark.gpu
def test_weights_are_made_on_the_gpu(config: ModelConfig) -> None:
    first = dict(dummy_weights(config, dtype=torch.bfloat16, device="cuda"))
    again = dict(dummy_weights(config, dtype=torch.bfloat16, device="cuda"))
    assert {weight.device.type for weight in first.values()} == {"cuda"}
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
