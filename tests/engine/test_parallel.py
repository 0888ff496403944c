from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from engine.errors import UnsupportedModelError
from engine.layers.embedding import ParallelHead, VocabParallelEmbedding
from engine.layers.norm import RMSNorm
from engine.parallel import TensorParallel
from engine.sequence import Sequence
from tests.engine.checkpoints import VOCAB_SIZE, CheckpointFamily, make_checkpoint
from tests.engine.driver import Driver, largest_difference, make_runner, random_prompt
from tests.engine.test_linear import make_batch

T = TypeVar("T")
TIMEOUT_S = 60.0


def on_all_ranks(size: int, work: Callable[[TensorParallel], T]) -> list[T]:
    """Run `work` on `size` ranks, each a thread of this process, joined by gloo."""
    store = HashStore()

    def one(rank: int) -> T:
        group = ProcessGroupGloo(store, rank, size, timedelta(seconds=TIMEOUT_S))
        return work(TensorParallel(rank, size, group, store))

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(one, rank) for rank in range(size)]
        return [future.result(TIMEOUT_S) for future in futures]


def test_collectives_join_what_ranks_have() -> None:
    def work(parallel: TensorParallel) -> tuple[list[float], list[list[float]]]:
        summed = parallel.all_reduce(torch.full((2,), float(parallel.rank + 1)))
        gathered = parallel.all_gather(torch.full((2, 1), float(parallel.rank)).expand(2, 2)[:, :1])
        return summed.tolist(), gathered.tolist()

    assert on_all_ranks(3, work) == [([6.0, 6.0], [[0.0, 1.0, 2.0]] * 2)] * 3


def test_ranks_agree_on_the_least() -> None:
    assert on_all_ranks(3, lambda parallel: parallel.least(7 - parallel.rank, "blocks")) == [5, 5, 5]


def test_one_rank_keeps_what_it_has() -> None:
    alone, tensor = TensorParallel(), torch.randn(2, 3)
    assert alone.all_reduce(tensor) is tensor
    assert alone.all_gather(tensor) is tensor
    assert alone.least(3, "blocks") == 3
    assert alone.share(7, "things") == range(7)


def test_shares_are_equal_and_in_order() -> None:
    store = HashStore()
    group = ProcessGroupGloo(store, 0, 1, timedelta(seconds=TIMEOUT_S))
    ranks = [TensorParallel(rank, 4, group, store) for rank in range(4)]
    assert [rank.share(8, "heads") for rank in ranks] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert [list(rank.share_kv_heads(2)) for rank in ranks] == [[0], [0], [1], [1]]
    assert [list(rank.share_kv_heads(1)) for rank in ranks] == [[0]] * 4
    with pytest.raises(UnsupportedModelError, match=r"heads \(9\) cannot be divided equally among 4 ranks"):
        ranks[0].share(9, "heads")
    with pytest.raises(UnsupportedModelError, match="4 ranks cannot share this model's 3 KV heads"):
        ranks[0].share_kv_heads(3)


def test_a_rank_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be from 0 to 1, got 2"):
        TensorParallel(2, 2)
    with pytest.raises(ValueError, match="2 ranks need a process group"):
        TensorParallel(0, 2)


def test_a_vocabulary_that_does_not_divide_is_looked_up_and_projected_alike() -> None:
    weight, x, norm = torch.randn(11, 6), torch.randn(4, 6), RMSNorm(torch.rand(6), 1e-5)

    def work(parallel: TensorParallel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = make_batch([4, 0, 10, 0], [-1, 1, -1, 0])
        return *VocabParallelEmbedding(weight, parallel)(batch), ParallelHead(weight, parallel)(x, norm)

    for vectors, token_ids, logits in on_all_ranks(3, work):
        assert token_ids.tolist() == [4, 9, 10, 8]
        assert torch.equal(vectors, weight[token_ids])
        torch.testing.assert_close(logits, norm(x) @ weight.T)


@pytest.mark.parametrize(
    ("family", "tied", "size"),
    [
        (CheckpointFamily.LLAMA, True, 2),
        (CheckpointFamily.QWEN2, False, 2),
        (CheckpointFamily.QWEN3, True, 2),
        (CheckpointFamily.QWEN2, True, 4),  # 2 KV heads on 4 ranks
    ],
)
def test_several_ranks_compute_what_one_does(tmp_path: Path, family: CheckpointFamily, tied: bool, size: int) -> None:
    path = make_checkpoint(tmp_path, family, tied=tied)

    def work(parallel: TensorParallel) -> list[Sequence]:
        driver = Driver(make_runner(path, parallel=parallel))
        sequences = [driver.add(random_prompt(n, VOCAB_SIZE), logprobs=20, max_tokens=6) for n in (1, 40, 77)]
        driver.finish(sequences, chunk=32)
        return sequences

    alone = work(TensorParallel())
    for ranks in on_all_ranks(size, work):
        for sequence, expected in zip(ranks, alone, strict=True):
            assert sequence.token_ids == expected.token_ids
            assert largest_difference(sequence, expected) < 1e-4
