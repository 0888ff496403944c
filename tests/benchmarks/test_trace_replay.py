"""What the table of a replayed trace says."""

from benchmarks.trace_replay import Figures, table
from cluster.load import LoadResult, RequestRecord
from cluster.load_report import Slo, summarise
from cluster.load_trace import TraceFigures
from protos.inference_pb2 import Finished, Usage


def test_a_row_for_each_policy_and_one_for_what_could_be():
    trace = TraceFigures(
        num_read=10,
        num_requests=1,
        num_families=1,
        num_clipped=0,
        num_dropped=0,
        max_model_len=64,
        prompt_tokens=4000,
        best_cached_share=0.75,
    )
    finished = Finished(usage=Usage(prompt_tokens=4000))
    record = RequestRecord(0.0, arrivals=[(0.1, 1), (0.11, 1)], ended_s=0.2, finished=finished)
    figures = Figures(trace, summarise(LoadResult("m", [record], 1.0), Slo()), 1900, 300)
    lines = table({"kv_aware": figures, "round_robin": figures}).splitlines()
    assert len(lines) == 5
    assert lines[2] == "| kv_aware | 1 of 1 | 4,000 | 1,900 | 300 | 100.0 / 100.0 | 10.0 / 10.0 |"
    assert lines[4].startswith("| a cache that forgets nothing | – | 4,000 | 1,000 |")
