"""The benchmark of KV transfer on a CPU: that it runs, what it writes, and its arithmetic."""

import json
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from benchmarks.transfer import arguments_of, main, plan_of
from benchmarks.transfer_load import _row as load_row
from benchmarks.transfer_plan import CPU, GPU, Cell, grid
from benchmarks.transfer_report import median_and_p90
from benchmarks.transfer_rig import Remote, Rig, RigError
from benchmarks.transfer_router import Times
from benchmarks.transfer_router import _row as handover_row
from benchmarks.transfer_tickets import Pace


def test_it_runs_and_writes_what_it_measured(tmp_path, capfd):
    file = tmp_path / "result.json"
    main(["--device", "cpu", "--repeats", "2", "--checks", "2", "--cell-s", "0.05", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["failures"] == []
    assert set(result) == {"about", "devices", "ceiling", "pair", "decode-load", "hand-over", "failures"}
    assert "--device cpu" in result["about"]["command"]
    assert result["about"]["sender"]["torch"] == result["about"]["receiver"]["torch"]
    assert [(row["ctas"], row["mib"]) for row in result["ceiling"]] == [(4, 1), (4, 4)]
    assert all(row["gb_s"] > 0 and len(row["us"]) == 2 for row in result["ceiling"])
    for row, cell in zip(result["pair"], CPU.pair_cells, strict=True):
        assert (row["ctas"], row["piece_mib"], row["digest"]) == (cell.ctas, cell.piece_mib, cell.digest)
        assert row["ratio"] == pytest.approx(max(row["gb_s"]) / row["channel_gb_s"])
        assert 0 < row["mean_piece_mib"] <= cell.piece_mib
    loads = result["decode-load"]
    assert [row["load"] for row in loads] == ["paced", "full", "paced", "full"]
    assert all(row["base_mean_ms"] > 0 and row["mean_ms"] > 0 for row in loads)
    assert any(row["gb_s"] > 0 for row in loads)
    lengths = result["hand-over"]["lengths"]
    assert [(row["length"], row["count"]) for row in lengths] == [(24, 2), (200, 2)]
    for row in lengths:
        assert row["ttft_extra_ms"] == pytest.approx(row["split_ms"] - row["alone_ms"])
        assert row["pieces"] >= 1
        assert row["move_ms"] > 0
    together = result["hand-over"]["together"]
    assert (together["count"], together["length"], together["samples"]) == (2, 100, 4)
    assert together["gap_ms"] > 0
    assert result["hand-over"]["answers"] == {"count": 2, "equal": 2, "parted_at": [], "tokens": CPU.check_tokens}
    printed = capfd.readouterr()
    assert all(f"{section}:" in printed.out for section in ("ceiling", "pair", "decode-load", "hand-over"))
    assert "2 of 2 answers of 8 tokens equal one engine's" in printed.out
    assert "engines ready" in printed.err


def test_the_command_line_changes_the_plan():
    plan = plan_of(arguments_of([]), "cuda", Path("/somewhere"))
    assert plan.pair_cells == GPU.pair_cells
    assert (plan.directory, plan.load_rate) == ("/somewhere", 5.6e9)
    changed = ["--ctas", "2,8", "--pieces", "16", "--digests", "all,none", "--rate-gb-s", "3", "--lengths", "99"]
    plan = plan_of(arguments_of(changed), "cuda", Path("/somewhere"))
    assert plan.pair_cells == grid((2, 8), (16,), ("all", "none"))
    assert plan.pair_cells[1] == Cell(ctas=8, piece_mib=16, digest="all")
    assert (plan.ceiling_ctas, plan.ceiling_mib, plan.load_ctas) == ((2, 8), (16,), (2, 8))
    assert (plan.load_rate, plan.lengths) == (3e9, (99,))
    pieces = plan_of(arguments_of(["--ctas", "4"]), "cuda", Path("/")).pair_cells
    assert {cell.piece_mib for cell in pieces} == {8, 32, 64, 128}


def test_sections_run_in_their_order_and_others_are_refused(capsys):
    assert arguments_of(["--sections", "hand-over,ceiling"]).sections == ("ceiling", "hand-over")
    with pytest.raises(SystemExit):
        arguments_of(["--sections", "pair,none"])
    assert "none: sections are" in capsys.readouterr().err


def test_two_gpus_are_needed_where_gpus_are_asked_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit, match="two GPUs are needed, torch sees 1"):
        main([])


def test_the_engine_of_the_plan_holds_everything():
    for plan, block_size in ((GPU, 128), (CPU, 16)):
        blocks = plan.num_blocks(block_size)
        tokens = plan.batch_prompt + plan.load_most_steps
        assert blocks * block_size > plan.batch * tokens + plan.load_tickets * plan.load_tokens
        assert blocks * block_size > 3 * max(plan.lengths)


def test_a_pace_lets_bytes_go_at_its_rate_and_does_not_catch_up_far():
    pace = Pace(1e6)
    began = time.monotonic()
    for _ in range(5):
        pace.wait(10_000)
    assert 0.035 <= time.monotonic() - began < 1.0
    time.sleep(0.2)
    began = time.monotonic()
    for _ in range(5):
        pace.wait(10_000)
    assert time.monotonic() - began >= 0.035


def test_a_phase_is_compared_with_those_around_it():
    before, behind = {"times": [0.010, 0.010]}, {"times": [0.012, 0.012]}
    loaded = {"times": [0.011, 0.011, 0.022], "gb_s": 5.6, "pieces": 4, "bytes": 8 << 20, "context": 1100}
    row = load_row(before, loaded, behind)
    assert row["base_mean_ms"] == pytest.approx(11)
    assert row["slower"] == pytest.approx(1 / 3)
    assert row["median_slower"] == pytest.approx(0)
    assert row["piece_mib"] == pytest.approx(2)


def test_what_is_hidden_is_the_share_of_the_move_that_the_tail_is_not():
    times = Times(alone=[0.1], split=[0.104], reserve=[0.001], gap=[0.007], step=[0.004])
    times.alone_inside, times.split_inside = [0.099], [0.102]
    times.move, times.tail, times.pieces = [0.020], [0.002], [32]
    row = handover_row(8192, times)
    assert row["hidden"] == pytest.approx(0.9)
    assert row["ttft_extra_ms"] == pytest.approx(4)
    assert row["gap_extra_ms"] == pytest.approx(3)
    assert median_and_p90([10, 1, 9, 2, 8, 3, 7, 4, 6, 5]) == (5.5, 9)


class Quiet:
    """A process that is not there."""

    def join(self, timeout=None):
        pass

    def is_alive(self):
        return False

    def close(self):
        pass


@pytest.fixture
def rig():
    """Two remotes that answer: their name to "name", an error to "fail", nothing to "sleep"."""
    remotes, threads = [], []
    for name in ("sender", "receiver"):
        ours, theirs = multiprocessing.Pipe()

        def answer(name=name, theirs=theirs):
            with theirs:
                while (request := theirs.recv()) is not None:
                    method, _ = request
                    if method == "name":
                        theirs.send((False, name))
                    elif method == f"fail-{name}":
                        theirs.send((True, "Traceback: it broke"))

        threads.append(threading.Thread(target=answer))
        threads[-1].start()
        remotes.append(Remote(name, Quiet(), ours))
    yield Rig(*remotes)
    for remote in remotes:
        remote.end()
    for thread in threads:
        thread.join()


def test_both_answer_in_order(rig):
    assert rig.both("name") == ["sender", "receiver"]
    assert rig.receiver.call("name") == "receiver"


def test_a_failure_carries_its_trace_and_the_other_is_not_waited_for_long(rig, monkeypatch):
    monkeypatch.setattr("benchmarks.transfer_rig.AFTER_FAILURE_S", 0.05)
    with pytest.raises(RigError, match="fail-sender failed in the sender:\nTraceback: it broke"):
        rig.both("fail-sender")
    assert rig.sender.call("name") == "sender"
    with pytest.raises(RigError, match="the receiver is not asked for name: it gave no answer for fail-sender"):
        rig.receiver.call("name")


def test_who_does_not_answer_is_not_asked_again(rig):
    with pytest.raises(RigError, match=r"the sender did not answer sleep within 0\.05 s"):
        rig.sender.call("sleep", timeout_s=0.05)
    with pytest.raises(RigError, match="is not asked for name"):
        rig.both("name")
    assert rig.receiver.call("name") == "receiver"
