"""Notices that a file has other content, also where a symlink in its path now leads elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar


class FileWatch:
    """Looks at the content itself: a ConfigMap swaps a symlink, an editor a file, and neither says so.

    A change counts once the content has stood for SETTLE_S: an editor may be writing still.
    """

    LOOK_EVERY_S: ClassVar[float] = 0.25
    """Seconds between two looks: with SETTLE_S a change is noticed within a second."""
    SETTLE_S: ClassVar[float] = 0.3

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = self._latest = self._read()
        self._since = time.monotonic()

    def has_changed(self) -> bool:
        """Look; whether its content is another one than noted, and has stood long enough."""
        content = self._read()
        if content != self._latest:
            self._latest, self._since = content, time.monotonic()
        return self._latest != self._known and time.monotonic() - self._since >= self.SETTLE_S

    def note(self) -> None:
        """What was last seen is known now."""
        self._known = self._latest

    def _read(self) -> bytes | None:
        """Its content; None while there is none to read."""
        try:
            return self._file.read_bytes()
        except OSError:
            return None
