"""Who may send to this node: the control listener, and the table of incoming pairs.

Each connection has a thread of its own from the first byte on, so a slow stranger holds nobody up;
strangers are few (MAX_STRANGERS) and have the handshake's time. A rank of a sender has at most one pair to
this node: a newer epoch or attempt replaces the older, which is closed; an older one is refused.
"""

from __future__ import annotations

import logging
import socket
import threading
import time

from kv_transfer.context import NodeContext, PairInfo
from kv_transfer.control import ControlConnection
from kv_transfer.errors import PairRefusedError, TransferError
from kv_transfer.handshake import Agreed, refuse
from kv_transfer.receiver import ReceiverPair
from kv_transfer.ticket import KVTicket

MAX_STRANGERS = 32
ACCEPT_BACKOFF_S = 0.1
"""Pause after an accept that failed, as when file descriptors run out."""
_log = logging.getLogger(__name__)

SenderKey = tuple[str, int]
"""worker_id and rank."""


class PeerTable:
    """Accepts senders and holds their pairs."""

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._strangers: set[ControlConnection] = set()
        self._pairs: dict[SenderKey, ReceiverPair] = {}
        self._newest: dict[SenderKey, tuple[int, int]] = {}
        """(epoch, attempt) of the newest pair a sender ever made."""
        self._threads: set[threading.Thread] = set()
        self._accepting = threading.Thread(target=self._accept, name="kv-listen", daemon=True)

    @property
    def num_pairs(self) -> int:
        """Incoming pairs that are made or being made."""
        return len(self._pairs)

    def infos(self) -> list[PairInfo]:
        """Incoming pairs that are made or being made."""
        with self._lock:
            return [pair.info for pair in self._pairs.values()]

    def tell_granted(self, worker_id: str, epoch: int, ticket: KVTicket) -> None:
        """Bring rank 0 of a sender a ticket, if there is a pair with it."""
        with self._lock:
            pair = self._pairs.get((worker_id, 0))
        if pair is not None and pair.sender.epoch == epoch:
            pair.tell_granted(ticket)

    def start(self) -> str:
        """Listen on a free port of the configured interface; returns host:port, TransferError if it cannot."""
        host = self._context.config.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=128)
        except OSError as error:
            raise TransferError(
                f"host {host} is no address of this machine that can be listened on: {error}"
            ) from error
        self._accepting.start()
        port = self._listener.getsockname()[1]
        return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"

    def stop(self, reason: str) -> None:
        """Stop listening and close every pair; `join` waits for the threads."""
        with self._lock:
            self._stopping.set()
            pairs, strangers = list(self._pairs.values()), list(self._strangers)
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
        for control in strangers:
            control.shutdown()
        for pair in pairs:
            pair.close(reason)

    def join(self, deadline: float) -> bool:
        """Wait for the threads until a monotonic time; whether they ended."""
        with self._lock:
            threads = [*self._threads, self._accepting]
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        with listener:
            while not self._stopping.is_set():
                try:
                    sock, address = listener.accept()
                except OSError as error:
                    if self._stopping.wait(ACCEPT_BACKOFF_S):
                        return
                    _log.warning("the control listener could not accept: %s", error)
                    continue
                self._welcome(sock, f"{address[0]}:{address[1]}")

    def _welcome(self, sock: socket.socket, peer: str) -> None:
        """Give a connection its thread, or close it if there are too many strangers."""
        timeout_s = self._context.config.peer_timeout_s
        with self._lock:
            if self._stopping.is_set() or len(self._strangers) >= MAX_STRANGERS:
                sock.close()
                return
            control = ControlConnection(sock, peer=peer, send_timeout_s=timeout_s)
            self._strangers.add(control)
            thread = threading.Thread(target=self._serve, args=(control,), name=f"kv-peer {peer}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _serve(self, control: ControlConnection) -> None:
        try:
            pair = self._introduce(control)
            if pair is not None:
                pair.serve()
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _introduce(self, control: ControlConnection) -> ReceiverPair | None:
        """Shake hands; the pair, booked in the table, or None when there is none."""
        try:
            agreed = self._context.handshake.as_receiver(control)
            control.peer = str(agreed.peer)
            return self._book(control, agreed)
        except TransferError as error:
            if isinstance(error, PairRefusedError):
                self._context.counters.add(refused_pairs=1)
            _log.warning("no pair was made: %s", error)
            control.shutdown()
            control.close()
            return None
        finally:
            with self._lock:
                self._strangers.discard(control)

    def _book(self, control: ControlConnection, agreed: Agreed) -> ReceiverPair:
        pair = ReceiverPair(self._context, control, agreed, self._forget)
        sender, key = agreed.peer, (agreed.peer.worker_id, agreed.layout.tp_rank)
        with self._lock:
            newest = self._newest.get(key, (-1, -1))
            is_new = (sender.epoch, agreed.attempt) > newest
            old = self._pairs.get(key)
            if is_new and not self._stopping.is_set():
                self._newest[key] = (sender.epoch, agreed.attempt)
                self._pairs[key] = pair
        if self._stopping.is_set():
            refuse(control, "this worker stops")
        if not is_new:
            refuse(
                control,
                f"attempt {agreed.attempt} of {sender} is older than attempt {newest[1]} of epoch {newest[0]}",
            )
        if old is not None:
            old.close(f"replaced by attempt {agreed.attempt} of {sender}")
        return pair

    def _forget(self, pair: ReceiverPair) -> None:
        key = (pair.sender.worker_id, pair.sender_layout.tp_rank)
        with self._lock:
            if self._pairs.get(key) is pair:
                del self._pairs[key]
