"""What a person sees of a model that is being loaded."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.commands.load_bars import LINE_EVERY_S, LoadBars

GB = 1_000_000_000


def test_a_line_now_and_then_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with LoadBars(Console(force_terminal=False), lambda: now) as bars:
        for seconds, engine, done in [
            (0.0, "prefill-0", 0),
            (5.0, "decode-0", 0),
            (LINE_EVERY_S, "prefill-0", 2 * GB),
            (LINE_EVERY_S + 1, "prefill-0", 3 * GB),
            (LINE_EVERY_S + 6, "decode-0", GB),
            (2 * LINE_EVERY_S, "prefill-0", 7 * GB),
            (3 * LINE_EVERY_S, "prefill-0", 8 * GB),
        ]:
            now = seconds
            bars.show(engine, done, 8 * GB)
    assert capsys.readouterr().out.splitlines() == [
        "  ... prefill-0 has loaded 2.0 of 8.0 GB",
        "  ... decode-0 has loaded 1.0 of 8.0 GB",
        "  ... prefill-0 has loaded 7.0 of 8.0 GB",
    ]


def test_a_bar_for_each_engine_in_a_terminal() -> None:
    screen = io.StringIO()
    with LoadBars(Console(file=screen, force_terminal=True, width=100)) as bars:
        bars.show("prefill-0", 0, 8 * GB)
        bars.show("decode-0", GB, 8 * GB)
        bars.show("prefill-0", 6 * GB, 8 * GB)
    last = screen.getvalue().rpartition("prefill-0")[2]
    assert "6.0/8.0 GB" in last
    assert "decode-0" in last
    assert "1.0/8.0 GB" in last


def test_lines_go_above_the_bars(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    with LoadBars(Console(file=screen, force_terminal=True, width=40)) as bars:
        bars.line("  ok  before the first bar")
        bars.show("prefill-0", 0, 8 * GB)
        bars.line("  ok  [decode-0] at 127.0.0.1:40001, a long line (3.0 s)")
    assert capsys.readouterr().out == "  ok  before the first bar\n"
    assert "  ok  [decode-0] at 127.0.0.1:40001, a long line (3.0 s)\n" in screen.getvalue()
