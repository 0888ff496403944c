"""Gloo as a data channel: a two-rank process group for each pair, over CPU memory and TCP.

A gloo receive whose peer is stopped is woken by nothing but its timeout, so every wait has one.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Work

from kv_transfer.errors import TransportError
from kv_transfer.transport import ChannelOptions, Transfer
from protos.rendezvous import Rendezvous, first_line


class _GlooTransfer:
    """A gloo send or receive; keeps its tensor alive."""

    def __init__(self, work: Work, tensor: torch.Tensor, timeout: timedelta) -> None:
        self._work = work
        self._tensor = tensor
        self._timeout = timeout

    def wait(self) -> None:
        """Return when the transfer is done."""
        try:
            self._work.wait(self._timeout)
        except RuntimeError as error:
            raise TransportError(f"gloo: {first_line(error)}") from error


class GlooTransport:
    """One end of a pair's process group."""

    def __init__(self, options: ChannelOptions, store: Rendezvous) -> None:
        self._peer = 1 - options.side
        self._timeout = timedelta(seconds=options.transfer_timeout_s)
        self._store = store
        group_options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        group_options._threads = 1
        group_options._timeout = timedelta(seconds=options.connect_timeout_s)
        try:
            group_options._devices = [ProcessGroupGloo.create_device(hostname=options.host)]
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(store, options.side, 2, group_options)
        except RuntimeError as error:
            raise TransportError(f"gloo could not connect: {first_line(error)}") from error

    def send(self, data: torch.Tensor) -> Transfer:
        """Start sending."""
        try:
            work = self._open().send([data], self._peer, 0)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise TransportError(f"gloo: {first_line(error)}") from error
        return _GlooTransfer(work, data, self._timeout)

    def recv(self, into: torch.Tensor) -> Transfer:
        """Start receiving."""
        try:
            work = self._open().recv([into], self._peer, 0)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise TransportError(f"gloo: {first_line(error)}") from error
        return _GlooTransfer(work, into, self._timeout)

    def abort(self) -> None:
        """Nothing wakes gloo early; its waits end with the timeout."""

    def close(self) -> None:
        """Close the connections; the other end sees it at once."""
        self._group = None

    def _open(self) -> ProcessGroupGloo:
        if self._group is None:
            raise TransportError("the data channel is closed")
        return self._group
