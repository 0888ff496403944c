from __future__ import annotations

import pytest
import torch

from engine.kernels.kv_pack import TOKENS, pack, unpack
from tests.engine.kernels.bounds import Maker

NUM_LAYERS, NUM_SLOTS = 3, 64


@pytest.mark.parametrize("num_tokens", [1, TOKENS, 4 * TOKENS + 3])
@pytest.mark.parametrize(("num_heads", "heads"), [(1, range(1)), (3, range(3)), (4, range(1, 3)), (5, range(4, 5))])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_slots_are_packed_and_unpacked(
    device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int, heads: range, head_dim: int
) -> None:
    """Both ways, against indexing; nothing else is touched. The cache lies as on a GPU, slots before heads."""
    make = Maker(device, dtype)
    cache = make.normal(NUM_LAYERS, 2, NUM_SLOTS, num_heads, head_dim).transpose(2, 3)
    layers = cache[1:, :, heads.start : heads.stop]
    slots = torch.randperm(NUM_SLOTS, device=device)[:num_tokens]
    packed = make.normal(NUM_LAYERS - 1, 2, num_tokens, len(heads), head_dim)
    pack(layers, slots, packed)
    assert torch.equal(packed, layers[:, :, :, slots].transpose(2, 3))
    expected = cache.clone()
    fresh = make.normal(*packed.shape)
    expected[1:, :, heads.start : heads.stop][:, :, :, slots] = fresh.transpose(2, 3)
    unpack(layers, slots, fresh)
    assert torch.equal(cache, expected)
