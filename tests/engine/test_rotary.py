from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding, rotate
from engine.models.config import RopeScaling, RopeScalingKind
from tests.engine.test_kv_cache import CONFIG

HEAD_DIM = 32
CPU = torch.device("cpu")
LLAMA3 = RopeScaling(
    kind=RopeScalingKind.LLAMA3,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=256,
)
LINEAR = RopeScaling(kind=RopeScalingKind.LINEAR, factor=4.0)
LLAMA3_PARAMETERS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (None, {"rope_type": "default"}),
        (LINEAR, {"rope_type": "linear", "factor": 4.0}),
        (LLAMA3, LLAMA3_PARAMETERS),
    ],
    ids=["plain", "linear", "llama3"],
)
def test_rotation_equals_transformers(theta: float, scaling: RopeScaling | None, parameters: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, head_dim=HEAD_DIM, rope_theta=theta, rope_scaling=scaling)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            head_dim=HEAD_DIM, max_position_embeddings=2048, rope_parameters={**parameters, "rope_theta": theta}
        )
    )
    positions = torch.tensor([0, 1, 7, 255, 256, 2047])
    heads = torch.randn(6, 5, HEAD_DIM)
    cos, sin = theirs(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    rotate(heads, *RotaryEmbedding(config, torch.float32, CPU).factors(positions))
    torch.testing.assert_close(heads, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def embedding(scaling: RopeScaling | None) -> RotaryEmbedding:
    return RotaryEmbedding(dataclasses.replace(CONFIG, head_dim=HEAD_DIM, rope_scaling=scaling), torch.float32, CPU)


def test_factors_divide_each_frequency() -> None:
    factors = RopeScaling(kind=RopeScalingKind.FACTORS, factors=(4.0,) * (HEAD_DIM // 2))
    cosines = [embedding(scaling).factors(torch.arange(100))[0] for scaling in (factors, LINEAR)]
    assert torch.equal(*cosines)
    assert not torch.equal(cosines[0], embedding(None).factors(torch.arange(100))[0])


@pytest.mark.parametrize("normed", [False, True])
def test_rows_are_placed_where_their_slots_are(normed: bool) -> None:
    """Queries and keys are normalised, then rotated; values stay; rows without a slot are not stored."""
    num_heads, num_kv_heads = 5, 2
    rotary, positions, slots = embedding(None), torch.tensor([3, 0, 900, 4, 0]), torch.tensor([9, 0, 17, -1, -1])
    norms = (RMSNorm(torch.rand(HEAD_DIM), 1e-6), RMSNorm(torch.rand(HEAD_DIM), 1e-6)) if normed else (None, None)
    heads = torch.randn(5, num_heads + 2 * num_kv_heads, HEAD_DIM)
    q, k, v = torch.split(heads.clone(), [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms[0] is not None and norms[1] is not None:
        q, k = norms[0](q), norms[1](k)
    rotate(q, *rotary.factors(positions))
    rotate(k, *rotary.factors(positions))
    layer = torch.zeros(2, num_kv_heads, 24, HEAD_DIM)
    torch.testing.assert_close(rotary.at(positions, slots).place(heads, layer, *norms), q)
    for row, slot in enumerate((9, 0, 17)):
        torch.testing.assert_close(layer[:, :, slot], torch.stack((k[row], v[row])))
    layer[:, :, [9, 0, 17]] = 0.0
    assert not layer.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_rms_norm_is_its_definition(dtype: torch.dtype, scale: float) -> None:
    x, weight = (torch.randn(5, 3, 64) * scale).to(dtype), torch.randn(64).to(dtype)
    wide = x.double()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(RMSNorm(weight, 1e-6)(x), expected, rtol=tolerance, atol=tolerance)
