"""Decides what each step computes: continuous batching with chunked prefill and preemption.

    WAITING --admit: blocks for all known tokens--> RUNNING --last token--> FINISHED
       ^------------------preempt: all blocks back------'   (or, given back to who brought it, FINISHED)

Every sequence is the same chase of `num_computed_tokens` after `num_tokens`; whoever is one token
behind is decoding, whoever is further behind is catching up, in chunks that fit the step's budget.
Sequences that decode, and those whose KV was received and that are about to, come first, so that a long
prompt never holds them up for more than one chunk; how long a chunk may be is `step_budget`'s affair. A prompt that
lacks just what is being computed for another one begins a step later, and finds it.

Progress: a sequence is admitted only when all its known tokens have blocks, `max_model_len` fits
the whole pool, and a sequence takes blocks only from those behind it in order (running, or waiting
with KV that was received). Where those that run wait for each other's blocks, the last in order gives
its own back. So the first in order always runs to its end.

Running ahead: `schedule` may be called again before the step it gave out last is done. It counts that step as done,
with a PENDING token where one is sampled; `update` puts the real token there, in order of the steps. A sequence whose
end only the real token can tell (end of sequence, a stop token) is then computed one step too far, and that is dropped.

The engine loop's thread calls everything here.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable

from engine.api import EngineStats, FinishReason, TokenLogprobs, TokenOutput
from engine.batch import ScheduledSequence, StepPlan, StepResult
from engine.block_hash import block_hashes
from engine.block_pool import BlockPool
from engine.sequence import PENDING, Sequence, SequenceStatus
from engine.step_budget import StepLimits, StepShares

MAX_PREEMPTIONS = 3
"""After this many a sequence is protected."""
MAX_PUT_OFF = 16
"""Most sequences of a step that are looked at and wait for what others compute; those after them compute it too."""

Emitted = tuple[Sequence, TokenOutput]


class Scheduler:
    """First come, first served within a priority; see the module's docstring."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        root_hash: bytes,
        limits: StepLimits,
        max_running: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self._root_hash = root_hash
        self._limits = limits
        self._max_running = max_running
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self.is_held: Callable[[Sequence], bool] = lambda sequence: False
        """Whether a prefill-only sequence must not be computed further for now; whoever holds it wakes the loop."""
        self.give_back: Callable[[Sequence], bool] = lambda sequence: False
        """Whether a sequence that has just lost its blocks goes back to who brought it; then it has ended here."""
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._stats = EngineStats(num_blocks=pool.num_blocks)

    # ---- called by those who bring and take sequences ----

    def set_prompt_share(self, share: float) -> None:
        """From now on prompts get at most this part of a step that also generates."""
        self._limits = self._limits.with_prompt_share(share)

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence: without blocks, or with blocks that hold its computed tokens."""
        sequence.status = SequenceStatus.WAITING
        bisect.insort(self._waiting, sequence, key=_order)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now; its blocks go back (those of a prefill-only one at `release`)."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        self._leave(sequence)
        self._finish(sequence, FinishReason.ABORTED)

    def release(self, sequence: Sequence) -> None:
        """Give back all blocks of a sequence that the scheduler no longer runs."""
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []

    def take_prefix(self, sequence: Sequence) -> None:
        """Hold the blocks whose content the sequence can use, and count their tokens as computed.

        At least one token is always left to compute, so that there are logits to sample from.
        """
        self._extend_hashes(sequence)
        usable = (sequence.num_tokens - 1) // self.block_size
        found = self.pool.find(sequence.block_hashes[:usable])
        self.pool.acquire(found)
        sequence.block_ids = found
        sequence.num_hashed_blocks = len(found)
        sequence.num_computed_tokens = sequence.num_cached_tokens = len(found) * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def publish(self, sequence: Sequence, num_computed_tokens: int | None = None) -> None:
        """Make the sequence's full blocks findable, up to the tokens that are computed (default: all it counts)."""
        computed = sequence.num_computed_tokens if num_computed_tokens is None else num_computed_tokens
        full = computed // self.block_size
        if full > sequence.num_hashed_blocks:
            self._extend_hashes(sequence)
            for index in range(sequence.num_hashed_blocks, full):
                self.pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
            sequence.num_hashed_blocks = full

    # ---- the three verbs of the loop: schedule, (run), update ----

    def schedule(self) -> StepPlan | None:
        """What to compute next; None if nothing can be computed now."""
        shares = self._share_out()
        while not shares and self._make_way():
            shares = self._share_out()
        for share in shares:
            _count_as_done(share)
        return StepPlan(tuple(shares)) if shares else None

    def update(self, plan: StepPlan, result: StepResult) -> list[Emitted]:
        """Take in the outcome of the oldest step under way; sequences that ended meanwhile are passed over."""
        emitted: list[Emitted] = []
        self._stats.steps += 1
        for share, sampled in zip(plan.shares, result.sampled, strict=True):
            sequence = share.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            self._stats.computed_tokens += share.num_tokens
            if sampled is not None:
                sequence.token_ids[share.stop] = sampled.token_id
                sequence.num_pending -= 1
            if share.life == sequence.num_preemptions:  # else its blocks are gone
                self.publish(sequence, share.stop)
            if sampled is not None:
                emitted.append((sequence, self._emit(share, sampled.token_id, sampled.logprobs)))
        return emitted

    def fail_all(self, reason: str) -> list[Emitted]:
        """End every sequence because the step that held them failed; no content of before is given out again."""
        emitted = []
        for sequence in self.sequences():
            self._leave(sequence)
            self._finish(sequence, FinishReason.FAILED)
            emitted.append((sequence, _end_output(sequence, reason)))
        self.pool.forget_all()
        return emitted

    def stats(self) -> EngineStats:
        """Counters and gauges as of now."""
        self._stats.num_running = len(self._running)
        self._stats.num_waiting = len(self._waiting)
        self._stats.waiting_tokens = sum(
            sequence.num_missing_tokens for sequence in self.sequences() if sequence.num_missing_tokens > 1
        )
        self._stats.free_blocks = self.pool.num_free
        self._stats.findable_blocks = self.pool.num_findable
        return self._stats

    def sequences(self) -> list[Sequence]:
        """Everything that waits or runs."""
        return [*self._running, *self._waiting]

    # ---- inside ----

    def _share_out(self) -> list[ScheduledSequence]:
        """Who computes how much of the next step, within its budget."""
        shares = StepShares(self._limits)
        running = sorted(self._running, key=lambda item: (item.num_missing_tokens > 1, *_order(item)))
        num_generating = sum(item.num_missing_tokens <= 1 for item in running)
        received = [item for item in self._waiting if item.num_missing_tokens == 1 and item.block_ids]
        self._share_among(running[:num_generating], shares)
        self._share_with_new(received, shares)
        self._share_among(running[num_generating:], shares)
        self._share_with_new(list(self._waiting), shares)
        return shares.shares()

    def _share_among(self, running: Iterable[Sequence], shares: StepShares) -> None:
        """Give sequences that run their part."""
        for sequence in running:
            if shares.is_full:
                break
            if sequence.status is not SequenceStatus.RUNNING or self._awaits_its_last(sequence):
                continue  # preempted a moment ago, or nothing is left but to read a token
            if sequence.prefill_only and self.is_held(sequence):
                continue
            count = shares.room_for(sequence)
            if count and self._ensure_blocks(sequence, count, shares):
                shares.add(sequence, count)

    def _share_with_new(self, waiting: Iterable[Sequence], shares: StepShares) -> None:
        """Let sequences begin to run, in order, as far as there is room in the step and among blocks and places."""
        num_put_off = 0
        for sequence in waiting:
            if shares.is_full or len(self._running) >= self._max_running:
                break
            if not shares.room_for(sequence):
                continue  # prompts have had their part of this step, but what was received may join
            if num_put_off < MAX_PUT_OFF and self._is_being_computed(sequence, shares):
                num_put_off += 1
                continue
            if self._awaits_its_last(sequence) or not self._admit(sequence):
                break
            shares.add(sequence, shares.room_for(sequence))

    def _is_being_computed(self, sequence: Sequence, shares: StepShares) -> bool:
        """Whether the first block that it lacks is computed by this step, or one under way, for another sequence.

        It can be found as soon as that is done: many prompts that begin alike and come at once compute that once.
        """
        if sequence.block_ids or not self.pool.prefix_caching:
            return False
        others = [item for item in self._running if item.num_hashed_blocks < len(item.block_hashes)]
        if not others:
            return False
        self._extend_hashes(sequence)
        usable = (sequence.num_tokens - 1) // self.block_size
        index = len(self.pool.find(sequence.block_hashes[:usable]))
        if index == usable:
            return False
        wanted, end = sequence.block_hashes[index], (index + 1) * self.block_size
        return any(
            other.num_hashed_blocks <= index < len(other.block_hashes)
            and other.block_hashes[index] == wanted
            and end <= shares.end_of(other)
            for other in others
        )

    def _make_way(self) -> bool:
        """Preempt the last that holds blocks where those that run wait for each other's; False if that is not so.

        It happens when KV that was received waits, older than what runs, behind one that finds no blocks at all. A
        prefill-only sequence that runs has all its blocks: it is held, and will go on without anybody's.
        """
        if not self._running or any(sequence.num_pending for sequence in self.sequences()):
            return False
        if any(sequence.prefill_only for sequence in self._running):
            return False
        victim = self._victim(min(self.sequences(), key=_order))
        if victim is None:
            return False
        self._preempt(victim)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to running if all its known tokens can have blocks."""
        if not sequence.block_ids:
            self.take_prefix(sequence)
        missing = self.num_blocks_for(sequence.num_tokens) - len(sequence.block_ids)
        while missing > self.pool.num_free:
            victim = None if self._running else self._victim(sequence)
            if victim is None:
                if sequence.num_computed_tokens == sequence.num_cached_tokens:
                    self._give_up_blocks(sequence)
                return False
            self._preempt(victim)
        sequence.block_ids += self.pool.allocate(max(0, missing))
        self._stats.cached_tokens += sequence.num_cached_tokens
        self._waiting.remove(sequence)
        bisect.insort(self._running, sequence, key=_order)
        sequence.status = SequenceStatus.RUNNING
        sequence.first_step_at = sequence.first_step_at or time.monotonic()
        return True

    def _ensure_blocks(self, sequence: Sequence, count: int, shares: StepShares) -> bool:
        """Give the sequence blocks for its next tokens, preempting younger ones if there are none."""
        missing = self.num_blocks_for(sequence.num_computed_tokens + count) - len(sequence.block_ids)
        while missing > self.pool.num_free:
            victim = self._victim(sequence)
            if victim is None:
                return False
            shares.drop(victim)
            self._preempt(victim)
        if missing > 0:
            sequence.block_ids += self.pool.allocate(missing)
        return True

    def _victim(self, needy: Sequence) -> Sequence | None:
        """The last in order of all that hold blocks behind `needy`, unprotected ones first."""
        holders = [*self._running, *(item for item in self._waiting if item.block_ids)]
        behind = [item for item in holders if _order(item) > _order(needy) and not item.prefill_only]
        open_ones = [item for item in behind if item.num_preemptions < MAX_PREEMPTIONS]
        return max(open_ones or behind, key=_order, default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._give_up_blocks(sequence)
        sequence.num_preemptions += 1
        self._stats.preemptions += 1
        if self.give_back(sequence):
            self._finish(sequence, FinishReason.PREEMPTED)
        else:
            self.add(sequence)

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self.release(sequence)
        sequence.num_computed_tokens = sequence.num_cached_tokens = sequence.num_hashed_blocks = 0

    def _emit(self, share: ScheduledSequence, token_id: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """Tell of a sampled token; end the sequence if it was its last."""
        sequence = share.sequence
        offset = share.stop - sequence.num_prompt_tokens
        self._stats.generated_tokens += 1
        finish = self._finish_reason(sequence, token_id, offset + 1)
        if finish is not None or sequence.prefill_only:
            self._leave(sequence)
            self._finish(sequence, finish)
        return TokenOutput(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            offset=offset,
            token_ids=(token_id,),
            logprobs=(logprobs,) if logprobs is not None else (),
            finish_reason=finish,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int, num_generated: int) -> FinishReason | None:
        """How the sequence ends with this token, its num_generated-th; None: it goes on."""
        params = sequence.request.params
        if num_generated >= params.min_tokens:
            if token_id in params.stop_token_ids:
                return FinishReason.STOP
            if token_id in self._eos_token_ids and not params.ignore_eos:
                return FinishReason.EOS
        return FinishReason.LENGTH if self._is_full(sequence, num_generated) else None

    def _is_full(self, sequence: Sequence, num_generated: int) -> bool:
        """Whether so many generated tokens are all the sequence can have."""
        num_tokens = sequence.num_prompt_tokens + num_generated
        return num_generated >= sequence.request.params.max_tokens or num_tokens >= self._max_model_len

    def _awaits_its_last(self, sequence: Sequence) -> bool:
        """Whether a step under way samples the sequence's last token, whatever it is."""
        if sequence.num_pending == 0:
            return False
        return sequence.prefill_only or self._is_full(sequence, sequence.num_generated_tokens)

    def _leave(self, sequence: Sequence) -> None:
        (self._running if sequence.status is SequenceStatus.RUNNING else self._waiting).remove(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        del sequence.token_ids[sequence.num_known_tokens :]
        sequence.num_pending = 0
        if not sequence.prefill_only:
            self.release(sequence)

    def _extend_hashes(self, sequence: Sequence) -> None:
        """Chain the hashes of all full blocks of known tokens."""
        size, hashes = self.block_size, sequence.block_hashes
        start, stop = len(hashes) * size, sequence.num_known_tokens // size * size
        if stop > start:
            parent = hashes[-1] if hashes else self._root_hash
            hashes += block_hashes(sequence.token_ids[start:stop], size, parent)


def _order(sequence: Sequence) -> tuple[int, float, str, int]:
    """Lower goes first: priority, then age since first arrival. No two are alike, or each could wait for the other."""
    request = sequence.request
    return (request.priority, sequence.arrival, request.request_id, request.attempt)


def _count_as_done(share: ScheduledSequence) -> None:
    """The share is on its way: its tokens count as computed, and the one it samples as there."""
    sequence = share.sequence
    sequence.num_computed_tokens = share.stop
    if share.samples:
        sequence.token_ids.append(PENDING)
        sequence.num_pending += 1


def _end_output(sequence: Sequence, reason: str) -> TokenOutput:
    """An output that carries no token, only the end."""
    return TokenOutput(
        request_id=sequence.request.request_id,
        attempt=sequence.request.attempt,
        offset=sequence.num_generated_tokens,
        token_ids=(),
        finish_reason=sequence.finish_reason,
        reason=reason,
    )
