import json
import random

import numpy as np
import pytest

from cluster.load import LoadResult, RequestRecord
from cluster.load_report import Slo, Spread, markdown_table, percentile, rows, summarise
from protos.inference_pb2 import Finished, Timing, Usage


def record(due_s=0.0, ttft_s=0.1, gaps_s=(0.01, 0.01), failure=None, **timing):
    arrivals, at_s = [(due_s + ttft_s, 1)], due_s + ttft_s
    for gap_s in gaps_s:
        at_s += gap_s
        arrivals.append((at_s, 1))
    finished = Finished(
        timing=Timing(**timing),
        usage=Usage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=len(arrivals)),
    )
    return RequestRecord(
        due_s,
        sent_s=due_s + 0.001,
        arrivals=arrivals,
        ended_s=at_s + 0.001,
        finished=None if failure else finished,
        failure=failure,
        failure_message=f"{failure} at {due_s:g} s" if failure else "",
    )


def report(*records, wall_s=2.0, slo=None):
    return summarise(LoadResult("model", list(records), wall_s), slo or Slo())


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count):
    rng = random.Random(count)
    values = sorted(rng.random() for _ in range(count))
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_spread_of_nothing_is_none():
    assert Spread.of([]) is None


def test_latencies_count_from_due():
    figures = report(record(due_s=5.0, ttft_s=0.3, gaps_s=(0.1, 0.3)))
    assert figures.ttft_s.p50 == pytest.approx(0.3)
    assert figures.itl_s.max == pytest.approx(0.3)
    assert figures.tpot_s.p50 == pytest.approx(0.2)
    assert figures.e2e_s.p50 == pytest.approx(0.701)
    assert figures.send_lag_s.p50 == pytest.approx(0.001)


def test_tpot_is_a_mean_per_request_and_itl_is_over_all_gaps():
    figures = report(record(gaps_s=(0.1,)), record(gaps_s=(0.2, 0.2, 0.2)))
    assert figures.tpot_s.mean == pytest.approx(0.15)
    assert figures.itl_s.mean == pytest.approx(0.175)


def test_failures_count_by_status_and_add_nothing_else():
    lost = [record(1.0, failure="UNAVAILABLE"), record(2.0, failure="UNAVAILABLE"), record(3.0, failure="CANCELLED")]
    figures = report(record(), *lost)
    assert figures.failures == {"UNAVAILABLE": 2, "CANCELLED": 1}
    assert figures.failure_messages == {"UNAVAILABLE": "UNAVAILABLE at 1 s", "CANCELLED": "CANCELLED at 3 s"}
    assert (figures.num_requests, figures.num_completed) == (4, 1)
    assert figures.requests_per_s == 0.5
    assert figures.output_tokens_per_s == 1.5
    assert figures.prompt_tokens_per_s == 5.0
    assert figures.cached_share == pytest.approx(0.4)


def test_goodput_keeps_both_bounds():
    slo = Slo(ttft_s=0.2, itl_s=0.05)
    records = (
        record(),
        record(ttft_s=0.21),
        record(gaps_s=(0.01, 0.06)),
        record(failure="DEADLINE_EXCEEDED"),
    )
    assert report(*records, slo=slo).goodput_per_s == 0.5
    assert report(*records, slo=Slo(ttft_s=0.2)).goodput_per_s == 1.0
    assert report(*records).goodput_per_s == 1.5


def test_one_slow_gap_in_two_hundred_is_forgiven():
    slo = Slo(itl_s=0.05)
    assert slo.kept_by(record(gaps_s=[0.01] * 199 + [0.06]))
    assert not slo.kept_by(record(gaps_s=[0.01] * 50 + [0.06]))
    assert slo.kept_by(record(gaps_s=()))


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_an_slo_is_positive(bound):
    with pytest.raises(ValueError, match="itl_s must be more than 0"):
        Slo(itl_s=bound)


def test_the_hidden_share_weighs_requests_by_their_transfer():
    figures = report(
        record(transfer_s=0.01, transfer_busy_s=0.01, transfer_bytes=1),
        record(transfer_s=0.0, transfer_busy_s=0.03, transfer_bytes=2),
    )
    assert figures.hidden_transfer_share == pytest.approx(0.75)
    assert figures.transfer_bytes == 3


def test_without_a_transfer_no_share_is_claimed():
    figures = report(record(prefill_s=0.2), record(prefill_s=0.4))
    assert figures.hidden_transfer_share is None
    assert figures.phases_s["prefill"] == pytest.approx(0.3)
    assert "transfer hidden behind prefill" not in dict(rows(figures))


@pytest.mark.parametrize("paced", [False, True])
def test_figures_of_paced_workers_say_so(paced):
    figures = summarise(LoadResult("model", [record()], 2.0, paced), Slo())
    assert figures.as_json()["paced"] is paced
    assert dict(rows(figures)).get("workers") == ("paced: a rehearsal, not a measurement" if paced else None)


def test_a_report_of_nothing():
    figures = report(record(failure="UNAVAILABLE"))
    assert dict(rows(figures))["TTFT p50 / p90 / p99, ms"] == "–"
    assert figures.cached_share == 0.0
    assert json.loads(json.dumps(figures.as_json()))["ttft_s"] is None


def test_markdown_has_a_column_per_report_and_a_dash_where_one_lacks_a_figure():
    split = report(record(transfer_busy_s=0.01, transfer_bytes=1 << 20))
    table = markdown_table({"split": split, "colocated": report(record())}).splitlines()
    assert table[:2] == ["| | split | colocated |", "|---|---:|---:|"]
    assert "| transfer hidden behind prefill | 100% | – |" in table
    assert "| KV transferred, MiB | 1.0 | – |" in table
    assert {line.count("|") for line in table} == {4}
