"""Named moments of one request, from which its waterfall and the router's statistics derive."""

from __future__ import annotations

import enum
import time

from protos import inference_pb2, worker_pb2


class Moment(enum.Enum):
    """What happened; each is marked once, at its first occurrence."""

    ARRIVED = "arrived"
    ACCEPTED = "accepted"
    """Validated and cut into tokens."""
    RESERVED = "reserved"
    """A decode worker promised blocks."""
    FIRST_TOKEN = "first_token"
    """The first token reached the router."""
    FIRST_SENT = "first_sent"
    """The first token left the router."""
    SECOND_TOKEN = "second_token"
    LAST_TOKEN = "last_token"
    """The latest token so far."""
    ENDED = "ended"

    __hash__ = object.__hash__
    """There is one object of each; every token looks some of them up."""


class Timeline:
    """Seconds of a monotonic clock at each moment, and what the workers said of their share."""

    def __init__(self) -> None:
        self._at = {Moment.ARRIVED: time.monotonic()}
        self._queue_s = 0.0
        self._prefill_s = 0.0
        self._decode = worker_pb2.DecodeTiming()

    def mark(self, moment: Moment) -> None:
        """Note a moment, unless it was noted before."""
        self._at.setdefault(moment, time.monotonic())

    def tokens(self, num_before: int, num_new: int) -> float:
        """Note the arrival of tokens; gives the seconds since the tokens before them (0 for the first)."""
        now, at = time.monotonic(), self._at
        since = now - at.get(Moment.LAST_TOKEN, now)
        if num_before < 2:
            if num_before == 0:
                at.setdefault(Moment.FIRST_TOKEN, now)
            if num_before + num_new >= 2:
                at.setdefault(Moment.SECOND_TOKEN, now)
        at[Moment.LAST_TOKEN] = now
        return since

    def prefilled(self, prefill_s: float) -> None:
        """The prefill worker's account, of the first attempt that came so far."""
        if not self._prefill_s:
            self._prefill_s = prefill_s

    def decoded(self, timing: worker_pb2.DecodeTiming) -> None:
        """The decode worker's account of its first output."""
        if not self._decode.ByteSize():
            self._decode.CopyFrom(timing)
            self.prefilled(timing.prefill_s)

    def age_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._at[Moment.ARRIVED]

    def between(self, start: Moment, end: Moment) -> float | None:
        """Seconds from one moment to another; None if either never came."""
        if start not in self._at or end not in self._at:
            return None
        return max(0.0, self._at[end] - self._at[start])

    def transfer_s(self) -> float:
        """First token to the last KV piece home: what prefill did not hide of the transfer."""
        return min(self._decode.transfer_tail_s, self.between(Moment.FIRST_TOKEN, Moment.SECOND_TOKEN) or 0.0)

    def timing(self) -> inference_pb2.Timing:
        """The waterfall for the client."""
        to_first = self.between(Moment.ARRIVED, Moment.FIRST_TOKEN)
        gap = self.between(Moment.FIRST_TOKEN, Moment.SECOND_TOKEN) or 0.0
        tail_s = self.transfer_s()
        return inference_pb2.Timing(
            queue_s=max(0.0, (to_first or 0.0) - self._prefill_s),
            prefill_s=self._prefill_s,
            transfer_s=tail_s,
            first_decode_step_s=gap - tail_s,
            decode_s=self.between(Moment.SECOND_TOKEN, Moment.LAST_TOKEN) or 0.0,
            total_s=self.between(Moment.ARRIVED, Moment.ENDED) or 0.0,
            ttft_s=self.between(Moment.ARRIVED, Moment.FIRST_SENT) or 0.0,
            transfer_busy_s=self._decode.transfer_busy_s,
            transfer_bytes=self._decode.transfer_bytes,
        )
