"""On whose behalf a call is made: by its API key, or, where none are asked for, by what the call says itself."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from router.errors import InvalidArgumentError, RouterStartError
from router.tenant_config import problem_of

DEFAULT_TENANT = "default"
TENANT_METADATA_KEY = "pdserve-tenant"

Metadata = Iterable[tuple[str, Any]] | None


class Tenants:
    """Tells the tenant of a call. Of the keys it keeps digests alone."""

    def __init__(self, tenant_of_digest: dict[bytes, str] | None = None) -> None:
        """None: no key is asked for."""
        self._tenant_of = tenant_of_digest

    @classmethod
    def load(cls, keys_file: str | None) -> Tenants:
        """Read a file of lines `KEY` or `KEY TENANT`; RouterStartError, naming the line, if that is not what it has."""
        if keys_file is None:
            return cls()
        try:
            lines = Path(keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RouterStartError(f"api_keys_file {keys_file} cannot be read: {error}") from error
        tenant_of: dict[bytes, str] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if len(words) > 2:
                what = f"{len(words)} words, expected a key, or a key and the name of its tenant"
                raise RouterStartError(f"api_keys_file {keys_file}, line {number}: {what}")
            if len(words) == 2 and (problem := problem_of(words[1])):
                raise RouterStartError(f"api_keys_file {keys_file}, line {number}: the tenant's name {problem}")
            if words:
                tenant_of[_digest(words[0])] = words[1] if len(words) == 2 else DEFAULT_TENANT
        if not tenant_of:
            raise RouterStartError(f"api_keys_file {keys_file} has no keys; write one a line, or unset it")
        return cls(tenant_of)

    def knows_key(self, metadata: Metadata) -> bool:
        """Whether a call shows a valid key; how long it takes to tell says nothing of the keys."""
        digest = _shown_digest(metadata)
        matches = [hmac.compare_digest(digest, known) for known in self._tenant_of or ()]
        return any(matches)

    def caller(self, metadata: Metadata) -> str:
        """A digest of the key that a call shows; empty: none is asked for."""
        return "" if self._tenant_of is None else _shown_digest(metadata).hex()

    def of(self, metadata: Metadata) -> str:
        """Whose call it is; InvalidArgumentError if it names a tenant in a way that is none."""
        if self._tenant_of is not None:
            return self._tenant_of.get(_shown_digest(metadata), DEFAULT_TENANT)
        for name, value in metadata or ():
            if name == TENANT_METADATA_KEY:
                if problem := problem_of(str(value)):
                    raise InvalidArgumentError(f"metadata {TENANT_METADATA_KEY} {problem}", field=TENANT_METADATA_KEY)
                return str(value)
        return DEFAULT_TENANT


def _shown_digest(metadata: Metadata) -> bytes:
    shown = [value for name, value in metadata or () if name == "authorization"]
    scheme, _, key = str(shown[0]).partition(" ") if shown else ("", "", "")
    return _digest(key.strip() if scheme.lower() == "bearer" else "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
