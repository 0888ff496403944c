"""NCCL as a data channel: a two-rank process group for each pair, over NVLink, PCIe or the network's RDMA.

Sends and receives run on a stream of the group's own, so that no pair waits behind another's; `Transfer.wait`
makes the caller's lane wait, not the caller. Nothing of torch's own supervision is used, for it ends the
process when a peer dies: a pair's control thread bounds every wait and calls `abort`. NCCL's `destroy`
blocks for ever when the peer is gone, so a group always ends by abort, on a thread of its own. Making a group cannot
be aborted, and waits for ever for a peer that never comes: it begins when both ends have said that they are there, and
has a thread of its own too. Where a peer is stopped in the middle of it that thread is left behind until the peer ends;
where a peer dies in it, NCCL keeps a few threads and descriptors until this process ends. (NCCL's non-blocking mode
could be aborted, but costs 0.2 to 0.3 ms a send.)
"""

from __future__ import annotations

import logging
import os
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from kv_transfer.errors import TransportError
from kv_transfer.transport import ChannelOptions, Transfer
from protos.rendezvous import Rendezvous, first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import ProcessGroupNCCL, Work

_log = logging.getLogger(__name__)

ABORT_S = 10.0
"""Bound of the wait for an abort; it takes about 0.5 s."""
NO_TIMEOUT = timedelta(days=365)
"""torch's watchdog would only log, and write dumps; the pairs watch themselves."""


def prepare_process() -> None:
    """Set what torch reads from the environment when it makes a group; what the user has set stays."""
    for name, value in (
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"),
        ("TORCH_NCCL_ENABLE_MONITORING", "0"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "0"),
        ("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false"),
    ):
        os.environ.setdefault(name, value)


class _NcclTransfer:
    """A send or receive; keeps its tensor alive."""

    def __init__(self, work: Work, tensor: torch.Tensor) -> None:
        self._work = work
        self._tensor = tensor

    def wait(self) -> None:
        """Let the current lane wait."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise TransportError(f"nccl: {first_line(error)}") from error


class NcclTransport:
    """One end of a pair's process group."""

    def __init__(self, options: ChannelOptions, store: Rendezvous) -> None:
        prepare_process()
        self._peer = 1 - options.side
        self._store = store
        self._abort_lock = threading.Lock()
        self._aborting: threading.Thread | None = None
        self._group: ProcessGroupNCCL | None = None
        self._error: Exception | None = None
        self._is_late = False
        made = threading.Event()
        store.when_closed(made.set)
        making = threading.Thread(target=self._make, args=(options, made), name="kv-nccl-make", daemon=True)
        making.start()
        made.wait(options.connect_timeout_s)
        with self._abort_lock:
            self._is_late = self._group is None
        if self._group is None:
            raise TransportError(f"nccl could not connect: {self._why_not(options, ended=made.is_set())}")

    def _why_not(self, options: ChannelOptions, *, ended: bool) -> str:
        if self._error is not None:
            return first_line(self._error)
        return "the pair was closed meanwhile" if ended else f"no group within {options.connect_timeout_s:g} s"

    def _make(self, options: ChannelOptions, made: threading.Event) -> None:
        """Make the group; one that comes too late is aborted."""
        from torch._C._distributed_c10d import ProcessGroupNCCL

        settings = ProcessGroupNCCL.Options()
        settings.is_high_priority_stream = True
        settings._timeout = NO_TIMEOUT
        settings.config.min_ctas = 1
        settings.config.max_ctas = options.max_ctas
        try:
            torch.cuda.set_device(options.device)
            self._store.set(f"here {options.side}", b"")
            self._store.wait([f"here {self._peer}"])
            group = ProcessGroupNCCL(self._store, options.side, 2, settings)
            group.eager_connect_single_device(options.device)
        except Exception as error:  # torch's own, or the store's: what its callbacks raise may come through as it is
            self._error = error
            made.set()
            return
        with self._abort_lock:
            is_late = self._is_late
            if not is_late:
                self._group = group
        made.set()
        if is_late:
            group.abort()

    def send(self, data: torch.Tensor) -> Transfer:
        """Start sending."""
        return self._begin("send", data)

    def recv(self, into: torch.Tensor) -> Transfer:
        """Start receiving."""
        return self._begin("recv", into)

    def abort(self) -> None:
        """End what is under way, on a thread of its own; returns at once."""
        with self._abort_lock:
            if self._aborting is None and self._group is not None:
                self._aborting = threading.Thread(target=self._group.abort, name="kv-abort", daemon=True)
                self._aborting.start()

    def close(self) -> None:
        """Abort the group and give it back; NCCL needs about half a second for that, the peer is not waited for."""
        self.abort()
        if self._aborting is not None:
            self._aborting.join(ABORT_S)
            if self._aborting.is_alive():
                _log.error("NCCL did not abort a pair within %g s: its memory is lost", ABORT_S)
        self._group = None

    def _begin(self, verb: str, tensor: torch.Tensor) -> Transfer:
        group = self._group  # the other thread of the pair may close it meanwhile
        if group is None or self._aborting is not None:
            raise TransportError("the data channel is closed")
        try:
            return _NcclTransfer(getattr(group, verb)([tensor], self._peer, 0), tensor)
        except RuntimeError as error:
            raise TransportError(f"nccl: {first_line(error)}") from error
