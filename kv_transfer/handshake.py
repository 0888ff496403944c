"""How the two ends of a pair prove themselves and agree, before anything else is said.

The sender dials, then:

    sender                                        receiver
    PairHello(identities, layout, nonce, ...) ──>
                        <── PairChallenge(nonce, layout, mac)     the receiver knows the secret
    PairProof(mac) ──>                                            the sender knows it too
                        <── PairReady, or PairRefused(reason)

Both macs are HMAC-SHA256 with a key derived from the cluster secret, over the bytes of what was
said before. What differs is told only to a peer that has proved itself.
"""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass

from kv_transfer.config import TransferConfig
from kv_transfer.control import MAX_PEER_BYTES, ControlConnection
from kv_transfer.errors import PairRefusedError, PeerLostError, ProtocolError
from kv_transfer.layout import KVLayout
from protos.auth import derive_key
from protos.transfer_pb2 import ControlMessage, PairChallenge, PairHello, PairProof, PairRefused
from protos.worker_pb2 import WorkerIdentity

PROTOCOL_VERSION = 1
_NONCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Identity:
    """One life of a worker."""

    worker_id: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.worker_id}/{self.epoch}"

    def to_proto(self) -> WorkerIdentity:
        """The message that names it."""
        return WorkerIdentity(worker_id=self.worker_id, epoch=self.epoch)


def pair_key(secret: bytes) -> bytes:
    """The key of the handshake's macs."""
    return derive_key(secret, "pdserve kv pair v1").encode()


class Handshake:
    """What one node says in its handshakes, as either end."""

    def __init__(self, identity: Identity, layout: KVLayout, config: TransferConfig, secret: bytes) -> None:
        self._identity = identity
        self._layout = layout
        self._config = config
        self._key = pair_key(secret)

    def as_sender(self, control: ControlConnection, receiver: Identity, attempt: int) -> None:
        """Speak first; returns when the pair is agreed, PairRefusedError says why it is not."""
        deadline = time.monotonic() + self._config.connect_timeout_s
        hello = PairHello(
            sender=self._identity.to_proto(),
            receiver=receiver.to_proto(),
            layout=self._layout.to_proto(),
            attempt=attempt,
            nonce=secrets.token_bytes(_NONCE_BYTES),
            protocol_version=PROTOCOL_VERSION,
            transport=self._config.transport_name,
            digest=self._config.digest_name,
        )
        hello_bytes = control.send(ControlMessage(hello=hello))
        challenge_bytes, message = _read(control, "challenge", deadline)
        if not hmac.compare_digest(message.challenge.mac, self._receiver_mac(hello_bytes, message.challenge)):
            raise PairRefusedError(f"{control.peer} holds another cluster secret than this worker")
        mac = self._mac("sender", hello_bytes, challenge_bytes)
        control.send(ControlMessage(proof=PairProof(mac=mac)))
        _read(control, "ready", deadline)
        control.max_bytes = MAX_PEER_BYTES

    def as_receiver(self, control: ControlConnection) -> PairHello:
        """Answer a stranger; returns its hello once it is proved and agreed, else tells it why not and raises.

        The pair says PairReady when it is about to start.
        """
        deadline = time.monotonic() + self._config.connect_timeout_s
        hello_bytes, message = _read(control, "hello", deadline)
        hello = message.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            refuse(control, f"protocol version {hello.protocol_version} was spoken, {PROTOCOL_VERSION} is understood")
        challenge = PairChallenge(nonce=secrets.token_bytes(_NONCE_BYTES), layout=self._layout.to_proto())
        challenge.mac = self._receiver_mac(hello_bytes, challenge)
        challenge_bytes = control.send(ControlMessage(challenge=challenge))
        _, message = _read(control, "proof", deadline)
        if not hmac.compare_digest(message.proof.mac, self._mac("sender", hello_bytes, challenge_bytes)):
            refuse(control, "the proof does not fit this worker's cluster secret")
        control.max_bytes = MAX_PEER_BYTES
        if objections := self._objections(hello):
            refuse(control, "; ".join(objections))
        return hello

    def _objections(self, hello: PairHello) -> list[str]:
        """What keeps this node from receiving from that sender, in words."""
        objections = []
        meant = Identity(hello.receiver.worker_id, hello.receiver.epoch)
        if meant != self._identity:
            objections.append(f"this is {self._identity}, the ticket was for {meant}: ask for a new ticket")
        for what, theirs, ours in (
            ("transport", hello.transport, self._config.transport_name),
            ("digest", hello.digest, self._config.digest_name),
        ):
            if theirs != ours:
                objections.append(f"{what} is {ours} here and {theirs} there")
        try:
            objections += layout_objections(self._layout, KVLayout.from_proto(hello.layout))
        except ValueError as error:
            objections.append(f"the layout is none: {error}")
        return objections

    def _receiver_mac(self, hello_bytes: bytes, challenge: PairChallenge) -> bytes:
        bare = PairChallenge(nonce=challenge.nonce, layout=challenge.layout)
        return self._mac("receiver", hello_bytes, bare.SerializeToString(deterministic=True))

    def _mac(self, role: str, *parts: bytes) -> bytes:
        mac = hmac.new(self._key, role.encode(), "sha256")
        for part in parts:
            mac.update(len(part).to_bytes(8, "big") + part)
        return mac.digest()


def layout_objections(ours: KVLayout, theirs: KVLayout) -> list[str]:
    """What keeps a pair from being made between two layouts, in words."""
    objections = ours.differences(theirs)
    if (ours.tp_size, ours.tp_rank) != (theirs.tp_size, theirs.tp_rank):
        objections.append(
            f"rank {ours.tp_rank} of {ours.tp_size} here and rank {theirs.tp_rank} of {theirs.tp_size} there: "
            "KV moves between equal ranks"
        )
    return objections


def refuse(control: ControlConnection, reason: str) -> None:
    """Tell the peer why there will be no pair, and raise PairRefusedError."""
    control.send(ControlMessage(refused=PairRefused(reason=reason)))
    raise PairRefusedError(f"refused {control.peer}: {reason}")


def _read(control: ControlConnection, expected: str, deadline: float) -> tuple[bytes, ControlMessage]:
    body = control.read(max(0.0, deadline - time.monotonic()))
    if body is None:
        raise PeerLostError(f"{control.peer} did not send its {expected} within the handshake's time")
    message = control.parse(body)
    kind = message.WhichOneof("message")
    if kind == "refused":
        raise PairRefusedError(f"{control.peer} refused: {message.refused.reason}")
    if kind != expected:
        raise ProtocolError(f"{control.peer} sent {kind or 'nothing known'} where {expected} was expected")
    return body, message
