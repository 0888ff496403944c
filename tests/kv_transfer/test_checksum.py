"""The GPU's digest: the kernel equals its reference, and no single change goes unseen. Interpreted where no GPU is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kv_transfer.checksum import BLOCK, begin_checksum, reference_checksum

WORD_BYTES = 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if (request.param == "cuda") is not torch.cuda.is_available():
        pytest.skip("a kernel is compiled where a GPU is, else interpreted")
    return torch.device(request.param)


def noise(device: torch.device, num_words: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_words * WORD_BYTES,), dtype=torch.uint8, generator=generator).to(device)


def checksum(data: torch.Tensor) -> int:
    value = begin_checksum(data)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return value()


def by_definition(data: torch.Tensor) -> int:
    """From the docstring, in Python's own integers."""
    total = 0
    for index, word in enumerate(data.cpu().numpy().view(np.uint32).tolist()):
        mixed = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
        for factor in (0xBF58476D1CE4E5B9, 1):
            mixed = (mixed ^ mixed >> 30) * factor % 2**64
        total += (word + 1) * (mixed | 1)
    return total % 2**64


@pytest.mark.parametrize("num_words", [1, 3, 64, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
@pytest.mark.parametrize("seed", [1, 2])
def test_kernel_and_reference_give_the_definition(device: torch.device, num_words: int, seed: int) -> None:
    data = noise(device, num_words, seed)
    assert checksum(data) == reference_checksum(data) == by_definition(data)


@pytest.mark.parametrize("byte", [0, 255])
def test_equal_words_are_told_by_their_number(device: torch.device, byte: int) -> None:
    sums = [checksum(torch.full((n * WORD_BYTES,), byte, dtype=torch.uint8, device=device)) for n in range(1, 40)]
    assert len(set(sums)) == len(sums)


def test_every_single_bit_counts(device: torch.device) -> None:
    data = noise(device, 96)
    seen = {reference_checksum(data)}
    for byte in range(data.numel()):
        for bit in range(8):
            data[byte] ^= 1 << bit
            seen.add(reference_checksum(data))
            data[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * data.numel()


@pytest.mark.parametrize("place", [0, 4 * BLOCK - 1, 4 * BLOCK, 5 * BLOCK + 2])
def test_a_flipped_bit_changes_the_kernels_sum(device: torch.device, place: int) -> None:
    data = noise(device, BLOCK + BLOCK // 2)
    before = checksum(data)
    data[place] ^= 0x40
    assert checksum(data) != before
    data[place] ^= 0x40
    assert checksum(data) == before


def test_swapped_words_and_halves_change_it(device: torch.device) -> None:
    data = noise(device, BLOCK * 2)
    words = data.view(torch.int32)
    before = checksum(data)
    for first, second in ((0, 1), (0, BLOCK), (BLOCK - 1, BLOCK), (5, 2 * BLOCK - 1)):
        swapped = words.clone()
        swapped[[first, second]] = words[[second, first]]
        assert checksum(swapped.view(torch.uint8)) != before
    assert checksum(data.roll(data.numel() // 2)) != before


def test_a_truncated_piece_changes_it(device: torch.device) -> None:
    data = noise(device, BLOCK + 40)
    data[-80:] = 0
    sums = {checksum(data[: data.numel() - cut * WORD_BYTES]) for cut in range(30)}
    assert len(sums) == 30, "zeros at the end count"


def test_values_of_two_begun_together_do_not_mix(device: torch.device) -> None:
    one, two = noise(device, 100, 1), noise(device, 100, 2)
    values = begin_checksum(one), begin_checksum(two)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert [value() for value in values] == [reference_checksum(one), reference_checksum(two)]
