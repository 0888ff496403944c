"""How the two ends of a pair prove themselves and agree, before anything else is said.

The sender dials, then:

    sender                                        receiver
    PairHello(identities, layout, nonce, ...) ──>
                        <── PairChallenge(nonce, layout, mac)     the receiver knows the secret
    PairProof(mac) ──>                                            the sender knows it too
                        <── PairReady(transport), or PairRefused(reason)

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
from kv_transfer.layout import HeadSlice, KVLayout
from protos.auth import derive_key
from protos.transfer_pb2 import ControlMessage, PairChallenge, PairHello, PairProof, PairRefused
from protos.worker_pb2 import Layout, WorkerIdentity

PROTOCOL_VERSION = 2
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


@dataclass(frozen=True, slots=True)
class Receiver:
    """One rank of a worker that takes KV."""

    identity: Identity
    address: str
    """host:port of its control listener."""
    layout: KVLayout

    def __str__(self) -> str:
        rank = f" rank {self.layout.tp_rank}" if self.layout.tp_size > 1 else ""
        return f"{self.identity}{rank}"

    def heads_from(self, sender: KVLayout) -> HeadSlice:
        """What a rank of that layout sends to it."""
        return sender.slices_to(self.layout)[0]


def pair_key(secret: bytes) -> bytes:
    """The key of the handshake's macs."""
    return derive_key(secret, "pdserve kv pair v1").encode()


@dataclass(frozen=True, slots=True)
class Means:
    """What a node can carry KV with."""

    transport: str
    """The transport it asks for."""
    is_auto: bool
    """Whether it takes another where that cannot be."""
    gpu: str
    """UUID of the GPU its KV lies on; empty on a CPU."""

    def agree(self, transport: str, gpu: str, is_auto: bool) -> str | None:
        """What a pair with a peer of these means uses; None if there is nothing."""
        if transport != self.transport:
            return None
        if transport == "nccl" and gpu == self.gpu:
            return "gloo" if self.is_auto and is_auto else None
        return transport


@dataclass(frozen=True, slots=True)
class Agreed:
    """What both ends of a pair know once they have shaken hands."""

    peer: Identity
    layout: KVLayout
    """The peer's."""
    transport: str
    attempt: int


class Handshake:
    """What one node says in its handshakes, as either end."""

    def __init__(
        self, identity: Identity, layout: KVLayout, config: TransferConfig, means: Means, secret: bytes
    ) -> None:
        self._identity = identity
        self._layout = layout
        self._config = config
        self._bound_s = min(config.connect_timeout_s, config.peer_timeout_s)
        self._means = means
        self._key = pair_key(secret)

    def as_sender(self, control: ControlConnection, receiver: Identity, attempt: int) -> Agreed:
        """Speak first; returns when the pair is agreed, PairRefusedError says why it is not."""
        deadline = time.monotonic() + self._bound_s
        hello = PairHello(
            sender=self._identity.to_proto(),
            receiver=receiver.to_proto(),
            layout=self._layout.to_proto(),
            attempt=attempt,
            nonce=secrets.token_bytes(_NONCE_BYTES),
            protocol_version=PROTOCOL_VERSION,
            transport=self._means.transport,
            digest=self._config.digest,
            gpu=self._means.gpu,
            transport_is_auto=self._means.is_auto,
        )
        hello_bytes = control.send(ControlMessage(hello=hello))
        challenge_bytes, message = _read(control, "challenge", deadline)
        challenge = message.challenge
        if not hmac.compare_digest(challenge.mac, self._receiver_mac(hello_bytes, challenge)):
            raise PairRefusedError(f"{control.peer} holds another cluster secret than this worker")
        mac = self._mac("sender", hello_bytes, challenge_bytes)
        control.send(ControlMessage(proof=PairProof(mac=mac)))
        _, message = _read(control, "ready", deadline)
        control.max_bytes = MAX_PEER_BYTES
        transport = message.ready.transport
        if transport != self._means.transport and not (self._means.is_auto and transport == "gloo"):
            raise ProtocolError(f"{control.peer} takes {transport!r} to carry the bytes, which was not offered")
        return Agreed(receiver, _layout_of(challenge.layout), transport, attempt)

    def as_receiver(self, control: ControlConnection) -> Agreed:
        """Answer a stranger; returns what is agreed once it has proved itself, else tells it why not and raises.

        The pair says PairReady when it is about to start.
        """
        deadline = time.monotonic() + self._bound_s
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
        transport = self._means.agree(hello.transport, hello.gpu, hello.transport_is_auto)
        assert transport is not None, "no objection was made"
        sender = Identity(hello.sender.worker_id, hello.sender.epoch)
        return Agreed(sender, KVLayout.from_proto(hello.layout), transport, hello.attempt)

    def _objections(self, hello: PairHello) -> list[str]:
        """What keeps this node from receiving from that sender, in words."""
        objections = []
        meant = Identity(hello.receiver.worker_id, hello.receiver.epoch)
        if meant != self._identity:
            objections.append(f"this is {self._identity}, the ticket was for {meant}: ask for a new ticket")
        if self._means.agree(hello.transport, hello.gpu, hello.transport_is_auto) is None:
            objections.append(
                f"transport is {self._means.transport} here and {hello.transport} there"
                if hello.transport != self._means.transport
                else "both workers share one GPU, where NCCL makes no pair: set transport to auto"
            )
        if hello.digest != self._config.digest:
            objections.append(f"digest is {self._config.digest} here and {hello.digest} there")
        try:
            theirs = KVLayout.from_proto(hello.layout)
        except ValueError as error:
            return [*objections, f"the layout is none: {error}"]
        objections += self._layout.differences(theirs)
        if not theirs.slices_to(self._layout):
            objections.append(
                f"rank {theirs.tp_rank} of {theirs.tp_size} has no KV heads for rank {self._layout.tp_rank} of "
                f"{self._layout.tp_size}"
            )
        return objections

    def _receiver_mac(self, hello_bytes: bytes, challenge: PairChallenge) -> bytes:
        bare = PairChallenge(nonce=challenge.nonce, layout=challenge.layout)
        return self._mac("receiver", hello_bytes, bare.SerializeToString(deterministic=True))

    def _mac(self, role: str, *parts: bytes) -> bytes:
        mac = hmac.new(self._key, role.encode(), "sha256")
        for part in parts:
            mac.update(len(part).to_bytes(8, "big") + part)
        return mac.digest()


def _layout_of(message: Layout) -> KVLayout:
    try:
        return KVLayout.from_proto(message)
    except ValueError as error:
        raise ProtocolError(f"the peer's layout is none: {error}") from error


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
