"""What a trace says of the time a prompt loses; the traces are made up."""

from __future__ import annotations

import pytest

from benchmarks.engine_trace import Kernel
from benchmarks.transfer import main
from benchmarks.transfer_kernels import compare, prompts_of


def prompt(at: float, *lengths: float, gap: float = 1.0) -> list[Kernel]:
    """Kernels `gemm`, `flash`, `gemm`, ... one after the other."""
    kernels = []
    for number, length in enumerate(lengths):
        kernels.append(Kernel("flash" if number % 2 else "gemm", at, at + length))
        at += length + gap
    return kernels


def test_each_kernel_is_compared_with_itself_and_its_loss_put_down_to_its_neighbours():
    alone = [prompt(0, 10, 20, 10, 20), prompt(1e6, 10, 20, 10, 20), prompt(2e6, 10, 22, 10, 20)]
    split = [prompt(0, 10, 25, 11, 20, gap=2.0), prompt(1e6, 10, 25, 11, 20, gap=2.0)]
    for each, at in zip(split, (0, 1e6), strict=True):
        each.append(Kernel("ncclDevKernel_SendRecv", at + 15, at + 20, 16))  # beside the second
        each.append(Kernel("kv_pack_kernel", at + 38, at + 45, 14))  # beside the second's end and the third
    loss = compare(alone, split)
    assert loss.by_neighbour == {"gather": (1, 1.0), "nothing": (2, 0.0), "send": (1, 5.0)}
    assert (loss.alone_us, loss.split_us) == (63.0, 72.0)
    assert (loss.alone_gaps_us, loss.split_gaps_us) == (3.0, 6.0)
    assert loss.by_name == [("flash", 2, 40.0, 45.0), ("gemm", 2, 20.0, 21.0)]
    assert loss.sends_us == [5.0, 5.0]


def test_long_pauses_part_prompts():
    kernels = prompt(0, 10, 20) + prompt(200_000, 10, 20) + [Kernel("ncclDevKernel", 400_000, 400_010, 16)]
    assert [len(each) for each in prompts_of(kernels)] == [2, 2]


def test_prompts_of_other_kernels_are_not_compared():
    with pytest.raises(ValueError, match="prompts of 2, 3 kernels cannot be compared"):
        compare([prompt(0, 10, 20)], [prompt(0, 10, 20, 10)])


def test_a_cpu_has_none():
    with pytest.raises(SystemExit, match="section kernels needs two GPUs"):
        main(["--device", "cpu", "--sections", "kernels"])
