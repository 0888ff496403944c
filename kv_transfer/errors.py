"""Errors of the transfer.

TransferError
├── TicketError               a grant that cannot be kept: wrong blocks, a name used twice
├── PairError                 one pair cannot be made, or cannot go on; other pairs are untouched
│   ├── PairRefusedError          the receiver says no: epoch, layout, version, transport or secret differ
│   ├── PeerLostError             the other end is gone or silent
│   └── ProtocolError             the other end said something that the protocol does not know
├── TransportError            the data channel failed; a pair turns it into the loss of its peer
└── TransferIntegrityError    an invariant is broken: a defect
"""

from __future__ import annotations


class TransferError(Exception):
    """Base of all transfer errors."""


class TicketError(TransferError):
    """A grant that cannot be kept: wrong blocks, a name used twice."""


class PairError(TransferError):
    """One pair cannot be made, or cannot go on; other pairs are untouched."""


class PairRefusedError(PairError):
    """One end says no: epoch, layout, version, transport or secret differ."""


class PeerLostError(PairError):
    """The other end is gone or silent."""


class ProtocolError(PairError):
    """The other end said something that the protocol does not know."""


class TransportError(TransferError):
    """The data channel failed."""


class TransferIntegrityError(TransferError):
    """An invariant of the transfer is broken: a defect, never a user's mistake."""
