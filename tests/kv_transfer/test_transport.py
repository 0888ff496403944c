"""The contract of every transport, over a rendezvous within one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kv_transfer.errors import TransportError
from kv_transfer.rendezvous import pair_store
from kv_transfer.transport import ChannelOptions, Side, Transport, open_transport
from protos.rendezvous import Rendezvous

TIMEOUT_S = 1.0
Ends = tuple[Transport, Transport]


def open_ends(name: str) -> Ends:
    stores: dict[Side, Rendezvous] = {}
    stores[Side.SENDER] = pair_store(lambda key, value: stores[Side.RECEIVER].put(key, value), 5.0)
    stores[Side.RECEIVER] = pair_store(lambda key, value: stores[Side.SENDER].put(key, value), 5.0)

    def open_end(side: Side) -> Transport:
        options = ChannelOptions(side, "127.0.0.1", connect_timeout_s=5.0, transfer_timeout_s=TIMEOUT_S)
        return open_transport(name, options, stores[side])

    with ThreadPoolExecutor(2) as pool:
        sender, receiver = pool.map(open_end, (Side.SENDER, Side.RECEIVER))
    return sender, receiver


@pytest.fixture(params=["gloo", "loopback"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    sender, receiver = open_ends(request.param)
    yield sender, receiver
    sender.close()
    receiver.close()


def test_pieces_arrive_whole_and_in_order(ends: Ends) -> None:
    sender, receiver = ends
    pieces = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (1, 100_000, 7, 1 << 20)]
    arrived = [torch.zeros_like(piece) for piece in pieces]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [transfer.wait() for transfer in [sender.send(piece) for piece in pieces]])
        receives = [receiver.recv(into) for into in arrived]
        for receive in receives:
            receive.wait()
        sending.result(5)
    assert all(torch.equal(piece, copy) for piece, copy in zip(pieces, arrived, strict=True))


def test_a_peer_that_sends_nothing_is_waited_for_in_vain(ends: Ends) -> None:
    start = time.monotonic()
    with pytest.raises(TransportError):
        ends[1].recv(torch.zeros(10, dtype=torch.uint8)).wait()
    assert 0.9 * TIMEOUT_S <= time.monotonic() - start < 5 * TIMEOUT_S


def test_a_peer_that_closes_fails_the_receive(ends: Ends) -> None:
    sender, receiver = ends
    receive = receiver.recv(torch.zeros(10, dtype=torch.uint8))
    sender.close()
    with pytest.raises(TransportError):
        receive.wait()


@pytest.mark.parametrize("name", ["gloo", "loopback"])
def test_nobody_at_the_other_end(name: str) -> None:
    store = pair_store(lambda key, value: None, 0.2)
    options = ChannelOptions(Side.SENDER, "127.0.0.1", connect_timeout_s=0.2, transfer_timeout_s=1.0)
    with pytest.raises(TransportError):
        open_transport(name, options, store)
