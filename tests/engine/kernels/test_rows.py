from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from engine.kernels.rows import EMBED_BLOCK, GREEDY_BLOCK, SILU_BLOCK, embed, greedy, rms_norm, silu_mul
from tests.engine.kernels.bounds import Maker, check, rms_normed


@pytest.mark.parametrize("size", [1, 64, 96, 1000, 4096])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm_is_its_definition(device: torch.device, dtype: torch.dtype, size: int, scale: float) -> None:
    make = Maker(device, dtype)
    x, weight = make.normal(5, size, scale=scale), make.positive(size)
    check(rms_norm(x, weight, 1e-5), rms_normed(x, weight, 1e-5))


def test_rms_norm_works_on_the_heads_of_a_wider_tensor(device: torch.device, dtype: torch.dtype) -> None:
    make = Maker(device, dtype)
    wide, weight = make.normal(3, 8, 32), make.positive(32)
    before = wide.clone()
    check(rms_norm(wide[:, 2:5], weight, 1e-6), rms_normed(before[:, 2:5], weight, 1e-6))
    check(rms_norm(wide[:, 0], weight, 1e-6), rms_normed(before[:, 0], weight, 1e-6))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("size", [1, 100, SILU_BLOCK, SILU_BLOCK + 8])
def test_silu_mul_is_its_definition(device: torch.device, dtype: torch.dtype, size: int) -> None:
    gate_up = Maker(device, dtype).normal(3, 2 * size, scale=3.0)
    wide = gate_up.double()
    check(silu_mul(gate_up), functional.silu(wide[:, :size]) * wide[:, size:])


@pytest.mark.parametrize("size", [72, EMBED_BLOCK + 8])
def test_each_row_is_a_token_or_what_the_step_before_chose(device: torch.device, dtype: torch.dtype, size: int) -> None:
    table = Maker(device, dtype).normal(50, size)
    token_ids = torch.tensor([49, 1, 0, 3, 7], dtype=torch.int32, device=device)
    sources = torch.tensor([-1, 1, -1, 0, 1], dtype=torch.int32, device=device)
    previous = torch.tensor([[8, 1], [9, 1], [10, 1]], device=device)
    vectors, tokens = embed(token_ids, sources, previous, table)
    assert tokens.tolist() == [49, 9, 0, 8, 9]
    assert tokens.dtype == torch.int64
    assert torch.equal(vectors, table[tokens])


def chosen(logits: torch.Tensor) -> list[list[int]]:
    """The choices for some logits, each row's index and whether it is usable."""
    choices = torch.full((logits.shape[0], 2), -7, dtype=torch.int64, device=logits.device)
    greedy(logits, choices)
    return choices.tolist()


@pytest.mark.parametrize("size", [1, 77, GREEDY_BLOCK, GREEDY_BLOCK + 1, 2 * GREEDY_BLOCK + 100])
def test_greedy_is_the_largest(device: torch.device, dtype: torch.dtype, size: int) -> None:
    logits = Maker(device, dtype).normal(6, size, scale=5.0)
    logits[1] -= 1000.0  # what lies past the last column must not win
    best = logits.max(dim=-1).values[:, None]
    first = torch.where(logits == best, torch.arange(size, device=device), size).amin(dim=-1)
    assert chosen(logits) == [[index, 1] for index in first.tolist()]


@pytest.mark.parametrize(
    "equals",
    [[0, 1], [5, 6, 7], [GREEDY_BLOCK - 1, GREEDY_BLOCK], [100, GREEDY_BLOCK + 4], [3, 2 * GREEDY_BLOCK + 99]],
    ids=str,
)
def test_of_equals_the_lowest_is_chosen(device: torch.device, dtype: torch.dtype, equals: list[int]) -> None:
    logits = Maker(device, dtype).normal(2, 2 * GREEDY_BLOCK + 100)
    logits[1, equals] = 50.0
    assert chosen(logits)[1] == [equals[0], 1]
    assert chosen(torch.zeros_like(logits)) == [[0, 1]] * 2


@pytest.mark.parametrize("place", [0, 5, GREEDY_BLOCK - 1, GREEDY_BLOCK, GREEDY_BLOCK + 99])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_a_logit_that_is_no_number_is_not_usable(
    device: torch.device, dtype: torch.dtype, bad: float, place: int
) -> None:
    logits = Maker(device, dtype).normal(3, GREEDY_BLOCK + 100)
    logits[1, place] = bad
    logits[0, place] = -math.inf
    logits[2, 17] = 50.0
    found = chosen(logits)
    assert [usable for _, usable in found] == [1, 0, 1]
    assert found[2][0] == 17


def test_a_row_without_any_possible_token_is_not_usable(device: torch.device, dtype: torch.dtype) -> None:
    logits = Maker(device, dtype).normal(2, GREEDY_BLOCK + 100)
    logits[1] = -math.inf
    assert [usable for _, usable in chosen(logits)] == [1, 0]


def test_rows_may_lie_apart(device: torch.device, dtype: torch.dtype) -> None:
    wide = Maker(device, dtype).normal(4, 300)
    wide[:, 200:] = 90.0
    assert chosen(wide[:, :200]) == chosen(wide[:, :200].contiguous())
