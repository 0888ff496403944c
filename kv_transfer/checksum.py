"""A 64-bit checksum of bytes on a GPU: fast, and sure to change when any one word does.

The sum over all 32-bit words of (word + 1) * odd(i), modulo 2^64, where odd(i) is an odd number mixed from the
word's place (multiply and xor-shift, after Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014). A product with an odd number is a bijection modulo 2^64, so a change of one word always
changes the sum; words that change places, or any other mix-up, go unseen with a chance of about 2^-63. It is no
defence against an attacker.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 4096
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = 0xBF58476D1CE4E5B9 - (1 << 64)
_SHIFT = 30
_LOW = (1 << (64 - _SHIFT)) - 1


def begin_checksum(data: torch.Tensor) -> Callable[[], int]:
    """Enqueue the checksum of a flat uint8 tensor on a GPU; its value may be asked for once the stream is past here."""
    words = data.view(torch.int32)
    total = torch.zeros(1, dtype=torch.int64, device=data.device)
    checksum_kernel[(triton.cdiv(words.numel(), BLOCK),)](words, total, words.numel(), SIZE=BLOCK, num_warps=8)
    host = torch.empty(1, dtype=torch.int64, pin_memory=data.is_cuda)
    host.copy_(total, non_blocking=True)
    return lambda: int(host.item()) % (1 << 64)


def reference_checksum(data: torch.Tensor) -> int:
    """The same, by torch alone."""
    words = data.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    place = (torch.arange(words.numel(), dtype=torch.int64, device=data.device) + 1) * _GOLDEN
    mixed = (place ^ ((place >> _SHIFT) & _LOW)) * _MIX
    odd = (mixed ^ ((mixed >> _SHIFT) & _LOW)) | 1
    return int(((words + 1) * odd).sum().item()) % (1 << 64)


@triton.jit(do_not_specialize=["num_words"])
def checksum_kernel(words, total, num_words, SIZE: tl.constexpr):
    """SIZE words a program; the sums meet in `total`."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < num_words
    word = tl.load(words + index, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    place = (index + 1) * -7046029254386353131
    mixed = (place ^ ((place >> 30) & 17179869183)) * -4658895280553007687
    odd = (mixed ^ ((mixed >> 30) & 17179869183)) | 1
    tl.atomic_add(total, tl.sum(tl.where(inside, (word + 1) * odd, 0)))
