"""What a new pair measures of itself, and what becomes of one that is slow or does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from kv_transfer.config import TransferConfig
from kv_transfer.context import Equipment
from kv_transfer.digest import Digester
from kv_transfer.errors import PairRefusedError, PeerLostError
from kv_transfer.lane import CpuLane
from kv_transfer.receiver import ReceiverPair
from kv_transfer.self_test import NUM_PROBES, SMALL_BYTES, Measured, SelfTest, judge
from kv_transfer.staging import StagingPool
from kv_transfer.ticket import TicketState
from kv_transfer.transport import ChannelOptions, Side, Transfer
from protos.transfer_pb2 import ControlMessage
from tests.kv_transfer.conftest import BOUND_S, LAYOUT, Make, Memory, first_token_of, offer, send_all, slots
from tests.kv_transfer.test_sender import wait_until

LARGE_BYTES = 1 << 20


class _Sent:
    def wait(self) -> None:
        pass


@dataclass
class Link:
    """A data channel and its receiver: each byte takes its time, each message a delay."""

    seconds_per_byte: float = 0.0
    delay_s: float = 0.0
    said: list[ControlMessage] = field(default_factory=list)
    answer: Callable[[], None] = lambda: None

    def say(self, message: ControlMessage) -> None:
        self.said.append(message)

    def send(self, data: torch.Tensor) -> Transfer:
        threading.Timer(self.delay_s + data.numel() * self.seconds_per_byte, self.answer).start()
        return _Sent()

    def recv(self, into: torch.Tensor) -> Transfer:
        raise NotImplementedError

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def equipment() -> Equipment:
    return Equipment(
        lane=CpuLane(),
        staging=StagingPool(quota_bytes=2 * LARGE_BYTES, piece_bytes=LARGE_BYTES),
        digester=Digester(TransferConfig(), on_gpu=False),
        channel=ChannelOptions(Side.SENDER, "127.0.0.1", 1.0, 1.0),
    )


def measure(link: Link, timeout_s: float = BOUND_S) -> Measured:
    test = SelfTest(link.say, timeout_s)
    link.answer = test.seen
    tools = equipment()
    measured = test.run(link, tools, LARGE_BYTES)
    assert tools.staging.num_lent == 0
    return measured


def test_latency_and_rate_are_told_apart() -> None:
    link = Link(seconds_per_byte=1e-7, delay_s=0.02)
    measured = measure(link)
    assert 0.02 <= measured.latency_s < 0.1
    assert 2e6 < measured.bytes_per_s < 2.5e7, "1e7, and what a busy machine makes of it"


def test_every_probe_is_announced_and_the_result_told() -> None:
    link = Link()
    measured = measure(link)
    *probes, last = link.said
    assert [probe.probe.num_bytes for probe in probes] == [SMALL_BYTES] * NUM_PROBES + [LARGE_BYTES] * NUM_PROBES
    assert last.measured == measured.to_proto()


def test_a_probe_that_is_never_answered_costs_a_bounded_time() -> None:
    link = Link()
    test = SelfTest(link.say, 0.2)
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=r"a probe of 16384 bytes had not come after 0\.2 s"):
        test.run(link, equipment(), LARGE_BYTES)
    assert time.monotonic() - start < 2
    assert len(link.said) == 1


def test_the_end_of_the_pair_ends_the_wait() -> None:
    link = Link()
    test = SelfTest(link.say, 30.0)
    timer = threading.Timer(0.05, test.end, ["prefill/1 was silent for 2 s"])
    timer.start()
    with pytest.raises(PeerLostError, match="did not come: prefill/1 was silent"):
        test.run(link, equipment(), LARGE_BYTES)
    timer.join()


FAST, SLOW = Measured(1e-5, 50e9), Measured(1e-4, 3e9)


def test_a_fast_pair_is_used_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert judge(FAST, "nccl", TransferConfig(slow_pair="refuse"), "decode/1")
    assert judge(SLOW, "gloo", TransferConfig(slow_pair="refuse"), "decode/1")
    assert caplog.records == []


def test_a_slow_pair_is_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert not judge(SLOW, "nccl", TransferConfig(), "decode/1")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the pair with decode/1 moves 3 GB/s over nccl, 10 GB/s were expected" in record.getMessage()


def test_or_refused_if_the_user_wants_it() -> None:
    with pytest.raises(PairRefusedError, match=r"moves 50 GB/s over nccl, 60 GB/s were expected: .*expected_gb_s"):
        judge(FAST, "nccl", TransferConfig(slow_pair="refuse", expected_gb_s=60), "decode/1")


# -- in nodes


def test_both_ends_show_what_was_measured(make_node: Make) -> None:
    sender, receiver = make_node("prefill", Memory(LAYOUT)), make_node("decode", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    send_all(sender, delivery, [0])
    delivery.assert_delivered()
    (there,), (here,) = sender.pair_infos(), receiver.pair_infos()
    assert (there.peer, there.direction, there.state, there.transport) == ("decode/1", "to", "ready", "loopback")
    assert (here.peer, here.direction, here.state, here.transport) == ("prefill/1", "from", "ready", "loopback")
    assert 0 < there.latency_s == here.latency_s < 1
    assert there.bytes_per_s == here.bytes_per_s > 1e6


def test_a_slow_pair_carries_kv_or_is_refused(make_node: Make) -> None:
    receiver = make_node("decode", Memory(LAYOUT))
    warned = make_node("prefill-1", Memory(LAYOUT), expected_gb_s=1e6)
    delivery = offer(receiver, 8, [0])
    send_all(warned, delivery, [0])
    delivery.assert_delivered()
    assert warned.stats().slow_pairs == 1

    refused = make_node("prefill-2", Memory(LAYOUT), expected_gb_s=1e6, slow_pair="refuse")
    delivery = offer(receiver, 8, [0])
    send_all(refused, delivery, [0])
    result = delivery.at_sender()
    assert result.state is TicketState.ABORTED
    assert "1e+06 GB/s were expected" in result.reason
    receiver.abort(delivery.ticket.ticket_id, "over")
    delivery.at_receiver()
    wait_until(lambda: refused.stats().pairs == 0, "the refused pair is gone")


def test_a_receiver_that_answers_no_probe_is_lost_in_a_bounded_time(
    make_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReceiverPair, "_answer_probe", lambda *_: None)
    sender, receiver = make_node("prefill", Memory(LAYOUT), connect_timeout_s=0.5), make_node("decode", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    job = sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 3, 0, slots([0], 0, 8))
    job.finish(first_token_of(delivery))
    start = time.monotonic()
    result = delivery.at_sender()
    assert time.monotonic() - start < 5 * 0.5
    assert result.state is TicketState.LOST
    assert "a probe of 16384 bytes had not come" in result.reason
    receiver.abort(delivery.ticket.ticket_id, "over")
    delivery.at_receiver()
    wait_until(lambda: sender.stats().pairs == receiver.stats().pairs == 0, "the pair is gone at both ends")
