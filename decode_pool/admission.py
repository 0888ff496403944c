"""May a decode worker promise blocks for one more request? Pure arithmetic over blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.errors import CapacityError
from engine.sequence import Sequence

MAX_ANSWER_TOKENS = 1_000_000
"""More than any answer has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What a worker has when a request knocks."""

    free_blocks: int
    """Blocks nobody holds."""
    block_size: int
    num_admitted: int
    """Sequences admitted and not yet ended."""
    max_admitted: int
    expected_answer: Callable[[int, int], float]
    """What an answer of so many tokens is expected to have in the end, if it may have so many."""
    answer_margin: float = 1.0
    """So many times the growth that is expected is kept in hand."""


def check_room(room: Room, candidate: Sequence, num_new_blocks: int, admitted: Iterable[Sequence]) -> None:
    """Raise CapacityError unless the candidate and everyone's predicted growth fit.

    `num_new_blocks` are the free blocks that the candidate's known tokens would use up. A request
    that comes to an empty worker is always admitted: it fits the pool by `max_model_len`.
    """
    if room.num_admitted >= room.max_admitted:
        raise CapacityError(f"{room.num_admitted} requests are running here, the limit is {room.max_admitted}")
    if room.num_admitted == 0 and num_new_blocks <= room.free_blocks:
        return
    growth = promised_blocks(room, admitted)
    needed = num_new_blocks + growth_blocks(room, candidate, len(candidate.block_ids) + num_new_blocks)
    if needed > room.free_blocks - growth:
        raise CapacityError(
            f"{needed} KV blocks needed, {room.free_blocks} are free and {growth} of them promised to running requests"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomLeft:
    """What a worker could still promise."""

    places: int = 0
    """Requests."""
    blocks: int = 0
    expected_answer_tokens: int = 0
    """What a new answer is taken to grow to."""


def left_in(room: Room, admitted: Iterable[Sequence]) -> RoomLeft:
    """What could still be promised, beside those who were admitted."""
    return RoomLeft(
        places=max(0, room.max_admitted - room.num_admitted),
        blocks=max(0, room.free_blocks - promised_blocks(room, admitted)),
        expected_answer_tokens=math.ceil(room.expected_answer(0, MAX_ANSWER_TOKENS) * room.answer_margin),
    )


def promised_blocks(room: Room, admitted: Iterable[Sequence]) -> int:
    """Blocks that those who were admitted are still expected to take."""
    return sum(growth_blocks(room, sequence, len(sequence.block_ids)) for sequence in admitted)


def growth_blocks(room: Room, sequence: Sequence, num_held_blocks: int) -> int:
    """Blocks a sequence is still expected to take beyond those it holds; a preempted one needs them all again."""
    had, limit = sequence.num_generated_tokens, sequence.request.params.max_tokens
    grows_by = max(0.0, room.expected_answer(had, limit) - had) * room.answer_margin
    final = sequence.num_prompt_tokens + min(max(had, limit), had + math.ceil(grows_by))
    return max(0, -(-final // room.block_size) - num_held_blocks)
