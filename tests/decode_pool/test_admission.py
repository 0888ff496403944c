import pytest

from decode_pool.admission import Room, check_room, growth_blocks
from decode_pool.answer_lengths import AnswerLengths
from engine.errors import CapacityError
from engine.sequence import Sequence
from tests.engine.toy import make_request


def room(free_blocks: int, *, num_admitted: int = 1, predicted: int = 0, margin: float = 1.0) -> Room:
    return Room(
        free_blocks=free_blocks,
        block_size=4,
        num_admitted=num_admitted,
        max_admitted=8,
        expected_answer=AnswerLengths(predicted).expected,
        answer_margin=margin,
    )


def sequence(num_tokens: int, num_blocks: int, **params) -> Sequence:
    made = Sequence.from_request(make_request("a", [1] * num_tokens, **params), 0.0)
    made.block_ids = list(range(num_blocks))
    return made


def test_growth_is_what_the_answer_needs_beyond_the_blocks_held():
    assert growth_blocks(room(8, predicted=10), sequence(6, 2, max_tokens=100), 2) == 2
    assert growth_blocks(room(8, predicted=10), sequence(6, 2, max_tokens=2), 2) == 0


def test_what_is_expected_of_the_rest_counts_with_a_margin():
    running = sequence(6, 2, max_tokens=100)
    running.token_ids += [1] * 2
    assert growth_blocks(room(8, predicted=10), running, 2) == 2
    assert growth_blocks(room(8, predicted=10, margin=2.0), running, 2) == 4
    assert growth_blocks(room(8, predicted=10, margin=0.0), running, 2) == 0
    assert growth_blocks(room(8, predicted=10, margin=50.0), running, 2) == 25


def test_a_preempted_sequence_keeps_its_claim_to_the_blocks_it_gave_back():
    candidate = sequence(7, 0, max_tokens=1)
    check_room(room(6), candidate, 2, [sequence(16, 4, max_tokens=1)])
    with pytest.raises(CapacityError, match="2 KV blocks needed, 5 are free and 4 of them promised"):
        check_room(room(5), candidate, 2, [sequence(16, 0, max_tokens=1)])


def test_an_empty_worker_takes_whatever_fits():
    check_room(room(4, num_admitted=0, predicted=100), sequence(14, 0, max_tokens=100), 4, [])
    with pytest.raises(CapacityError, match="8 requests are running here, the limit is 8"):
        check_room(room(4, num_admitted=8), sequence(1, 0), 1, [])
