"""The parts without a network: configuration, errors, inbox, wake-ups, background, timeline, text."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc
import pytest

from engine.config import ModelOptions
from protos import inference_pb2, worker_pb2
from router.background import Background
from router.config import RouterConfig
from router.errors import MAX_DETAIL_CHARS, InvalidArgumentError, RouterError
from router.inbox import Inbox
from router.job import Chunk, Ending
from router.model import ServedModel
from router.output import OutputStream
from router.stats import Histogram
from router.timeline import Moment, Timeline
from router.wakeup import Signal
from tests.router.harness import run


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"port": 70000}, "port must be between"),
        ({"policy": "fastest"}, "round_robin or least_loaded"),
        ({"tls_cert": "c"}, "together"),
        ({"max_attempts": 0}, "max_attempts must be at least 1"),
        ({"max_queued": -1}, "max_queued must be at least 0"),
        ({"reserve_timeout_s": 0.0}, "reserve_timeout_s must be more than 0"),
        ({"default_deadline_s": float("nan")}, "default_deadline_s must be more than 0"),
        ({"heartbeat_s": 3.0}, "heartbeat_s"),
    ],
)
def test_config_refuses(setting: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RouterConfig(**setting)  # type: ignore[arg-type]


def test_long_messages_fit_into_a_header() -> None:
    error = InvalidArgumentError("x" * 100_000, field="text")
    assert len(error.message) == MAX_DETAIL_CHARS
    assert sum(len(value) for _, value in error.trailing_metadata()) < 4096
    assert RouterError("plain").trailing_metadata() == ()
    assert RouterError.code is grpc.StatusCode.INTERNAL


def test_inbox_gives_everything_at_once_and_drops_other_attempts() -> None:
    async def scenario() -> None:
        overflows: list[bool] = []
        inbox = Inbox("r", 1, 3, lambda: overflows.append(True))
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        old = worker_pb2.TokenOutput(attempt=0, token_ids=[9])
        new = [worker_pb2.TokenOutput(attempt=1, offset=index, token_ids=[index]) for index in range(3)]
        for output in [old, *new]:
            inbox.put_output(output)
        assert await taking == new
        assert not overflows
        for index in range(4):
            inbox.put_output(worker_pb2.TokenOutput(attempt=1, offset=index, token_ids=[index]))
        assert overflows == [True]

    run(scenario())


def test_signal_misses_nothing() -> None:
    async def scenario() -> None:
        signal = Signal()
        seen = signal.version
        signal.notify()
        assert await signal.wait(seen, timeout_s=0.01)
        assert not await signal.wait(signal.version, timeout_s=0.01)
        asyncio.get_running_loop().call_soon(signal.notify)
        assert await signal.wait(signal.version, timeout_s=1.0)

    run(scenario())


def test_background_logs_failures_and_settles(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        background = Background()

        async def fail() -> None:
            raise RuntimeError("told to")

        background.spawn(fail(), "a failing task")
        stuck = background.spawn(asyncio.Event().wait(), "stuck")
        with caplog.at_level(logging.ERROR):
            await background.settle(0.05)
        assert stuck.cancelled()
        assert not len(background)
        assert "a failing task" in caplog.text

    run(scenario())


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


def test_histogram_counts_by_bound() -> None:
    histogram = Histogram()
    for value in (0.0005, 0.001, 0.5, 1000.0, None):
        histogram.observe(value)
    assert (histogram.num, histogram.counts[0], histogram.counts[-1]) == (4, 2, 1)
    assert histogram.total == pytest.approx(1000.5015)


def chunk(offset: int, token_ids: list[int], finish: worker_pb2.EngineFinish = worker_pb2.ENGINE_FINISH_NONE) -> Chunk:
    logprobs = [inference_pb2.PositionLogprobs() for _ in token_ids]
    return Chunk(offset, token_ids, logprobs, finish)


def test_text_never_breaks_a_character_and_held_text_comes_at_the_end(model: Path) -> None:
    served = ServedModel.load(ModelOptions(path=str(model)))
    ids = served.tokenizer.encode("a€b")
    output = OutputStream(served.tokenizer, [5], [])
    texts = [output.push(chunk(index, [token_id]))[0].text for index, token_id in enumerate(ids)]
    assert "".join(texts) == "a€b"
    assert all("\ufffd" not in text for text in texts)
    output = OutputStream(served.tokenizer, [5], ["bcd"])
    held, ending = output.push(chunk(0, served.tokenizer.encode("abc")))
    assert (held.text, ending) == ("a", None)
    message, ending = output.push(chunk(3, served.tokenizer.encode("x"), worker_pb2.ENGINE_FINISH_LENGTH))
    assert message.text == "bcx"
    assert ending == Ending(inference_pb2.FINISH_REASON_LENGTH)


def test_tokens_behind_a_stop_string_are_cut_off(model: Path) -> None:
    served = ServedModel.load(ModelOptions(path=str(model)))
    output = OutputStream(served.tokenizer, [5], ["cd"])
    ids = [served.tokenizer.encode(letter)[0] for letter in "abcdefg"]
    message, ending = output.push(chunk(0, ids, worker_pb2.ENGINE_FINISH_EOS))
    assert (message.text, list(message.token_ids), len(message.logprobs)) == ("ab", ids[:4], 4)
    assert ending == Ending(inference_pb2.FINISH_REASON_STOP, "cd")
    assert output.num_tokens == 4
