from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.errors import IntegrityError
from engine.kv_cache import KVCache, bytes_per_block
from engine.layers.rotary import TorchPositions
from engine.models.config import ModelConfig

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 3, 6, 8, 2, 4
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=LAYERS,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    vocab_size=50,
    max_model_len=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


def make_cache() -> KVCache:
    cache = KVCache(
        num_layers=LAYERS,
        num_blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.data.zero_()
    return cache


ALL = range(HEADS)


def random_slots(count: int) -> np.ndarray:
    return np.array(random.Random(count).sample(range(BLOCKS * BLOCK_SIZE), count))


def test_what_is_placed_is_gathered() -> None:
    """Positions that turn nothing; the last two rows are padding and have no slot."""
    cache, slots = make_cache(), random_slots(11)
    still = torch.ones(13, 1, HEAD_DIM), torch.zeros(13, 1, HEAD_DIM)
    placed = torch.randn(LAYERS, 13, 3 + 2 * HEADS, HEAD_DIM)  # 3 query heads
    for layer in range(LAYERS):
        positions = TorchPositions(*still, torch.tensor(slots))
        positions.place(placed[layer].clone(), cache.layer(layer), None, None)
    out = torch.empty(2, 2, 11, HEADS, HEAD_DIM)
    cache.gather(1, 2, cache.locate(slots), ALL, out)
    assert torch.equal(out, placed[1:, :11, 3:].reshape(2, 11, 2, HEADS, HEAD_DIM).transpose(1, 2))
    assert len(cache.data.any(dim=-1).any(dim=2).any(dim=1).any(dim=0).nonzero()) == 11


def test_blocks_are_read_in_the_order_given() -> None:
    cache = make_cache()
    cache.data.normal_()
    read = cache.read_blocks(1, torch.tensor([4, 0, 2]), 19)
    slots = [*range(32, 40), *range(8), 16, 17, 18]
    assert torch.equal(read, cache.data[1][:, :, slots])
    assert torch.equal(cache.read(1, 32, 5), cache.data[1][:, :, 32:37])


def test_scatter_reverses_gather_and_touches_nothing_else() -> None:
    cache, other = make_cache(), make_cache()
    cache.data.normal_()
    other.data.normal_()
    before = other.data.clone()
    source, target = random_slots(13), random_slots(13)[::-1]
    moved = torch.empty(1, 2, 13, HEADS, HEAD_DIM)
    cache.gather(1, 1, cache.locate(source), ALL, moved)
    other.scatter(1, 1, other.locate(target), ALL, moved)
    assert torch.equal(other.data[1][:, :, target.copy()], cache.data[1][:, :, source])
    changed = (other.data != before).any(dim=-1).any(dim=2).any(dim=1).nonzero().tolist()
    assert sorted(changed) == sorted([1, slot] for slot in target)


@pytest.mark.parametrize("head", range(HEADS))
def test_one_head_moves_alone(head: int) -> None:
    cache, other = make_cache(), make_cache()
    cache.data.normal_()
    slots = random_slots(9)
    moved = torch.empty(LAYERS, 2, 9, 1, HEAD_DIM)
    cache.gather(0, LAYERS, cache.locate(slots), range(head, head + 1), moved)
    other.scatter(0, LAYERS, other.locate(slots), range(1), moved)
    assert torch.equal(other.data[:, :, 0][:, :, slots], cache.data[:, :, head][:, :, slots])
    assert not other.data[:, :, 1].any()


@pytest.mark.parametrize("heads", [range(0), range(1, 3), range(-1, 1)])
def test_heads_that_do_not_exist_are_refused(heads: range) -> None:
    cache = make_cache()
    with pytest.raises(IntegrityError, match="not within this rank's 2"):
        cache.gather(0, 1, cache.locate(np.array([0])), heads, torch.empty(1, 2, 1, len(heads), HEAD_DIM))


def test_no_slots_are_no_work() -> None:
    cache = make_cache()
    for move in (cache.gather, cache.scatter):
        move(0, LAYERS, cache.locate(np.array([], dtype=np.int64)), ALL, torch.empty(LAYERS, 2, 0, HEADS, HEAD_DIM))
    assert not cache.data.any()


@pytest.mark.parametrize(
    ("first_layer", "num_layers", "slots", "message"),
    [
        (-1, 1, [0], "layers -1 to 0 are not within the 3"),
        (2, 2, [0], "layers 2 to 4 are not within the 3"),
        (0, 0, [0], "layers 0 to 0"),
        (0, 1, [-1], r"slots must be from 0 to 47, got -1\.\.-1"),
        (0, 1, [3, 48], r"slots must be from 0 to 47, got 3\.\.48"),
    ],
)
def test_places_that_do_not_exist_are_refused(
    first_layer: int, num_layers: int, slots: list[int], message: str
) -> None:
    cache = make_cache()
    data = torch.ones(max(num_layers, 0), 2, len(slots), HEADS, HEAD_DIM)
    for move in (cache.gather, cache.scatter):
        with pytest.raises(IntegrityError, match=message):
            move(first_layer, num_layers, cache.locate(np.array(slots)), ALL, data)
    assert not cache.data.any()


def test_values_of_another_shape_or_type_are_refused() -> None:
    cache = make_cache()
    for data in (torch.empty(1, 2, 2, HEADS, HEAD_DIM), torch.empty(1, 2, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16)):
        for move in (cache.gather, cache.scatter):
            with pytest.raises(IntegrityError, match=r"expected torch.float32 values of shape \(1, 2, 1, 2, 4\)"):
                move(0, 1, cache.locate(np.array([0])), ALL, data)


def test_a_blocks_memory_is_counted_over_all_layers_and_the_heads_of_one_rank() -> None:
    cache = make_cache()
    block_bytes = int(cache.data.nbytes) // cache.num_blocks
    assert block_bytes == LAYERS * 2 * BLOCK_SIZE * HEADS * HEAD_DIM * 4
    assert bytes_per_block(CONFIG, HEADS, BLOCK_SIZE, torch.float32) == block_bytes
    assert bytes_per_block(CONFIG, HEADS, BLOCK_SIZE, torch.bfloat16) == block_bytes // 2
    assert bytes_per_block(CONFIG, 1, BLOCK_SIZE, torch.float32) == block_bytes // 2
    assert bytes_per_block(CONFIG, HEADS, 4 * BLOCK_SIZE, torch.float32) == 4 * block_bytes
