"""Keys derived from the cluster secret, so that the secret itself never travels."""

from __future__ import annotations

import hashlib
import hmac

WORKER_METADATA_KEY = "pdserve-worker-key"
"""gRPC metadata entry that a router sends with each call to a worker."""


def derive_key(secret: bytes, purpose: str) -> str:
    """A hexadecimal key for one purpose (HMAC-SHA256 of the purpose with the cluster secret)."""
    return hmac.new(secret, purpose.encode(), hashlib.sha256).hexdigest()


def worker_key(secret: bytes) -> str:
    """What a router shows a worker."""
    return derive_key(secret, "pdserve worker grpc v1")


def same_key(shown: str, expected: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(shown.encode(), expected.encode())
