from __future__ import annotations

import pytest
import torch

from engine.api import GenerateRequest, SamplingParams
from engine.batch import ScheduledSequence, StepPlan
from engine.batch_builder import BatchBuilder
from engine.errors import IntegrityError
from engine.sequence import PENDING, Sequence


PREVIOUS = torch.zeros(4, 2, dtype=torch.int64)


def make_share(num_tokens: int, block_ids: list[int], start: int, count: int) -> ScheduledSequence:
    request = GenerateRequest(
        request_id="r", prompt_token_ids=tuple(range(100, 100 + num_tokens)), params=SamplingParams()
    )
    sequence = Sequence.from_request(request, arrival=0.0)
    sequence.block_ids = block_ids
    return ScheduledSequence(sequence, start, count, samples=start + count == num_tokens)


def test_shares_follow_each_other_and_padding_comes_last() -> None:
    builder = BatchBuilder(block_size=8, row_multiple=4, device=torch.device("cpu"))
    told: list[int] = []
    plan = StepPlan(
        (
            make_share(12, [5, 2, 9], start=6, count=4),  # does not reach its last token
            make_share(9, [1, 7], start=8, count=1),
        )
    )
    batch = builder.build(builder.arrays(plan, {}), PREVIOUS, lambda layer, event: told.append(layer))
    assert batch.token_ids.tolist() == [106, 107, 108, 109, 108, 0, 0, 0]
    assert batch.positions.tolist() == [6, 7, 8, 9, 8, 0, 0, 0]
    assert batch.sources.tolist() == [-1] * 8
    assert batch.slot_ids.tolist() == [46, 47, 16, 17, 56, -1, -1, -1]
    assert batch.shape.query_starts.tolist() == [0, 4, 5]
    assert batch.shape.context_lens.tolist() == [10, 9]
    assert batch.shape.block_ids.tolist() == [5, 2, 1, 7]
    assert batch.shape.blocks_of(1).tolist() == [1, 7]
    assert (batch.shape.num_seqs, batch.shape.num_tokens, batch.shape.num_decode) == (2, 5, 0)
    assert batch.sample_indices.tolist() == [4, 4, 4, 4]
    assert batch.on_layer is not None
    batch.on_layer(3, None)
    assert told == [3]


def test_nothing_is_padded_where_rows_may_be_any_number() -> None:
    builder = BatchBuilder(block_size=8, row_multiple=1, device=torch.device("cpu"))
    batch = builder.build(builder.arrays(StepPlan((make_share(12, [5, 2], start=0, count=3),)), {}), PREVIOUS)
    assert batch.token_ids.tolist() == [100, 101, 102]
    assert batch.sample_indices.tolist() == []


def test_a_token_that_is_pending_is_found_where_the_step_before_put_it() -> None:
    builder = BatchBuilder(block_size=8, row_multiple=1, device=torch.device("cpu"))
    known, pending = make_share(4, [3], start=3, count=1), make_share(6, [4], start=2, count=4)
    pending.sequence.token_ids[5] = PENDING
    plan = StepPlan((known, pending))
    arrays = builder.arrays(plan, {pending.sequence: 3, known.sequence: 0})
    assert arrays.sources.tolist() == [-1, -1, -1, -1, 3]
    assert arrays.token_ids.tolist() == [103, 102, 103, 104, 0]
    with pytest.raises(IntegrityError, match="no step has chosen token 5"):
        builder.arrays(plan, {})


def test_sequences_of_one_token_are_counted_up_to_the_first_longer_one() -> None:
    builder = BatchBuilder(block_size=8, row_multiple=1, device=torch.device("cpu"))
    one, more = make_share(4, [3], start=3, count=1), make_share(6, [4], start=4, count=2)
    for shares, count in (((one, one, more, one), 2), ((one, one), 2), ((more,), 0)):
        assert builder.arrays(StepPlan(shares), {}).shape.num_decode == count
