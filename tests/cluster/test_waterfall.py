import pytest

from cluster.waterfall import PHASES, format_seconds, hidden_share, waterfall
from protos.inference_pb2 import Finished, Timing, Usage


def test_bars_follow_one_another():
    timing = Timing(queue_s=1, prefill_s=2, transfer_s=0, first_decode_step_s=1, decode_s=4)
    lines = waterfall(Finished(timing=timing), width=8).splitlines()
    bars = [line[20:29].rstrip() for line in lines[: len(PHASES)]]
    assert bars == ["█", " ██", "   ▏", "   █", "    ████"]


def test_an_empty_timing_is_drawn():
    assert len(waterfall(Finished()).splitlines()) == len(PHASES) + 1


def test_totals():
    finished = Finished(
        timing=Timing(ttft_s=0.0123, total_s=1.5, transfer_s=0.001, transfer_busy_s=0.01, transfer_bytes=3 << 20),
        usage=Usage(prompt_tokens=7, cached_prompt_tokens=5, completion_tokens=2),
        prefill_worker="p/1",
        decode_worker="d/2",
    )
    totals, places = waterfall(finished).splitlines()[-2:]
    assert totals.strip() == "first token 12.3 ms · total 1.50 s · 7 tokens in (5 cached), 2 out"
    assert places.strip() == "KV 3.0 MiB, 90% of its transfer hidden · p/1 → d/2"


def test_one_worker_is_named_once():
    finished = Finished(prefill_worker="w/1", decode_worker="w/1")
    assert waterfall(finished).endswith("\n  w/1")


def test_why_these_workers_is_told_where_it_is_known():
    finished = Finished(prefill_worker="p/1", decode_worker="d/1", route="kv_aware: split")
    assert waterfall(finished).endswith("\n  p/1 → d/1\n  route: kv_aware: split")


@pytest.mark.parametrize(
    ("tail", "busy", "share"), [(0.0, 2.0, 1.0), (1.0, 2.0, 0.5), (3.0, 2.0, 0.0), (0.0, 0.0, None)]
)
def test_hidden_share(tail, busy, share):
    assert hidden_share(tail, busy) == share


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.04567, "45.7 ms"),
        (0.09999, "100 ms"),
        (0.2345, "234 ms"),
        (0.9999, "1.00 s"),
        (12.3, "12.30 s"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text
