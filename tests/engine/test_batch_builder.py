from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.api import GenerateRequest, SamplingParams
from engine.batch import LayerHook, ScheduledSequence, StepPlan
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
    batch = builder.build(builder.arrays(plan, {}), PREVIOUS, LayerHook(lambda layer, event: told.append(layer)))
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
    assert batch.hook is not None
    listener = batch.hook.listener(3)
    assert listener is not None
    listener(3, None)
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


@given(
    shares=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=6),
    block_size=st.sampled_from([8, 16, 64]),
    row_multiple=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
def test_each_row_is_the_token_its_place_and_its_slot_belong_to(
    shares: list[tuple[int, int, int]], block_size: int, row_multiple: int, seed: int
) -> None:
    """shares are (start, tokens of the share, tokens behind it) of each sequence."""
    deck = random.Random(seed).sample(range(1000), 1000)
    plan = StepPlan(
        tuple(
            make_share(start + count + behind, [deck.pop() for _ in range(10 + 80 // block_size)], start, count)
            for start, count, behind in shares
        )
    )
    builder = BatchBuilder(block_size=block_size, row_multiple=row_multiple, device=torch.device("cpu"))
    batch = builder.build(builder.arrays(plan, {}), PREVIOUS)
    rows, samples = [], []
    for share in plan.shares:
        for place in range(share.start, share.stop):
            slot = share.sequence.block_ids[place // block_size] * block_size + place % block_size
            rows.append((100 + place, -1, place, slot))
        samples += [len(rows) - 1] if share.samples else []
    num_rows = -(-len(rows) // row_multiple) * row_multiple
    found = zip(*(x.tolist() for x in (batch.token_ids, batch.sources, batch.positions, batch.slot_ids)), strict=True)
    assert list(found) == rows + [(0, -1, 0, -1)] * (num_rows - len(rows))
    assert batch.sample_indices.tolist() == samples + samples[-1:] * (-len(samples) % row_multiple)
    assert batch.every_row_samples == (samples == list(range(len(rows))))
    assert batch.shape.num_tokens == len(rows)
    for index, share in enumerate(plan.shares):
        used = -(-share.stop // block_size)
        assert batch.shape.blocks_of(index).tolist() == share.sequence.block_ids[:used]


@pytest.mark.parametrize("known", [False, True])
def test_a_token_that_is_pending_behind_a_share_is_not_its_concern(known: bool) -> None:
    builder = BatchBuilder(block_size=8, row_multiple=1, device=torch.device("cpu"))
    share = make_share(6, [4], start=2, count=3)
    share.sequence.token_ids[5] = PENDING
    arrays = builder.arrays(StepPlan((share,)), {share.sequence: 0} if known else {})
    assert arrays.sources.tolist() == [-1, -1, -1]
    assert arrays.token_ids.tolist() == [102, 103, 104]
    assert arrays.sample_indices.tolist() == []


@pytest.mark.parametrize(
    ("start", "count", "blocks", "message"),
    [
        (4, 3, 1, "tokens 4 to 7 of request r cannot be computed: it has 6"),
        (2, 0, 1, "tokens 2 to 2 of request r cannot be computed"),
        (-1, 2, 1, "tokens -1 to 1 of request r cannot be computed"),
        (4, 2, 0, "request r has 0 blocks of 8, too few for its first 6 tokens"),
    ],
)
def test_a_share_that_cannot_be_is_a_defect(start: int, count: int, blocks: int, message: str) -> None:
    builder = BatchBuilder(block_size=8, row_multiple=1, device=torch.device("cpu"))
    share = make_share(6, list(range(blocks)), start, count)
    with pytest.raises(IntegrityError, match=message):
        builder.arrays(StepPlan((share,)), {})
