"""Which pieces carry a digest, and that no damaged piece passes one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kv_transfer.checksum import reference_checksum
from kv_transfer.config import DigestPolicy, TransferConfig
from kv_transfer.digest import Digester

NUM_INJECTIONS = 10_000


def digester(policy: DigestPolicy, *, on_gpu: bool, share: float = 1 / 16) -> Digester:
    return Digester(TransferConfig(digest=policy, digest_share=share), on_gpu=on_gpu)


def share_of(digester: Digester, draws: int = 20_000) -> float:
    return sum(digester.wanted() for _ in range(draws)) / draws


@pytest.mark.parametrize(
    ("policy", "on_gpu", "share"),
    [
        ("auto", False, 1.0),
        ("auto", True, 1 / 16),
        ("all", False, 1.0),
        ("all", True, 1.0),
        ("sampled", False, 1 / 16),
        ("none", False, 0.0),
        ("none", True, 0.0),
    ],
)
def test_policies(policy: DigestPolicy, on_gpu: bool, share: float) -> None:
    assert share_of(digester(policy, on_gpu=on_gpu)) == pytest.approx(share, rel=0.25)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_the_sampled_share_is_the_users(share: float) -> None:
    assert share_of(digester("sampled", on_gpu=True, share=share)) == pytest.approx(share, rel=0.35)


def test_two_ends_draw_for_themselves() -> None:
    """A link that fails in a rhythm is found all the same."""
    one, two = (digester("sampled", on_gpu=False, share=0.5) for _ in range(2))
    assert [one.wanted() for _ in range(64)] != [two.wanted() for _ in range(64)]


def test_a_digest_on_a_cpu_is_known_before_the_piece_is_written() -> None:
    assert digester("auto", on_gpu=False).is_prompt
    assert not digester("auto", on_gpu=True).is_prompt


def xxh3(data: np.ndarray) -> int:
    return digester("all", on_gpu=False).begin(torch.from_numpy(data))()


def multiply_add(data: np.ndarray) -> int:
    return reference_checksum(torch.from_numpy(data))


def damaged(data: np.ndarray, other: np.ndarray, kind: str, draw: random.Random) -> np.ndarray:
    """What a faulty link makes of a piece; never what was sent."""
    wrong = data.copy()
    if kind == "bit flip":
        wrong[draw.randrange(len(wrong))] ^= 1 << draw.randrange(8)
    elif kind == "truncated":  # the rest of the receiver's buffer is what was there before
        cut = draw.randrange(len(wrong))
        wrong[cut:] = other[cut:] if draw.random() < 0.5 else 0
    elif kind == "swapped pieces":
        wrong = other.copy()
    else:
        size = 64 * draw.randint(1, 7)
        first = draw.randrange(0, len(wrong) - 2 * size)
        wrong[first : first + 2 * size] = np.roll(wrong[first : first + 2 * size], size)
    return wrong


@pytest.mark.parametrize("algorithm", [xxh3, multiply_add])
def test_ten_thousand_damaged_pieces_are_all_caught(algorithm: object) -> None:
    """FAILURES.md, case 10; end to end in test_receiver."""
    draw, noise = random.Random(10), np.random.default_rng(10)
    pieces = [noise.integers(0, 256, 2048, dtype=np.uint8) for _ in range(50)]
    digests = [algorithm(piece) for piece in pieces]  # type: ignore[operator]
    kinds = ("bit flip", "truncated", "swapped pieces", "swapped runs")
    caught = injected = 0
    while injected < NUM_INJECTIONS:
        index, other = draw.sample(range(len(pieces)), 2)
        wrong = damaged(pieces[index], pieces[other], kinds[injected % len(kinds)], draw)
        if np.array_equal(wrong, pieces[index]):
            continue
        injected += 1
        caught += algorithm(wrong) != digests[index]  # type: ignore[operator]
    assert caught == NUM_INJECTIONS
