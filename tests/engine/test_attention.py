from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from engine.attention import make_attention
from engine.batch import Batch, StepShape
from engine.kv_cache import KVCache

BLOCK_SIZE, HEAD_DIM, NUM_BLOCKS, PADDING = 8, 16, 64, 3


def make_cache(num_kv_heads: int) -> KVCache:
    cache = KVCache(
        num_layers=2,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.data.normal_(generator=torch.Generator().manual_seed(0))
    return cache


def make_batch(shares: list[tuple[int, int]], scattered: bool) -> Batch:
    """shares are (new tokens, context) of each sequence."""
    deck = list(range(NUM_BLOCKS - 1, -1, -1))
    if scattered:
        random.Random(1).shuffle(deck)
    empty = torch.empty(0, dtype=torch.int64)
    blocks = [-(-context // BLOCK_SIZE) for _, context in shares]
    shape = StepShape(
        query_starts=np.cumsum([0, *(new for new, _ in shares)]),
        context_lens=np.array([context for _, context in shares]),
        block_ids=np.array([deck.pop() for _ in range(sum(blocks))]),
        block_starts=np.cumsum([0, *blocks]),
    )
    return Batch(empty, empty, empty, empty, empty, empty, shape)


def by_definition(q: torch.Tensor, cache: KVCache, layer: int, batch: Batch) -> torch.Tensor:
    """Token by token and head by head, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    groups = q.shape[1] // cache.num_kv_heads
    for index, context in enumerate(batch.shape.context_lens.tolist()):
        first, stop = batch.shape.query_starts[index : index + 2]
        blocks = batch.shape.blocks_of(index)
        slots = [int(blocks[p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context)]
        for row in range(first, stop):
            visible = slots[: context - (stop - 1 - row)]
            for head in range(q.shape[1]):
                keys, values = cache.data[layer, :, head // groups, visible].double()
                weights = torch.softmax(keys @ q[row, head].double() / math.sqrt(HEAD_DIM), dim=0)
                out[row, head] = weights @ values
    return out.flatten(1).float()


@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "consecutive"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize(
    "shares",
    [
        [(1, 1)],
        [(1, 50)],
        [(20, 20)],
        [(9, 57)],
        [(2, 2), (1, 8), (1, 9), (17, 40), (33, 33), (1, 64)],
    ],
    ids=["first token", "decode", "whole prompt", "chunk", "mixed"],
)
def test_attention_is_its_definition(
    shares: list[tuple[int, int]], num_heads: int, num_kv_heads: int, scattered: bool
) -> None:
    cache, batch = make_cache(num_kv_heads), make_batch(shares, scattered)
    backend = make_attention("sdpa", cache, num_heads)
    num_tokens = batch.shape.num_tokens
    q = torch.randn(num_tokens + PADDING, num_heads, HEAD_DIM)
    backend.plan(batch)
    for layer in range(2):
        out = backend.forward(q, layer, batch)
        expected = by_definition(q[:num_tokens], cache, layer, batch)
        torch.testing.assert_close(out[:num_tokens], expected, rtol=1e-4, atol=1e-5)
        assert not out[num_tokens:].any()


def test_backends_are_chosen_by_name() -> None:
    cache = make_cache(1)
    assert type(make_attention("auto", cache, 1)) is type(make_attention("sdpa", cache, 1))
    with pytest.raises(ValueError, match="there is no attention backend 'magic'; there are auto, flash, sdpa, triton"):
        make_attention("magic", cache, 1)
