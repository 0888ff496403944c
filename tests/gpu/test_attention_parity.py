"""Every backend of attention against torch's own in float32, over the same cache."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.attention import make_attention
from engine.attention.prompts import can_flash
from engine.attention.sdpa import SdpaAttention
from engine.batch import Batch, StepShape
from engine.kv_cache import KVCache
from tests.gpu.common import DEVICE, GPU

pytestmark = GPU

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_CONTEXT = 5000
DTYPES = (torch.float32, torch.bfloat16)
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
NUM_LAYERS = 2
Share = tuple[int, int]
"""New tokens of a sequence and its context with them."""


class Case:
    """A cache full of numbers, the same in float32, and a step over it."""

    def __init__(self, seed: int, dtype: torch.dtype, shares: list[Share], *, scattered: bool = True) -> None:
        chance = random.Random(seed)
        self.block_size = chance.choice(BLOCK_SIZES)
        self.head_dim, ratio = HEAD_DIMS[seed % 5], 1 + seed % 8
        self.num_kv_heads = chance.choice((1, 2, 4))
        self.num_heads = ratio * self.num_kv_heads
        self.dtype = dtype
        counts = [-(-context // self.block_size) for _, context in shares]
        self._num_blocks = sum(counts) + 3
        deck = list(range(self._num_blocks))
        if scattered:
            chance.shuffle(deck)
        self._shape = StepShape(
            query_starts=np.cumsum([0, *(new for new, _ in shares)]),
            context_lens=np.array([context for _, context in shares]),
            block_ids=np.array(deck[: sum(counts)]),
            block_starts=np.cumsum([0, *counts]),
        )
        self._generator = torch.Generator(DEVICE).manual_seed(seed)
        self.cache, self._wide_cache = self._make_cache(dtype), self._make_cache(torch.float32)
        self.cache.data.normal_(generator=self._generator)
        self._wide_cache.data.copy_(self.cache.data)

    def check(self, name: str) -> None:
        """The backend of this name comes near enough to the reference, over all and in every row."""
        backend = make_attention(name, self.cache, self.num_heads)
        reference = SdpaAttention(self._wide_cache, self.num_heads)
        num_all = self.num_heads + 2 * self.num_kv_heads  # the queries lie between others, as in a model
        heads = torch.empty(self._shape.num_tokens, num_all, self.head_dim, dtype=self.dtype, device=DEVICE)
        q = heads.normal_(generator=self._generator)[:, : self.num_heads]
        batch, wide_batch = self._make_batch(), self._make_batch()
        backend.plan(batch)
        reference.plan(wide_batch)
        bound = BOUNDS[self.dtype]
        for layer in range(NUM_LAYERS):
            out = backend.forward(q, layer, batch)
            expected = reference.forward(q.float(), layer, wide_batch)
            assert out.shape == expected.shape
            assert out.dtype == self.dtype
            difference, sizes = (out.double() - expected.double()).norm(dim=1), expected.double().norm(dim=1)
            off, worst = float(difference.norm() / sizes.norm()), float((difference / sizes).max())
            assert off <= bound, f"{self}: off by {off:.2e}"
            assert worst <= 4 * bound, f"{self}: row {int((difference / sizes).argmax())} is off by {worst:.2e}"

    def __str__(self) -> str:
        sizes = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}, blocks of {self.block_size}"
        return f"{self.dtype}, {sizes}, new {np.diff(self._shape.query_starts)}, context {self._shape.context_lens}"

    def _make_cache(self, dtype: torch.dtype) -> KVCache:
        return KVCache(
            num_layers=NUM_LAYERS,
            num_blocks=self._num_blocks,
            block_size=self.block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            device=DEVICE,
        )

    def _make_batch(self) -> Batch:
        unused = torch.empty(0, dtype=torch.int32, device=DEVICE)
        return Batch(unused, unused, unused, unused, unused, unused, self._shape)


def context_of(chance: random.Random) -> int:
    """Short ones as often as long ones."""
    return chance.randint(1, chance.choice((20, 300, MAX_CONTEXT)))


def decodes(chance: random.Random, count: int) -> list[Share]:
    return [(1, context_of(chance)) for _ in range(count)]


def chunks(chance: random.Random, count: int) -> list[Share]:
    """Whole prompts, and chunks whose contexts are longer than they."""
    shares = []
    for _ in range(count):
        new = chance.randint(2, chance.choice((3, 70, min(700, MAX_CONTEXT))))
        shares.append((new, new if chance.random() < 0.4 else new + context_of(chance)))
    return shares


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_decoding(seed: int, dtype: torch.dtype) -> None:
    """The split-KV kernel, for one sequence and for many."""
    chance = random.Random(seed)
    Case(seed, dtype, decodes(chance, chance.choice((1, 2, 7, 30))), scattered=seed % 3 > 0).check("triton")


@pytest.mark.parametrize("contexts", [[MAX_CONTEXT], [1], [1] * 40, [MAX_CONTEXT, *[3] * 20]], ids=len)
def test_decoding_at_the_extremes(contexts: list[int]) -> None:
    Case(8, torch.bfloat16, [(1, context) for context in contexts]).check("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_prompts_by_torch(seed: int, dtype: torch.dtype) -> None:
    chance = random.Random(seed)
    Case(seed, dtype, chunks(chance, chance.choice((1, 3))), scattered=seed % 3 > 0).check("triton")


@pytest.mark.parametrize("seed", range(24))
def test_prompts_by_flash_attention(seed: int) -> None:
    chance = random.Random(seed)
    case = Case(seed, torch.bfloat16, chunks(chance, chance.choice((1, 3, 10))), scattered=seed % 3 > 0)
    check_flash(case)


@pytest.mark.parametrize("flash", [False, True], ids=["torch", "flash"])
@pytest.mark.parametrize("seed", range(24, 34))
def test_decoding_and_prompts_in_one_step(seed: int, flash: bool) -> None:
    """One token each first, then prompts, among which there may be one of a single token."""
    chance = random.Random(seed)
    shares = decodes(chance, chance.randint(1, 9)) + chunks(chance, 1) + decodes(chance, seed % 2) + chunks(chance, 2)
    case = Case(seed, torch.bfloat16, shares)
    if flash:
        check_flash(case)
    else:
        case.check("triton")


def check_flash(case: Case) -> None:
    if not can_flash(case.cache):
        pytest.skip(f"flash-attn-4 is not there or does not compute heads of {case.head_dim} on this GPU")
    case.check("flash")
