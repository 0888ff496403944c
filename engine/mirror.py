"""A worker's steps as messages: rank 0 tells what is new, and the other ranks mirror its sequences.

    unknown --first share--> MIRRORED --finished at rank 0, and in no step any more--> forgotten

A mirrored sequence holds what a model runner reads: the request, its token ids (a PENDING one is overwritten by a
later share, once rank 0 has read it) and its blocks. Statuses, hashes and counters stay with rank 0's scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.batch import ScheduledSequence, StepPlan
from engine.errors import IntegrityError
from engine.sequence import PENDING, Sequence, SequenceStatus
from engine.wire import request_from_wire, request_to_wire
from protos import ranks_pb2 as pb


@dataclass(slots=True)
class _Told:
    """What the other ranks know of a sequence."""

    sequence_id: int
    num_tokens: int
    """Token ids they know, from the first one on."""
    block_ids: list[int] = field(default_factory=list)


class StepTeller:
    """Rank 0's side."""

    def __init__(self) -> None:
        self._told: dict[Sequence, _Told] = {}
        self._next_id = 1

    def tell(self, plan: StepPlan, note: bytes = b"") -> pb.RankStep:
        """A step as a message; each must be sent, in order."""
        present = {share.sequence for share in plan.shares}
        ended = [
            sequence
            for sequence in self._told
            if sequence.status is SequenceStatus.FINISHED and sequence not in present
        ]
        return pb.RankStep(
            forgotten=[self._told.pop(sequence).sequence_id for sequence in ended],
            shares=[self._tell(share) for share in plan.shares],
            note=note,
        )

    def num_mirrored(self) -> int:
        """Sequences that the other ranks hold."""
        return len(self._told)

    def _tell(self, share: ScheduledSequence) -> pb.RankShare:
        sequence = share.sequence
        message = pb.RankShare(start=share.start, num_tokens=share.num_tokens, samples=share.samples, life=share.life)
        told = self._told.get(sequence)
        if told is None:
            request = sequence.request
            told = _Told(self._next_id, len(request.prompt_token_ids) + len(request.resume_from))
            self._told[sequence] = told
            self._next_id += 1
            message.request.CopyFrom(request_to_wire(request))
        message.sequence_id = told.sequence_id
        new = sequence.token_ids[told.num_tokens : share.stop]
        message.first_token = told.num_tokens
        message.token_ids.extend(new)
        told.num_tokens += new.index(PENDING) if PENDING in new else len(new)
        blocks, known = sequence.block_ids, told.block_ids
        if blocks != known:
            kept = len(known) if blocks[: len(known)] == known else 0
            message.first_block = kept
            message.block_ids.extend(blocks[kept:])
            told.block_ids = list(blocks)
        return message


class StepMirror:
    """The side of another rank."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}

    def plan(self, step: pb.RankStep) -> StepPlan:
        """The step that rank 0 computes; IntegrityError for one that does not follow from those before."""
        for sequence_id in step.forgotten:
            self._sequences.pop(sequence_id, None)
        return StepPlan(tuple(self._share(share) for share in step.shares))

    def num_mirrored(self) -> int:
        """Sequences held here."""
        return len(self._sequences)

    def _share(self, share: pb.RankShare) -> ScheduledSequence:
        if share.HasField("request"):
            self._sequences[share.sequence_id] = Sequence.from_request(request_from_wire(share.request), arrival=0.0)
        sequence = self._sequences.get(share.sequence_id)
        if sequence is None:
            raise IntegrityError(f"rank 0 computes sequence {share.sequence_id}, of which this rank was told nothing")
        if share.token_ids:
            sequence.token_ids[share.first_token :] = share.token_ids
        if share.block_ids:
            sequence.block_ids[share.first_block :] = share.block_ids
        return ScheduledSequence(sequence, share.start, share.num_tokens, share.samples, share.life)
