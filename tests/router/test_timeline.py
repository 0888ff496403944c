"""The waterfall."""

from __future__ import annotations

from protos import worker_pb2
from router.timeline import Moment, Timeline


def test_waterfall_adds_up() -> None:
    timeline = Timeline()
    timeline.mark(Moment.ACCEPTED)
    assert timeline.tokens(0, 1) == 0.0
    timeline.prefilled(0.0)
    timeline.decoded(worker_pb2.DecodeTiming(transfer_tail_s=5.0, transfer_bytes=7))
    timeline.decoded(worker_pb2.DecodeTiming(transfer_tail_s=9.0, transfer_bytes=9))
    assert timeline.tokens(1, 1) >= 0.0
    timeline.tokens(2, 1)
    timeline.mark(Moment.FIRST_SENT)
    timeline.mark(Moment.ENDED)
    timing = timeline.timing()
    assert timing.transfer_bytes == 7
    assert timing.transfer_s <= timing.total_s
    parts = timing.queue_s + timing.prefill_s + timing.transfer_s + timing.first_decode_step_s + timing.decode_s
    assert parts <= timing.total_s + 1e-9
    assert Timeline().timing().ttft_s == 0.0
