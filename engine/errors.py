"""Errors of the engine.

EngineError
├── InvalidRequestError      the request can never be served; names the field
├── CapacityError            no room now; trying again later may help
├── ModelError               the model cannot be used
│   ├── ModelNotFoundError       no such file or directory, or files are missing in it
│   ├── BrokenModelError         a truncated or malformed file
│   └── UnsupportedModelError    an architecture or feature this engine does not have
├── RankLostError            another rank of this worker is gone, silent or failed: the worker's epoch is over
└── IntegrityError           an invariant of the engine is broken: a defect
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all engine errors."""


class InvalidRequestError(EngineError):
    """The request can never be served; `field` names what is wrong with it."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class CapacityError(EngineError):
    """No room now; trying again after `retry_after_s` may help."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(EngineError):
    """The model cannot be used."""


class ModelNotFoundError(ModelError):
    """No such file or directory, or files are missing in it."""


class BrokenModelError(ModelError):
    """A truncated or malformed file."""


class UnsupportedModelError(ModelError):
    """An architecture or feature this engine does not have."""


class RankLostError(EngineError):
    """Another rank of this worker is gone, silent or failed: the worker's epoch is over, and all ranks start again."""


class IntegrityError(EngineError):
    """An invariant of the engine is broken: a defect, never a user's mistake."""
