"""A file's content is watched, not its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.commands import file_watch
from cluster.commands.file_watch import FileWatch


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(file_watch, "time", clock)
    return clock


def test_a_change_counts_once_it_has_stood(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "f"
    file.write_text("a")
    watch = FileWatch(file)
    clock.now = 10.0
    assert not watch.has_changed()
    file.write_text("")  # an editor that is writing still
    assert not watch.has_changed()
    clock.now += FileWatch.SETTLE_S / 2
    file.write_text("b")
    assert not watch.has_changed()
    clock.now += FileWatch.SETTLE_S
    assert watch.has_changed()
    assert watch.has_changed()
    watch.note()
    assert not watch.has_changed()


def test_a_change_back_is_none(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "f"
    file.write_text("a")
    watch = FileWatch(file)
    file.write_text("b")
    assert not watch.has_changed()
    file.write_text("a")
    clock.now += 1.0
    assert not watch.has_changed()
    clock.now += 1.0
    assert not watch.has_changed()


def test_a_file_may_come_and_go(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "f"
    watch = FileWatch(file)
    file.write_text("a")
    assert not watch.has_changed()
    clock.now += 1.0
    assert watch.has_changed()
    watch.note()
    file.unlink()
    assert not watch.has_changed()
    clock.now += 1.0
    assert watch.has_changed()
