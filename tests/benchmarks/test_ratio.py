"""The ratio benchmark: its loads and what a budget keeps of them, its tables and words, and two small clusters."""

import io
import json

import pytest

from benchmarks import ratio
from benchmarks.ratio_options import Case, Load, Part, arguments_of, cases_of, default_loads, fitting
from benchmarks.ratio_report import (
    answer_rows,
    cells_of,
    first_divergence,
    goodput,
    kept_bounds,
    parts_json,
    share_kept,
    show,
    verdict,
)
from benchmarks.serve_clients import AnswersJob, ClientResult, Clients, LoadJob
from benchmarks.serve_report import Document
from cluster.load import LoadResult, RequestRecord
from cluster.load_report import Slo
from protos.inference_pb2 import Finished, Usage
from tests.cluster.inference_double import VOCAB_SIZE, Double
from tests.cluster.inference_double import serve as serve_double

SLO = Slo(ttft_s=0.2, itl_s=0.05)
MODEL = "deploy/examples/rehearsal-model"


def record(ttft_s, gaps, prompt_tokens=512, failure=None):
    arrivals, at = [(ttft_s, 1)], ttft_s
    for gap in gaps:
        arrivals.append((at := at + gap, 1))
    finished = None if failure else Finished(usage=Usage(prompt_tokens=prompt_tokens))
    return RequestRecord(0.0, 0.0, arrivals, at, finished, failure)


def run_of(load, rate, shape, *, ttfts, itl=0.01, repeat=1, itl_p99=0.02):
    spread = {"p50": sorted(ttfts)[len(ttfts) // 2], "p99": max(ttfts), "max": max(ttfts)}
    itls = {"p50": itl, "p99": itl_p99, "max": itl_p99}
    report = {
        "num_requests": len(ttfts), "num_completed": len(ttfts), "failures": {}, "wall_s": 10.0, "ttft_s": spread,
        "tpot_s": itls, "itl_s": itls, "output_tokens_per_s": 100.0, "hidden_transfer_share": None,
    }  # fmt: skip
    return {
        "load": load, "rate": rate, "shape": shape, "repeat": repeat, "report": report, "second_token_s": itls,
        "local_share": 0.0, "client_lag_s": itls, "parts": [], "requests": [[ttft, itl] for ttft in ttfts],
    }  # fmt: skip


def data_of(runs, shapes=(("2colocated", 2), ("1p1d", 2))):
    return {
        "loads": [{"name": "short", "title": "short 512→256"}],
        "shapes": [{"shape": name, "num_gpus": num} for name, num in shapes],
        "runs": runs,
        "spread": 0.25,
        "seconds": 10.0,
    }


class TestLoads:
    def test_one_kind_and_a_mix(self):
        assert Load.parse("chat=512:256@8+24.5") == Load("chat", (Part(512, 256),), (8.0, 24.5))
        mix = Load.parse("mix=512:256*3+8192:128@4")
        assert mix.parts == (Part(512, 256, 3), Part(8192, 128))
        assert (mix.title, mix.prompt_len, mix.longest_answer) == ("mix 75% 512→256 + 25% 8,192→128", 2432, 256)
        profiles = mix.profiles(4.0, 30.0, 0.25, seed=5)
        assert [(each.rate, each.input_len.mean, each.input_len.spread) for each in profiles] == [
            (3.0, 512, 128),
            (1.0, 8192, 2048),
        ]
        assert len({each.seed for each in profiles}) == 2

    @pytest.mark.parametrize("text", ["", "512:256@8", "a=512@8", "a=512:256", "a=512:256@", "a=0:2@8", "a=1:2@0"])
    def test_what_is_none_is_refused(self, text):
        with pytest.raises(ValueError):
            Load.parse(text)

    def test_the_default_grows_with_the_gpus(self):
        two, four = default_loads(2), default_loads(4)
        assert [load.name for load in two] == ["short", "medium", "long", "mix"]
        assert [tuple(2 * rate for rate in load.rates) for load in two[1:]] == [load.rates for load in four[1:]]
        assert (two[0].rates, four[0].rates) == ((24, 40, 8), (48, 62.5, 16))  # one router is not what is measured

    def test_what_a_budget_drops(self):
        loads = [Load.parse("a=64:8@1+2"), Load.parse("b=64:8@3")]
        cases = cases_of(loads, repeats=2)
        assert [(case.load.name, case.rate, case.repeat) for case in cases] == [
            ("a", 1, 1), ("b", 3, 1), ("a", 2, 1), ("a", 1, 2), ("b", 3, 2), ("a", 2, 2),
        ]  # fmt: skip
        assert len({case.seed for case in cases}) == len(cases)
        assert fitting(cases, 2, 50.0, 30.0, 1e9) == cases
        seconds = cases[0].seconds(30.0)
        assert fitting(cases, 2, 50.0, 30.0, 2 * (50.0 + 3 * seconds) + 1) == cases[:3]
        assert fitting(cases, 2, 50.0, 30.0, 60.0) == []


class TestOptions:
    def test_defaults_by_the_machine(self):
        two, four = arguments_of([], "", 2), arguments_of([], "", 4)
        assert [shape.name for shape in two.shapes] == ["2colocated", "1p1d"]
        assert [shape.name for shape in four.shapes] == ["4colocated", "1p3d", "2p2d", "3p1d", "tp2p-2d", "2p-tp2d"]
        assert {shape.num_gpus for shape in four.shapes} == {4}
        assert max(max(load.rates) for load in four.loads) == 62.5

    def test_a_selection(self):
        arguments = arguments_of(["--only", "long,mix", "--ttft-slo", "300", "--itl-slo", "20"], "", 2)
        assert [load.name for load in arguments.loads] == ["long", "mix"]
        assert (arguments.slo_ttft_ms, arguments.slo_itl_ms) == (300.0, 20.0)

    @pytest.mark.parametrize(
        "wrong", [["--shapes", "1p"], ["--load", "x"], ["--only", "none"], ["--load", "a=1:1@1", "--load", "a=2:2@1"]]
    )
    def test_wrong_usage_exits_with_2(self, wrong, capsys):
        with pytest.raises(SystemExit) as caught:
            arguments_of(wrong, "", 2)
        assert caught.value.code == 2


class TestGoodput:
    def test_bounds_decide_as_the_slo_does(self):
        records = [
            record(0.1, [0.01] * 9),
            record(0.1, [0.01] * 99 + [0.2]),
            record(0.1, [0.01] * 98 + [0.2, 0.2]),
            record(0.3, [0.01] * 9),
            record(0.1, []),
        ]
        for each in records:
            ttft, itl = kept_bounds(each)
            assert (ttft <= SLO.ttft_s and itl <= SLO.itl_s) == SLO.kept_by(each)
        assert kept_bounds(record(0.1, [0.01], failure="UNFINISHED")) is None

    def test_of_a_run(self):
        run = run_of("short", 1.0, "1p1d", ttfts=[0.1, 0.1, 0.3, 0.1])
        assert (share_kept(run, SLO), goodput(run, SLO)) == (0.75, pytest.approx(0.3))
        assert share_kept(run, Slo(ttft_s=0.4, itl_s=0.005)) == 0.0
        run["report"]["num_requests"] = 8
        assert share_kept(run, SLO) == pytest.approx(3 / 8)

    def test_parts_of_a_mix(self):
        result = ClientResult(LoadResult("m", [record(0.1, [0.01], 400), record(0.5, [0.02], 9000)], 1.0), [])
        short, long = parts_json(result, (512, 8192))
        assert (short["count"], short["ttft_s"]["p50"]) == (1, pytest.approx(0.1))
        assert (long["count"], long["itl_s"]["p99"]) == (1, pytest.approx(0.02))
        assert parts_json(result, (512,)) == []


class TestWinners:
    def test_the_words_and_tables(self):
        runs = [
            run_of("short", 1.0, "1p1d", ttfts=[0.1] * 10, itl_p99=0.004),
            run_of("short", 1.0, "2colocated", ttfts=[0.1] * 10, itl_p99=0.040),
            run_of("short", 4.0, "1p1d", ttfts=[0.1] * 40),
            run_of("short", 4.0, "2colocated", ttfts=[0.1] * 20 + [0.5] * 20),
        ]
        data = data_of(runs)
        stream = io.StringIO()
        show(data, SLO, Document(None, stream))
        text = stream.getvalue()
        assert "| short | 1 | 2colocated = 1p1d 1.00 |" in text
        assert "1p1d **4.0** (2colocated 40.0, 10.0 times)" in text
        assert "1p1d **4.00** (2colocated 2.00, +100%)" in text
        assert "Most goodput of any rate: 1p1d, 4.00/s (at 4/s); 2colocated 2.00/s (at 4/s), +100%." in text
        assert "keep TTFT ≤ 200 ms, 99 % of its ITLs ≤ 50 ms: 2colocated 1/s, 1p1d 4/s." in text

    def test_repeats_are_one_cell_and_only_as_many_gpus_are_compared(self):
        runs = [
            run_of("short", 1.0, "1p1d", ttfts=[0.1], repeat=1),
            run_of("short", 1.0, "1p1d", ttfts=[0.3], repeat=2),
            run_of("short", 1.0, "1colocated", ttfts=[0.4]),
        ]
        cells = cells_of(data_of(runs, (("1p1d", 2), ("1colocated", 1))), SLO)
        assert [(cell.shape, cell.share, cell.ttft_p50) for cell in cells] == [
            ("1p1d", 0.5, pytest.approx(0.2)),
            ("1colocated", 0.0, 0.4),
        ]
        words = verdict("short", cells, SLO)
        assert "1p1d, 0.05/s (at 1/s). The others: 1colocated 0.00." in words
        assert words.endswith("1p1d none, 1colocated none.")
        assert verdict("short", [], SLO) == ""

    def test_a_shape_nobody_was_answered_in(self):
        run = run_of("short", 1.0, "1p1d", ttfts=[0.1])
        run["requests"], run["report"]["ttft_s"], run["report"]["itl_s"] = [], None, None
        stream = io.StringIO()
        show(data_of([run]), SLO, Document(None, stream))
        assert "1p1d, 0.00/s" in stream.getvalue()


class TestAnswers:
    def test_where_they_part(self):
        assert first_divergence([1, 2, 3], [1, 2, 3]) is None
        assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
        assert first_divergence([1, 2], [1, 2, 3]) == 2

    def test_beside_the_colocated_ones(self):
        shapes = [
            {"shape": "1p1d", "answers": [[1, 2], [3, 4], [5, 6]], "handed_over": 3},
            {"shape": "2colocated", "answers": [[1, 2], [3, 9], [0, 6]], "handed_over": 0},
            {"shape": "3p1d"},
        ]
        assert answer_rows(shapes) == [["1p1d", "2colocated", "3 of 2 tokens", "1", "0 / 0.5", "3"]]
        assert answer_rows([]) == []

    def test_clients_ask_for_them_and_send_mixes(self):
        first, second = Load.parse("mix=20:3*3+60:5@40").profiles(40.0, 1.0, 0.0, seed=3)
        with serve_double(Double()) as double, Clients(2) as clients:
            job = AnswersJob(address=double.address, prompt_lens=(5, 9), output_len=4, limit_s=10.0, seed=1)
            answers, again = clients.answers(job), clients.answers(job)
            load = LoadJob(address=double.address, profile=first, beside=(second,), limit_s=10.0)
            records = clients.load(load).load.records
            prompts = [list(request.token_ids.ids) for request in double.requests[:2]]
        assert answers == again
        starts = [sum(prompt) % VOCAB_SIZE for prompt in prompts]
        assert [answer.tokens[0] for answer in answers] == starts
        assert [len(answer.tokens) for answer in answers] == [4, 4]
        assert {each.num_tokens for each in records} == {3, 5}
        assert [each.due_s for each in records] == sorted(each.due_s for each in records)
        assert sum(each.num_tokens == 3 for each in records) > sum(each.num_tokens == 5 for each in records)


def test_a_shape_that_is_too_large_or_for_which_there_is_no_time_is_dropped(tmp_path, capsys):
    path = tmp_path / "r.json"
    options = ["--shapes", "1p1d", "--device", "cpu", "--model", MODEL, "--load", "a=64:8@1", "--budget-s", "3"]
    assert ratio.main([*options, "--no-ceilings", "--json", str(path)]) == 0
    dropped = json.loads(path.read_text())["dropped"]
    assert dropped[0] == "of every shape, for want of time: a at 1/s, run 1"
    assert dropped[1].startswith("1p1d: 47 s needed, 3 s left for it")
    assert "Dropped: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.cluster
def test_two_shapes_under_one_load(tmp_path, capsys):
    """The whole of it on CPUs, over gloo; then once more from its file, for a stricter SLO."""
    path = tmp_path / "r.json"
    options = "--shapes 1colocated,1p1d --load tiny=64:8@4 --seconds 2 --warmup-s 0 --tail-s 20 --answers 2"
    options += " --answer-len 8 --answer-prompts 40:30 --no-ceilings --set cache.num_blocks=256 --ttft-slo 20000"
    options += " --set cache.block_size=16 --set decode.max_running=8 --set prefill.max_running=8 --itl-slo 20000"
    assert ratio.main([*options.split(), "--device", "cpu", "--model", MODEL, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    colocated, split = found["runs"]
    assert (colocated["shape"], split["shape"]) == ("1colocated", "1p1d")
    for run in found["runs"]:
        report = run["report"]
        assert report["num_requests"] == report["num_completed"] == len(run["requests"]) > 0
    assert split["report"]["num_requests"] == colocated["report"]["num_requests"]
    assert split["report"]["transfer_bytes"] > 0
    assert [shape["handed_over"] for shape in found["shapes"]] == [0, 2]
    assert found["shapes"][0]["answers"] == found["shapes"][1]["answers"]
    assert [shape["errors"] for shape in found["shapes"]] == [[], []]
    out = capsys.readouterr().out
    assert "| tiny | 4 | 1p1d | 1 |" in out
    assert "| 1p1d | 1colocated | 2 of 8 tokens | 2 | – | 2 |" in out
    assert "100.0%" in out
    assert ratio.main(["--from", str(path), "--ttft-slo", "0.001"]) == 0
    again = capsys.readouterr().out
    assert "TTFT ≤ 0.001 ms" in again
    assert "100.0%" not in again


def test_a_case_says_how_long_it_takes():
    assert Case(Load.parse("a=64:500@1"), 1.0, 1).seconds(30.0) == pytest.approx(42.0)
