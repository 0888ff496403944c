from __future__ import annotations

import pytest
import torch

from engine.kernels.rope_store import FEW_ROWS, rope_store
from engine.layers.norm import RMSNorm
from tests.engine.kernels.bounds import Maker, check, rms_normed

HEAD_DIMS = (64, 80, 96, 128, 256)
EPS = 1e-6


def by_definition(
    heads: torch.Tensor, num_kv_heads: int, positions: torch.Tensor, frequencies: torch.Tensor, norms: list[RMSNorm]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [num_rows, num_heads, head_dim] and keys and values [2, num_kv_heads, num_rows, head_dim], in float64.

    Angles are taken in float32, as every implementation does.
    """
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = torch.split(heads.double(), [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms:
        q, k = rms_normed(q, norms[0].weight, EPS), rms_normed(k, norms[1].weight, EPS)
    angles = (positions.float()[:, None] * frequencies).double()[:, None]
    cos, sin = angles.cos(), angles.sin()
    turned = []
    for part in (q, k):
        first, second = part.chunk(2, dim=-1)
        turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    return turned[0], torch.stack((turned[1], v)).transpose(1, 2)


def make_layer(
    num_kv_heads: int, num_slots: int, head_dim: int, like: torch.Tensor, *, slots_first: bool
) -> torch.Tensor:
    """A layer of the cache [2, num_kv_heads, num_slots, head_dim], as a CPU or a GPU lays it out, all sevens."""
    if slots_first:
        return like.new_full((2, num_slots, num_kv_heads, head_dim), 7.0).transpose(1, 2)
    return like.new_full((2, num_kv_heads, num_slots, head_dim), 7.0)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (6, 2), (5, 1), (8, 1), (3, 3)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_heads_are_rotated_and_stored(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int, normed: bool
) -> None:
    make = Maker(device, dtype)
    heads = make.normal(4, num_heads + 2 * num_kv_heads, head_dim)
    positions = torch.tensor([0, 5, 900, 4095], dtype=torch.int32, device=device)
    slot_ids = torch.tensor([3, -1, 19, 0], dtype=torch.int32, device=device)
    frequencies = frequencies_of(head_dim, device)
    norms = [RMSNorm(make.positive(head_dim), EPS) for _ in range(2)] if normed else []
    layer = make_layer(num_kv_heads, 20, head_dim, heads, slots_first=normed)
    queries, keys_values = by_definition(heads, num_kv_heads, positions, frequencies, norms)
    before = heads.clone()
    check(rope_store(heads, positions, slot_ids, frequencies, layer, *norms), queries)
    assert torch.equal(heads, before)
    stored, rows = [3, 19, 0], [0, 2, 3]
    check(layer[:, :, stored], keys_values[:, :, rows])
    assert torch.equal(layer[1][:, stored], before[rows, num_heads + num_kv_heads :].transpose(0, 1))
    layer[:, :, stored] = 7.0
    assert bool((layer == 7.0).all())


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_any_number_of_rows(device: torch.device, dtype: torch.dtype, num_rows: int) -> None:
    make, num_kv_heads = Maker(device, dtype), 2
    heads = make.normal(num_rows, 9, 64)  # more heads than one program takes
    positions, slot_ids = make.order(num_rows) * 3, make.order(num_rows)
    frequencies, layer = frequencies_of(64, device), make_layer(num_kv_heads, num_rows, 64, heads, slots_first=True)
    queries, keys_values = by_definition(heads, num_kv_heads, positions, frequencies, [])
    check(rope_store(heads, positions, slot_ids, frequencies, layer), queries)
    check(layer[:, :, slot_ids.long()], keys_values)


def test_nothing_is_stored_where_no_row_has_a_slot(device: torch.device, dtype: torch.dtype) -> None:
    heads = Maker(device, dtype).normal(3, 4, 64)
    layer = make_layer(1, 8, 64, heads, slots_first=True)
    nowhere = torch.full((3,), -1, dtype=torch.int32, device=device)
    rope_store(heads, torch.zeros_like(nowhere), nowhere, frequencies_of(64, device), layer)
    assert bool((layer == 7.0).all())


def frequencies_of(head_dim: int, device: torch.device) -> torch.Tensor:
    return (1.0 / 10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)).to(device, torch.float32)
