from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.config import CacheOptions
from engine.errors import CapacityError
from engine.kv_cache import bytes_per_block
from engine.memory import CPU_MEMORY_MIB, GpuUse, blocks_left, configured_blocks
from tests.engine.test_kv_cache import BLOCK_SIZE, CONFIG, HEADS

GIB = 1 << 30
CPU, GPU = torch.device("cpu"), torch.device("cuda")
USE = GpuUse(total=80 * GIB, share=0.75, others=2 * GIB, weights=16 * GIB, work=3 * GIB)


def test_kv_gets_what_weights_others_and_twice_the_work_space_leave() -> None:
    assert USE.left_for_kv == (60 - 16 - 2 * 3) * GIB
    for name, size in (("others", 0), ("weights", 1), ("work", 2)):
        more = dataclasses.replace(USE, **{name: getattr(USE, name) + GIB})
        assert more.left_for_kv == USE.left_for_kv - size * GIB
    assert dataclasses.replace(USE, share=1.0).left_for_kv == (78 - 16 - 2 * 3) * GIB
    assert dataclasses.replace(USE, share=0.25).left_for_kv == -2 * GIB


def test_others_count_once_they_reach_into_the_share() -> None:
    assert dataclasses.replace(USE, others=20 * GIB).left_for_kv == USE.left_for_kv
    assert dataclasses.replace(USE, others=25 * GIB).left_for_kv == USE.left_for_kv - 5 * GIB
    half = dataclasses.replace(USE, share=0.45)
    assert dataclasses.replace(half, others=36 * GIB).left_for_kv == half.left_for_kv, "two workers of one GPU"


def test_the_use_of_a_gpu_names_what_took_what() -> None:
    assert str(USE) == (
        "of 80.0 GiB this worker may use 60.0 (gpu_memory_share 0.75); weights take 16.0, work space 6.0; "
        "other processes and CUDA take 2.0, which leaves 38.0 for KV"
    )


def test_as_many_blocks_as_fit_into_what_is_left() -> None:
    assert blocks_left(USE, 38 * GIB // 2) == 2
    assert blocks_left(USE, GIB) == 38
    assert blocks_left(USE, GIB - 1) == 38
    assert blocks_left(USE, GIB + 1) == 37


@pytest.mark.parametrize("share", [0.75, 0.25], ids=["room for one block", "less than nothing"])
def test_no_room_for_two_blocks_is_an_error_that_says_why(share: float) -> None:
    use = dataclasses.replace(USE, share=share)
    with pytest.raises(CapacityError) as caught:
        blocks_left(use, 19 * GIB + 1)
    message = str(caught.value)
    assert f"no room for 2 KV blocks of {19 * GIB + 1} bytes: {use}. " in message
    for remedy in ("gpu_memory_share", "max_step_tokens", "max_running"):
        assert remedy in message


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_what_is_configured_decides_wherever_it_is_given(device: torch.device) -> None:
    assert configured_blocks(CacheOptions(num_blocks=7, memory_mib=1), 999, device) == 7
    block_bytes = bytes_per_block(CONFIG, HEADS, BLOCK_SIZE, torch.float32)
    assert configured_blocks(CacheOptions(memory_mib=1), block_bytes, device) == (1 << 20) // block_bytes
    assert configured_blocks(CacheOptions(memory_mib=1), 1 << 19, device) == 2


def test_a_cpu_has_a_default_and_a_gpu_is_asked_what_it_has_left() -> None:
    assert configured_blocks(CacheOptions(), 1 << 20, CPU) == CPU_MEMORY_MIB
    assert configured_blocks(CacheOptions(), 1 << 20, GPU) is None


@pytest.mark.parametrize(("block_bytes", "room"), [(26214400, 0), ((1 << 19) + 1, 1)])
def test_too_little_memory_is_refused(block_bytes: int, room: int) -> None:
    message = rf"memory_mib \(1\) has room for {room} KV blocks of {block_bytes} bytes; at least 2 are needed"
    with pytest.raises(CapacityError, match=message):
        configured_blocks(CacheOptions(memory_mib=1), block_bytes, CPU)
