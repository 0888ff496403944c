"""What two ends refuse each other for, and that nothing is told to a stranger."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from kv_transfer.config import TransferConfig
from kv_transfer.control import MAX_PEER_BYTES, MAX_STRANGER_BYTES, ControlConnection
from kv_transfer.errors import PairRefusedError, PeerLostError, ProtocolError
from kv_transfer.handshake import Agreed, Handshake, Identity, Means
from protos.transfer_pb2 import ControlMessage, PairHello, PairProof, PairReady, Ping
from tests.kv_transfer.conftest import LAYOUT, SECRET

SENDER, RECEIVER = Identity("prefill", 3), Identity("decode", 8)
CPU = Means("gloo", False, "")
CONFIG = TransferConfig(connect_timeout_s=2.0)


@dataclass
class Ends:
    here: ControlConnection
    there: ControlConnection
    pool: ThreadPoolExecutor

    def receive(self, handshake: Handshake) -> Future[Agreed]:
        """Run the receiver's side; it says PairReady, as a pair does."""

        def run() -> Agreed:
            agreed = handshake.as_receiver(self.there)
            self.there.send(ControlMessage(ready=PairReady(transport=agreed.transport)))
            return agreed

        return self.pool.submit(run)


@pytest.fixture
def ends() -> Iterator[Ends]:
    left, right = _pair()
    here = ControlConnection(left, peer=str(RECEIVER), send_timeout_s=2)
    there = ControlConnection(right, peer="a stranger", send_timeout_s=2)
    with ThreadPoolExecutor(1) as pool:
        yield Ends(here, there, pool)
        here.close()
    there.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    return left, right


def sender(**changes: Any) -> Handshake:
    fields = {"identity": SENDER, "layout": LAYOUT, "config": CONFIG, "means": CPU, "secret": SECRET} | changes
    return Handshake(**fields)


def receiver(**changes: Any) -> Handshake:
    return sender(**({"identity": RECEIVER} | changes))


def test_two_ends_with_one_secret_agree(ends: Ends) -> None:
    received = ends.receive(receiver())
    theirs = replace(LAYOUT, num_kv_heads=2, tp_size=2, tp_rank=1)
    assert sender(layout=theirs).as_sender(ends.here, RECEIVER, attempt=4) == Agreed(RECEIVER, LAYOUT, "gloo", 4)
    assert received.result(5) == Agreed(SENDER, theirs, "gloo", 4)
    assert ends.here.max_bytes == ends.there.max_bytes == MAX_PEER_BYTES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": Identity("decode", 9)}, "this is decode/9, the ticket was for decode/8"),
        ({"identity": Identity("other", 8)}, "this is other/8"),
        ({"layout": replace(LAYOUT, block_size=16)}, "block_size is 16 here and 8 there"),
        ({"layout": replace(LAYOUT, dtype="float16", num_layers=4)}, "num_layers is 4 here .* dtype is float16 here"),
        ({"layout": replace(LAYOUT, model_hash="m2")}, "model_hash is m2 here and tiny there"),
        ({"means": Means("loopback", False, "")}, "transport is loopback here and gloo there"),
        ({"means": Means("nccl", True, "GPU-1")}, "transport is nccl here and gloo there"),
        ({"config": replace(CONFIG, digest="none")}, "digest is none here and auto there"),
    ],
)
def test_both_ends_hear_what_differs(ends: Ends, changes: dict[str, Any], message: str) -> None:
    received = ends.receive(receiver(**changes))
    with pytest.raises(PairRefusedError, match=message):
        sender().as_sender(ends.here, RECEIVER, attempt=1)
    with pytest.raises(PairRefusedError, match=message):
        received.result(5)


def test_ranks_without_common_heads_make_no_pair(ends: Ends) -> None:
    two_ranks = replace(LAYOUT, tp_size=2)
    received = ends.receive(receiver(layout=two_ranks))
    with pytest.raises(PairRefusedError, match="rank 1 of 2 has no KV heads for rank 0 of 2"):
        sender(layout=two_ranks.of_rank(1)).as_sender(ends.here, RECEIVER, attempt=1)
    with pytest.raises(PairRefusedError):
        received.result(5)


@pytest.mark.parametrize(
    ("ours", "theirs", "transport"),
    [
        (Means("nccl", True, "GPU-1"), Means("nccl", True, "GPU-2"), "nccl"),
        (Means("nccl", True, "GPU-1"), Means("nccl", True, "GPU-1"), "gloo"),
        (Means("nccl", False, "GPU-1"), Means("nccl", True, "GPU-2"), "nccl"),
        (Means("gloo", False, "GPU-1"), Means("gloo", False, "GPU-1"), "gloo"),
        (Means("gloo", True, ""), Means("gloo", False, ""), "gloo"),
        (Means("loopback", False, ""), Means("loopback", False, ""), "loopback"),
    ],
)
def test_both_ends_learn_what_carries_the_bytes(ends: Ends, ours: Means, theirs: Means, transport: str) -> None:
    received = ends.receive(receiver(means=theirs))
    assert sender(means=ours).as_sender(ends.here, RECEIVER, attempt=1).transport == transport
    assert received.result(5).transport == transport


@pytest.mark.parametrize("is_auto", [(False, False), (True, False), (False, True)])
def test_nccl_on_one_gpu_is_refused_where_an_end_insists_on_it(ends: Ends, is_auto: tuple[bool, bool]) -> None:
    received = ends.receive(receiver(means=Means("nccl", is_auto[1], "GPU-1")))
    message = "both workers share one GPU, where NCCL makes no pair: set transport to auto"
    with pytest.raises(PairRefusedError, match=message):
        sender(means=Means("nccl", is_auto[0], "GPU-1")).as_sender(ends.here, RECEIVER, attempt=1)
    with pytest.raises(PairRefusedError, match=message):
        received.result(5)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(CPU, "loopback"), (Means("nccl", False, "GPU-1"), "gloo"), (Means("nccl", True, "G"), "")]
)
def test_a_transport_that_was_not_offered_is_an_error(ends: Ends, ours: Means, theirs: str) -> None:
    def run() -> None:
        receiver(means=ours if ours is CPU else Means("nccl", True, "GPU-2")).as_receiver(ends.there)
        ends.there.send(ControlMessage(ready=PairReady(transport=theirs)))

    answered = ends.pool.submit(run)
    with pytest.raises(ProtocolError, match=f"takes '{theirs}' to carry the bytes, which was not offered"):
        sender(means=ours).as_sender(ends.here, RECEIVER, attempt=1)
    answered.result(5)


def test_a_sender_does_not_go_on_with_a_receiver_of_another_secret(ends: Ends) -> None:
    received = ends.receive(receiver(secret=b"another"))
    with pytest.raises(PairRefusedError, match="holds another cluster secret"):
        sender().as_sender(ends.here, RECEIVER, attempt=1)
    ends.here.shutdown()
    with pytest.raises(PeerLostError):
        received.result(5)


def strange_hello(**changes: Any) -> ControlMessage:
    fields = {"sender": SENDER.to_proto(), "receiver": RECEIVER.to_proto(), "nonce": b"n" * 16, "protocol_version": 2}
    return ControlMessage(hello=PairHello(**(fields | changes)))


def test_a_receiver_refuses_a_false_proof_without_telling_its_layout_apart(ends: Ends) -> None:
    received = ends.receive(receiver())
    ends.here.send(strange_hello())
    assert ends.here.read(2)
    ends.here.send(ControlMessage(proof=PairProof(mac=b"\0" * 32)))
    with pytest.raises(PairRefusedError, match="cluster secret"):
        received.result(5)
    answer = ends.here.parse(ends.here.read(2) or b"")
    assert answer.refused.reason == "the proof does not fit this worker's cluster secret"
    assert ends.there.max_bytes == MAX_STRANGER_BYTES


def test_a_recorded_handshake_cannot_be_played_again(ends: Ends) -> None:
    hello = strange_hello(layout=LAYOUT.to_proto(), transport="gloo", digest="auto")
    recorded = sender()._mac("sender", b"hello of yesterday", b"challenge of yesterday")
    received = ends.receive(receiver())
    ends.here.send(hello)
    assert ends.here.read(2)
    ends.here.send(ControlMessage(proof=PairProof(mac=recorded)))
    with pytest.raises(PairRefusedError, match="proof"):
        received.result(5)


def test_another_protocol_version_is_refused_by_number(ends: Ends) -> None:
    received = ends.receive(receiver())
    ends.here.send(strange_hello(protocol_version=1))
    with pytest.raises(PairRefusedError, match="protocol version 1 was spoken, 2 is understood"):
        received.result(5)


def test_a_message_out_of_place_is_an_error(ends: Ends) -> None:
    received = ends.receive(receiver())
    ends.here.send(ControlMessage(ping=Ping(count=1)))
    with pytest.raises(ProtocolError, match="sent ping where hello was expected"):
        received.result(5)


def test_a_silent_stranger_costs_a_bounded_time(ends: Ends) -> None:
    received = ends.receive(receiver(config=replace(CONFIG, connect_timeout_s=0.2)))
    with pytest.raises(PeerLostError, match="did not send its hello"):
        received.result(5)
