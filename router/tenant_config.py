"""What a user may set about a tenant."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TENANT_CHARS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantConfig:
    """What a tenant may have while others want it too."""

    weight: float = 1.0
    """Its share, in tokens, relative to the weights of the others that wait; one that is not listed has 1."""
    max_queued: int | None = None
    """Requests of it that may wait for a place on a worker; default: as many as of all together (max_queued)."""

    def __post_init__(self) -> None:
        if not 0.001 <= self.weight <= 1000:
            raise ValueError(f"weight must be between 0.001 and 1000, got {self.weight}")
        if self.max_queued is not None and self.max_queued < 0:
            raise ValueError(f"max_queued must be at least 0, got {self.max_queued}")


def problem_of(name: str) -> str:
    """What is wrong with a tenant's name; empty if nothing is."""
    if not 1 <= len(name) <= MAX_TENANT_CHARS:
        return f"must have 1 to {MAX_TENANT_CHARS} characters, got {len(name)}"
    return "" if name.isprintable() and " " not in name else "must have printable characters without spaces only"
