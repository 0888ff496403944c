import itertools
import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from engine.errors import BrokenModelError, ModelError, ModelNotFoundError, UnsupportedModelError
from engine.loader import _gguf_name, iter_weights, weight_shapes
from engine.model_source import resolve
from engine.models.config import ModelConfig
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.engine.demo_model import demo_source
from tests.engine.gguf_checkpoints import Quant, make_gguf


def load(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = resolve(str(path))
    return dict(iter_weights(source, ModelConfig.load(source), dtype=dtype))


def assert_equal_weights(weights: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> None:
    assert set(oracle) - set(weights) <= {"lm_head.weight"}
    for name, weight in weights.items():
        assert torch.equal(weight, oracle[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CheckpointFamily)
def test_safetensors_weights_equal_those_of_transformers(tmp_path: Path, family: CheckpointFamily, tied: bool) -> None:
    directory = make_checkpoint(tmp_path, family, tied=tied, sharded=tied)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    weights = load(directory)
    assert ("lm_head.weight" in weights) is not tied
    assert_equal_weights(weights, oracle.state_dict())


@pytest.mark.parametrize("quant", [Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.Q5_1])
def test_gguf_llama_weights_equal_those_of_transformers(tmp_path: Path, quant: Quant) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=False)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint, quant=quant)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert_equal_weights(load(path), oracle.state_dict())


@pytest.mark.parametrize("family", [CheckpointFamily.LLAMA, CheckpointFamily.QWEN2, CheckpointFamily.QWEN3])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_back_the_checkpoint_it_was_made_of(tmp_path: Path, family: CheckpointFamily, tied: bool) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", family, tied=tied)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint, quant=Quant.F32)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        dtype=torch.float32,
        config=transformers.AutoConfig.from_pretrained(checkpoint),  # it does not read Qwen3's head size from a GGUF
    )
    weights = load(path)
    assert_equal_weights(weights, load(checkpoint))
    assert_equal_weights(weights, oracle.state_dict())


def test_the_demo_models_weights_are_those_in_its_file() -> None:
    source = demo_source()
    config = ModelConfig.load(source)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}
    count = 0
    for name, weight in iter_weights(source, config, dtype=torch.float32):
        tensor = stored.pop(_gguf_name(name))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads is not None:  # rows 0, 2, 4, ... of each head, then rows 1, 3, 5, ...
            by_head = expected.reshape(heads, config.head_dim, -1)
            expected = np.concatenate([by_head[:, 0::2], by_head[:, 1::2]], axis=1).reshape(expected.shape)
        assert np.array_equal(weight.numpy(), expected), name
        count += 1
    assert (count, stored) == (272, {})


def test_weights_come_in_the_wanted_type_and_progress_is_told(tmp_path: Path) -> None:
    source = resolve(str(make_checkpoint(tmp_path, CheckpointFamily.QWEN2, tied=False)))
    config = ModelConfig.load(source)
    told: list[tuple[int, int]] = []
    weights = dict(
        iter_weights(source, config, dtype=torch.bfloat16, on_progress=lambda done, total: told.append((done, total)))
    )
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == weight_shapes(config)
    sizes = [weight.nbytes for weight in weights.values()]
    assert told == [(done, sum(sizes)) for done in itertools.accumulate(sizes, initial=0)]


def test_progress_is_told_of_what_has_been_taken(tmp_path: Path) -> None:
    source = resolve(str(make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)))
    told: list[int] = []
    weights = iter_weights(
        source, ModelConfig.load(source), dtype=torch.float32, on_progress=lambda done, total: told.append(done)
    )
    _, first = next(weights)
    assert told == [0]
    next(weights)
    assert told == [0, first.nbytes]
    weights.close()


def test_missing_weights_are_named_before_any_is_given(tmp_path: Path) -> None:
    source = resolve(str(make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)))
    config = ModelConfig.load(source)
    header = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(header))
    with pytest.raises(BrokenModelError, match=r"lacks 10 weights: model\.layers\.3.* and 2 more"):
        next(iter_weights(source, ModelConfig.load(source), dtype=torch.float32))
    assert len(list(iter_weights(source, config, dtype=torch.float32))) == len(weight_shapes(config))


def test_a_weight_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    source = resolve(str(make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)))
    header = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(header))
    with pytest.raises(BrokenModelError, match=r"mlp.gate_proj.weight has shape \(112, 64\).*asks for \(96, 64\)"):
        load(source.path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True, sharded=True)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelNotFoundError, match=gone.name):
        load(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_bad_shard_index_is_refused(tmp_path: Path, index: str) -> None:
    make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True, sharded=True)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BrokenModelError):
        load(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint, quant=Quant.F32)
    header, name = path.read_bytes(), b"output_norm.weight"
    kind = header.index(name) + len(name) + 4 + 8
    path.write_bytes(header[:kind] + Quant.I32.to_bytes(4, "little") + header[kind + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"output_norm\.weight has type I32"):
        load(path)


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, 2000, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(BrokenModelError, match="broken or truncated"):
            load(tmp_path)


def test_damaged_safetensors_headers_give_a_model_error_or_weights(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(5)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(header_bytes)] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            load(tmp_path)
        except ModelError:
            refused += 1
    assert refused > 100


def test_truncated_gguf_files_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint)
    whole = path.read_bytes()
    for size in [0, 1, 4, 8, 23, 24, 100, *range(200, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(BrokenModelError, match=r"truncated|cannot be read|not a GGUF"):
            load(path)


def test_damaged_gguf_headers_give_a_model_error_or_weights(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint)
    whole = path.read_bytes()
    header_bytes = whole.index(b"output_norm.weight")
    chance = random.Random(6)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(header_bytes)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load(path)
        except ModelError:
            refused += 1
    assert refused > 50
