from __future__ import annotations

import torch

from engine.api import GenerateRequest, SamplingParams
from engine.batch import ScheduledSequence, StepPlan
from engine.batch_builder import BatchBuilder
from engine.sequence import Sequence


def make_share(num_tokens: int, block_ids: list[int], start: int, count: int) -> ScheduledSequence:
    request = GenerateRequest(
        request_id="r", prompt_token_ids=tuple(range(100, 100 + num_tokens)), params=SamplingParams()
    )
    sequence = Sequence.from_request(request, arrival=0.0)
    sequence.block_ids = block_ids
    return ScheduledSequence(sequence, start, count)


def test_shares_follow_each_other_and_padding_comes_last() -> None:
    builder = BatchBuilder(block_size=8, row_multiple=4, device=torch.device("cpu"))
    told: list[int] = []
    batch = builder.build(
        StepPlan(
            (
                make_share(12, [5, 2], start=6, count=4),  # does not reach its last token
                make_share(9, [1, 7], start=8, count=1),
            )
        ),
        on_layer=lambda layer, event: told.append(layer),
    )
    assert batch.token_ids.tolist() == [106, 107, 108, 109, 108, 0, 0, 0]
    assert batch.positions.tolist() == [6, 7, 8, 9, 8, 0, 0, 0]
    assert batch.slot_ids.tolist() == [46, 47, 16, 17, 56]
    assert batch.query_starts == [0, 4, 5]
    assert batch.context_lens == [10, 9]
    assert batch.block_ids == [[5, 2], [1, 7]]
    assert batch.sample_indices.tolist() == [4, 4, 4, 4]
    assert batch.on_layer is not None
    batch.on_layer(3, None)
    assert told == [3]


def test_nothing_is_padded_where_rows_may_be_any_number() -> None:
    builder = BatchBuilder(block_size=8, row_multiple=1, device=torch.device("cpu"))
    batch = builder.build(StepPlan((make_share(12, [5, 2], start=0, count=3),)))
    assert batch.token_ids.tolist() == [100, 101, 102]
    assert batch.sample_indices.tolist() == []
