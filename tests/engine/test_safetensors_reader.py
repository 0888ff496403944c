"""Reading from several threads; what the reader has in common for all devices is in the loader's tests."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import safetensors_reader
from engine.errors import UnsupportedModelError
from engine.loader import iter_weights, weight_shapes
from engine.model_source import resolve
from engine.models.config import ModelConfig
from engine.read_ahead import Ahead
from engine.safetensors_reader import READ_THREADS, Weights, ahead_for, read_safetensors
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=False, sharded=True)


def config_of(directory: Path) -> ModelConfig:
    return ModelConfig.load(resolve(str(directory)))


def open_files(directory: Path) -> list[str]:
    paths = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [path for path in paths + mapped if path.startswith(str(directory)) and path.endswith(".safetensors")]


def threaded(directory: Path, dtype: torch.dtype = torch.float32) -> Weights:
    shapes = weight_shapes(config_of(directory))
    return read_safetensors(
        directory, shapes, dtype=dtype, device=torch.device("cpu"), ahead=Ahead(threads=4, max_bytes=1 << 20)
    )


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_several_threads_give_what_one_gives(directory: Path) -> None:
    weights = dict(threaded(directory, torch.bfloat16))
    plain = dict(iter_weights(resolve(str(directory)), config_of(directory), dtype=torch.bfloat16))
    assert list(weights) == list(plain)
    assert all(torch.equal(weight, plain[name]) for name, weight in weights.items())


@pytest.mark.parametrize("in_threads", [False, True])
def test_a_consumer_that_stops_early_leaves_nothing_behind(directory: Path, in_threads: bool) -> None:
    source, config = resolve(str(directory)), config_of(directory)
    weights = threaded(directory) if in_threads else iter_weights(source, config, dtype=torch.bfloat16)
    next(weights)
    assert open_files(directory)
    assert bool(reading_threads()) is in_threads
    weights.close()
    assert open_files(directory) == []
    assert reading_threads() == []


def test_a_type_that_is_no_floating_point_is_refused(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        save_file({name: weight.to(torch.int32) for name, weight in load_file(file).items()}, file)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight has type torch\.int32"):
        list(threaded(directory))


def test_only_a_gpu_has_several_threads() -> None:
    assert ahead_for(torch.device("cpu")) is None
    ahead = ahead_for(torch.device("cuda", 0))
    assert ahead is not None
    assert 1 <= ahead.threads <= READ_THREADS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gets_the_same_weights_in_many_small_pieces(
    directory: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(safetensors_reader, "STAGING_BYTES", 1000)
    source, config = resolve(str(directory)), config_of(directory)
    stored = {name: weight for file in directory.glob("*.safetensors") for name, weight in load_file(file).items()}
    weights = dict(iter_weights(source, config, dtype=dtype, device="cuda"))
    assert list(weights) == list(weight_shapes(config))
    for name, weight in weights.items():
        assert weight.device == torch.device("cuda", torch.cuda.current_device())
        assert torch.equal(weight.cpu(), stored[name].to(dtype)), name
    assert open_files(directory) == []
    assert reading_threads() == []
