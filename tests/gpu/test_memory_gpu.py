"""The KV cache takes what a GPU has left, and an error says what took the rest."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.errors import CapacityError
from tests.engine.checkpoints import VOCAB_SIZE
from tests.engine.driver import Driver, random_prompt
from tests.gpu.common import DEVICE, GPU, make_gpu_runner

pytestmark = GPU

GIB = 1 << 30
TOLERANCE = GIB
"""What CUDA takes for itself, for kernels and for recordings."""


@pytest.fixture(autouse=True)
def _empty_gpu() -> Iterator[None]:
    """Before and after each test, as far as this process goes."""
    collect()
    yield
    collect()


def collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def kv_bytes(path: Path, share: float) -> int:
    """The size of a runner's KV cache that may use this share; the runner is gone afterwards."""
    runner = make_gpu_runner(path, "bfloat16", num_blocks=None, share=share)
    size = int(runner.kv_cache.data.nbytes)
    del runner
    collect()
    return size


def test_weights_work_space_and_kv_together_take_the_share(tiny_llama: Path) -> None:
    """From loading to serving."""
    _, total = torch.cuda.mem_get_info()
    runner = make_gpu_runner(tiny_llama, "bfloat16", num_blocks=None, share=0.5, max_running=16)
    runner.warm_up()
    driver = Driver(runner, shuffled=False)
    sequences = [driver.add(random_prompt(n, VOCAB_SIZE), max_tokens=5) for n in (1, 300, 2000)]
    assert all(len(answer) == 5 for answer in driver.finish(sequences, chunk=2000))
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    shared = "PYTEST_XDIST_WORKER" in os.environ  # then other processes hold some of the card, and not always as much
    assert (torch.cuda.memory_reserved() if shared else total - free) <= 0.5 * total + TOLERANCE
    assert runner.kv_cache.data.nbytes >= 0.5 * total - 4 * GIB


def test_a_larger_share_is_all_for_kv(tiny_llama: Path) -> None:
    _, total = torch.cuda.mem_get_info()
    small, large = kv_bytes(tiny_llama, 0.3), kv_bytes(tiny_llama, 0.4)
    assert large - small == pytest.approx(0.1 * total, abs=TOLERANCE)


def test_what_others_hold_is_left_to_them(tiny_llama: Path) -> None:
    before = kv_bytes(tiny_llama, 0.4)
    held = torch.empty(4 * GIB, dtype=torch.uint8, device=DEVICE)
    assert before - kv_bytes(tiny_llama, 0.4) == pytest.approx(held.nbytes, abs=TOLERANCE)


def test_a_share_that_leaves_nothing_for_kv_is_an_error_that_says_what_took_it(tiny_llama: Path) -> None:
    with pytest.raises(CapacityError) as caught:
        make_gpu_runner(tiny_llama, "bfloat16", num_blocks=None, share=0.0001)
    message = str(caught.value)
    for part in ("no room for 2 KV blocks", "gpu_memory_share 0.0001", "weights take", "work space", "other processes"):
        assert part in message


def test_a_cache_that_does_not_fit_is_an_error_that_says_who_holds_what(tiny_llama: Path) -> None:
    """And leaves nothing behind."""
    before = torch.cuda.memory_allocated()
    with pytest.raises(CapacityError, match=r"ran out of memory while the KV cache was made: of .* this process holds"):
        make_gpu_runner(tiny_llama, "bfloat16", num_blocks=1 << 30)
    collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_a_new_cache_holds_numbers_and_a_scrubbed_one_too(tiny_llama: Path) -> None:
    """Flash attention multiplies what a block's unused slots hold by zero: NaN would survive that."""
    runner = make_gpu_runner(tiny_llama, "bfloat16", num_blocks=32)
    assert not runner.kv_cache.data.any()
    runner.kv_cache.data[0, 1, 0, 5:9] = float("nan")
    runner.kv_cache.data[0, 0, 0, 5:9] = 3.0
    runner.kv_cache.scrub()
    assert bool(torch.isfinite(runner.kv_cache.data).all())
    assert bool((runner.kv_cache.data[0, 0, 0, 5:9] == 3.0).all())
