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
from kv_transfer.handshake import Handshake, Identity
from protos.transfer_pb2 import ControlMessage, PairHello, PairProof, PairReady, Ping
from tests.kv_transfer.conftest import LAYOUT, SECRET

SENDER, RECEIVER = Identity("prefill", 3), Identity("decode", 8)
CONFIG = TransferConfig(connect_timeout_s=2.0)


@dataclass
class Ends:
    here: ControlConnection
    there: ControlConnection
    pool: ThreadPoolExecutor

    def receive(self, handshake: Handshake) -> Future[PairHello]:
        """Run the receiver's side; it says PairReady, as a pair does."""

        def run() -> PairHello:
            hello = handshake.as_receiver(self.there)
            self.there.send(ControlMessage(ready=PairReady()))
            return hello

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
    fields = {"identity": SENDER, "layout": LAYOUT, "config": CONFIG, "secret": SECRET} | changes
    return Handshake(**fields)


def receiver(**changes: Any) -> Handshake:
    return sender(**({"identity": RECEIVER} | changes))


def test_two_ends_with_one_secret_agree(ends: Ends) -> None:
    received = ends.receive(receiver())
    sender().as_sender(ends.here, RECEIVER, attempt=4)
    hello = received.result(5)
    assert (hello.sender.worker_id, hello.sender.epoch, hello.attempt) == ("prefill", 3, 4)
    assert ends.here.max_bytes == ends.there.max_bytes == MAX_PEER_BYTES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": Identity("decode", 9)}, "this is decode/9, the ticket was for decode/8"),
        ({"identity": Identity("other", 8)}, "this is other/8"),
        ({"layout": replace(LAYOUT, block_size=16)}, "block_size is 16 here and 8 there"),
        ({"layout": replace(LAYOUT, dtype="float16", num_layers=4)}, "num_layers is 4 here .* dtype is float16 here"),
        ({"layout": replace(LAYOUT, model_hash="m2")}, "model_hash is m2 here and tiny there"),
        ({"layout": replace(LAYOUT, tp_size=2)}, "rank 0 of 2 here and rank 0 of 1 there"),
        ({"config": replace(CONFIG, transport="loopback")}, "transport is loopback here and gloo there"),
        ({"config": replace(CONFIG, digest="none")}, "digest is none here and xxh3-64 there"),
    ],
)
def test_both_ends_hear_what_differs(ends: Ends, changes: dict[str, Any], message: str) -> None:
    received = ends.receive(receiver(**changes))
    with pytest.raises(PairRefusedError, match=message):
        sender().as_sender(ends.here, RECEIVER, attempt=1)
    with pytest.raises(PairRefusedError, match=message):
        received.result(5)


def test_a_sender_does_not_go_on_with_a_receiver_of_another_secret(ends: Ends) -> None:
    received = ends.receive(receiver(secret=b"another"))
    with pytest.raises(PairRefusedError, match="holds another cluster secret"):
        sender().as_sender(ends.here, RECEIVER, attempt=1)
    ends.here.shutdown()
    with pytest.raises(PeerLostError):
        received.result(5)


def strange_hello(**changes: Any) -> ControlMessage:
    fields = {"sender": SENDER.to_proto(), "receiver": RECEIVER.to_proto(), "nonce": b"n" * 16, "protocol_version": 1}
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
    hello = strange_hello(layout=LAYOUT.to_proto(), transport="gloo", digest="xxh3-64")
    recorded = sender()._mac("sender", b"hello of yesterday", b"challenge of yesterday")
    received = ends.receive(receiver())
    ends.here.send(hello)
    assert ends.here.read(2)
    ends.here.send(ControlMessage(proof=PairProof(mac=recorded)))
    with pytest.raises(PairRefusedError, match="proof"):
        received.result(5)


def test_another_protocol_version_is_refused_by_number(ends: Ends) -> None:
    received = ends.receive(receiver())
    ends.here.send(strange_hello(protocol_version=2))
    with pytest.raises(PairRefusedError, match="protocol version 2 was spoken, 1 is understood"):
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
