import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.errors import BrokenModelError, ModelNotFoundError, UnsupportedModelError
from engine.model_source import resolve
from engine.models.config import Family, ModelConfig, RopeScaling, RopeScalingKind
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.engine.demo_model import demo_source
from tests.engine.gguf_checkpoints import Quant, make_gguf

LLAMA3_ROPE = RopeScaling(
    kind=RopeScalingKind.LLAMA3,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=256,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, CheckpointFamily.LLAMA, tied=True)


def load(path: Path) -> ModelConfig:
    return ModelConfig.load(resolve(str(path)))


def change(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    header = json.loads((directory / "config.json").read_text()) | changes
    header = {key: value for key, value in header.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("kind", "family", "changes"),
    [
        (CheckpointFamily.LLAMA, Family.LLAMA, {}),
        (CheckpointFamily.LLAMA3_ROPE, Family.LLAMA, {"rope_scaling": LLAMA3_ROPE}),
        (CheckpointFamily.MISTRAL, Family.LLAMA, {"architecture": "MistralForCausalLM"}),
        (CheckpointFamily.QWEN2, Family.QWEN2, {"architecture": "Qwen2ForCausalLM", "attention_bias": True}),
        (
            CheckpointFamily.QWEN3,
            Family.QWEN3,
            {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "head_dim": 32},
        ),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_is_read(
    tmp_path: Path, kind: CheckpointFamily, family: Family, changes: dict[str, Any], tied: bool
) -> None:
    config = load(make_checkpoint(tmp_path, kind, tied=tied))
    expected = ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=3,
        hidden_size=64,
        intermediate_size=112,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=400,
        max_model_len=4096,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tied_embeddings=tied,
        eos_token_ids=(2, 0),
        bos_token_id=1,
    )
    assert config == dataclasses.replace(expected, **changes)
    assert config.family is family


def test_the_rope_keys_of_older_files_are_read(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, CheckpointFamily.LLAMA3_ROPE, tied=True)
    new = load(directory)
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    change(directory, rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    assert load(directory) == new
    change(directory, rope_scaling={"type": "linear", "factor": 4.0})
    assert load(directory).rope_scaling == RopeScaling(kind=RopeScalingKind.LINEAR, factor=4.0)


def test_what_transformers_reads_is_read(checkpoint: Path) -> None:
    change(checkpoint, num_key_value_heads=None, head_dim=None, torch_dtype="bfloat16", dtype=None)
    oracle = transformers.AutoConfig.from_pretrained(checkpoint)
    config = load(checkpoint)
    assert (config.num_kv_heads, config.head_dim) == (oracle.num_key_value_heads, oracle.head_dim)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM"),
        ({"architectures": None, "model_type": "opt"}, "'opt' is not supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, "sliding window of 128"),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "use_sliding_window": True}, "sliding window"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
    ],
)
def test_what_the_engine_lacks_is_refused_by_name(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    change(checkpoint, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        load(checkpoint)


def test_a_window_that_never_closes_is_no_window(checkpoint: Path) -> None:
    change(checkpoint, architectures=["MistralForCausalLM"], sliding_window=4096)
    assert load(checkpoint).architecture == "MistralForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_layers must be an integer from 1 to 1024"),
        ({"num_hidden_layers": "three"}, "num_layers"),
        ({"num_attention_heads": 0}, "usable"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 15}, "even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta"),
        ({"architectures": 3}, "usable"),
        ({"quantization_config": [1]}, "usable"),
    ],
)
def test_a_header_that_makes_no_sense_is_broken(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    change(checkpoint, **changes)
    with pytest.raises(BrokenModelError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_header_that_is_not_json_is_broken(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BrokenModelError, match=r"config\.json"):
        load(checkpoint)


def test_end_tokens_come_from_the_generation_config_first(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load(checkpoint).eos_token_ids == (7,)
    (checkpoint / "generation_config.json").unlink()
    assert load(checkpoint).eos_token_ids == (2,)
    change(checkpoint, eos_token_id=400)
    with pytest.raises(BrokenModelError, match="token 400 is not in the vocabulary of 400"):
        load(checkpoint)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [CheckpointFamily.LLAMA, CheckpointFamily.QWEN2, CheckpointFamily.QWEN3])
def test_a_gguf_header_says_the_same_as_the_checkpoint(tmp_path: Path, family: CheckpointFamily, tied: bool) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", family, tied=tied)
    config = load(make_gguf(tmp_path / "tiny.gguf", checkpoint, quant=Quant.F32))
    expected = dataclasses.replace(load(checkpoint), eos_token_ids=(2,))
    assert dataclasses.replace(config, rms_norm_eps=expected.rms_norm_eps) == expected
    assert config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)


def test_a_quantised_gguf_is_bfloat16_at_heart(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)
    assert load(make_gguf(tmp_path / "a.gguf", checkpoint, quant=Quant.F16)).dtype == "float16"
    assert load(make_gguf(tmp_path / "b.gguf", checkpoint, quant=Quant.Q8_0)).dtype == "bfloat16"


def test_a_ggufs_own_rope_factors_are_read(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)
    factors = (1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0)
    config = load(make_gguf(tmp_path / "tiny.gguf", checkpoint, rope_factors=factors))
    assert config.rope_scaling == RopeScaling(kind=RopeScalingKind.FACTORS, factors=factors)
    with pytest.raises(BrokenModelError, match="must have 8 elements"):
        load(make_gguf(tmp_path / "short.gguf", checkpoint, rope_factors=factors[:3]))


def test_a_gguf_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.QWEN2, tied=True)
    path = make_gguf(tmp_path / "tiny.gguf", checkpoint)
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"bloom"))
    with pytest.raises(UnsupportedModelError, match="'bloom' is not supported; supported are LlamaForCausalLM"):
        load(path)


def test_a_gguf_that_has_gone_is_not_found(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", CheckpointFamily.LLAMA, tied=True)
    source = resolve(str(make_gguf(tmp_path / "tiny.gguf", checkpoint)))
    source.path.unlink()
    with pytest.raises(ModelNotFoundError, match=r"tiny\.gguf"):
        ModelConfig.load(source)


def test_the_demo_model_is_read() -> None:
    config = ModelConfig.load(demo_source())
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.max_model_len, config.tied_embeddings) == (49152, 8192, True)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
