"""The serving benchmark: its figures and tables, its client processes, and all of it on a small cluster of the CPU."""

import io
import json
import time

import pytest
import yaml

from benchmarks import serve, serve_probe
from benchmarks.serve_clients import (
    ClientResult,
    Clients,
    LoadJob,
    SequenceJob,
    num_clients,
    second_gap_s,
    steady_gap_s,
)
from benchmarks.serve_cluster import Model, Shape, cluster_yaml, errors_in, log_tails
from benchmarks.serve_figures import LoadFigures, Middle, engine_figures, idle_figures
from benchmarks.serve_options import LoadCase, PromptLen, arguments_of, cases_of
from benchmarks.serve_probes import ceilings_of
from benchmarks.serve_reference import COPY_BYTES_S, LOADED, MATRIX_FLOP_S, Reference
from benchmarks.serve_report import (
    IDLE_COLUMNS,
    LOAD_COLUMNS,
    PHASE_COLUMNS,
    REFERENCE_COLUMNS,
    Document,
    idle_row,
    load_row,
    phase_row,
    reference_rows,
)
from cluster.load import UNFINISHED, Length, LoadProfile, LoadResult, RequestRecord
from cluster.load_report import Slo
from protos.inference_pb2 import Finished, Timing, Usage
from tests.cluster.inference_double import VOCAB_SIZE, Double
from tests.cluster.inference_double import serve as serve_double

HEADER = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """A directory with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("header")
    (folder / "config.json").write_text(json.dumps(HEADER))
    return folder


def record(due_s, first_s, gaps, failure=None):
    """A request whose first token came `first_s` after it was due, and the others after these gaps."""
    at = due_s + first_s
    arrivals = [(at, 1)]
    for gap in gaps:
        at += gap
        arrivals.append((at, 1))
    timing = Timing(queue_s=0.001, prefill_s=0.05, transfer_s=0.002, transfer_busy_s=0.02, transfer_bytes=10**6)
    finished = Finished(usage=Usage(prompt_tokens=2048, completion_tokens=len(arrivals)), timing=timing)
    return RequestRecord(due_s, due_s + 0.001, arrivals, at, None if failure else finished, failure)


def result_of(records, lags=(0.0, 0.001)):
    return ClientResult(LoadResult("m", records, 10.0), list(lags))


def figures_of(records, **names):
    settings = {"shape": "1p1d", "prompt_len": 2048, "rate": 6.0, "repeat": 1, "num_clients": 1} | names
    return LoadFigures.of(result_of(records), Slo(ttft_s=0.2, itl_s=0.05), **settings)


class TestShapes:
    def test_names(self):
        assert Shape.parse("1p3d") == Shape("split", 1, 3)
        assert Shape.parse("4colocated") == Shape("colocated", 0, 4)
        assert [Shape.parse(name).name for name in ("2p1d", "1colocated")] == ["2p1d", "1colocated"]
        assert Shape.parse("1p3d").num_workers == 4

    def test_names_with_ranks(self):
        assert Shape.parse("tp2p-2d") == Shape("split", 1, 2, 2, 1)
        assert Shape.parse("p-tp2d") == Shape("split", 1, 1, 1, 2)
        assert Shape.parse("2tp2colocated") == Shape("colocated", 0, 2, 1, 2)
        for name in ("tp2p-2d", "2p-tp2d", "2tp4p-tp2d", "1tp2colocated"):
            assert Shape.parse(name).name == name
        assert [Shape.parse(name).num_gpus for name in ("tp2p-2d", "p-tp2d", "2tp2colocated", "3p1d")] == [4, 3, 4, 4]

    @pytest.mark.parametrize("name", ["", "1p", "0p1d", "p1d", "colocated", "0colocated", "1p1d1", "tp2p1d", "tp3p-1d"])
    def test_a_name_that_is_none_is_refused(self, name):
        with pytest.raises(ValueError, match="a shape is"):
            Shape.parse(name)

    def test_the_yaml_and_what_overrides_it(self, tmp_path):
        overrides = ("transfer.max_ctas=4", "prefill.max_running=8", "transfer.transport=nccl", "drain_s=1.5")
        model = Model(directory=tmp_path, device="cuda", dtype="bfloat16", num_gpus=2, overrides=overrides)
        split = cluster_yaml(Shape.parse("1p1d"), model)
        assert split["transfer"] == {"max_ctas": 4, "transport": "nccl"}
        assert (split["prefill"]["workers"], split["prefill"]["max_running"], split["drain_s"]) == (1, 8, 1.5)
        assert split["model"]["load_format"] == "dummy"
        assert (split["ray"], split["cache"]) == ({"num_gpus": 2}, {"prefix_caching": False})
        colocated = cluster_yaml(Shape.parse("2colocated"), model)
        assert (colocated["mode"], colocated["decode"]["workers"]) == ("colocated", 2)
        assert "prefill" not in colocated
        ranks = cluster_yaml(Shape.parse("tp2p-2d"), model)
        assert (ranks["prefill"]["tensor_parallel"], ranks["decode"]["tensor_parallel"]) == (2, 1)
        with pytest.raises(ValueError, match=r"key\.key=value"):
            cluster_yaml(Shape.parse("1p1d"), Model(directory=tmp_path, device="cpu", dtype="float32", overrides=["x"]))


class TestOptions:
    def test_the_default_is_the_workload_of_the_reference(self):
        arguments = arguments_of([], "")
        split, colocated = (cases_of(arguments, shape) for shape in arguments.shapes)
        assert [case.rate for case in split] == [1, 6, 12, 18] * 2
        assert [case.rate for case in colocated] == [1, 6, 12, 18, 24] * 2
        assert [case.repeat for case in split] == [1] * 4 + [2] * 4
        assert len({case.seed for case in colocated}) == len(colocated)
        assert set(LOADED["1p1d"]) == {case.rate for case in split}
        assert set(LOADED["2colocated"]) == {case.rate for case in colocated}
        assert arguments.comparable
        assert not arguments_of(["--output-len", "16"], "").comparable

    def test_a_length_may_have_its_own_rates(self):
        arguments = arguments_of(["--prompt-lens", "2048,8192@1+2", "--rates", "6", "--repeats", "1"], "")
        assert arguments.prompt_lens == [PromptLen(2048), PromptLen(8192, (1.0, 2.0))]
        cases = cases_of(arguments, Shape.parse("1p1d"))
        assert cases == [LoadCase(2048, 6.0, 1), LoadCase(8192, 1.0, 1), LoadCase(8192, 2.0, 1)]

    @pytest.mark.parametrize("wrong", [["--phases", "x"], ["--shapes", "1p"], ["--repeats", "0"]])
    def test_wrong_usage_exits_with_2(self, wrong, capsys):
        with pytest.raises(SystemExit) as caught:
            arguments_of(wrong, "")
        assert caught.value.code == 2


class TestFigures:
    def test_gaps_of_a_stream(self):
        one = record(0.0, 0.1, [0.03, 0.01, 0.01, 0.02])
        assert (second_gap_s(one), steady_gap_s(one)) == (pytest.approx(0.03), pytest.approx(0.01))
        assert (second_gap_s(record(0.0, 0.1, [])), steady_gap_s(record(0.0, 0.1, [0.1]))) == (None, None)

    def test_of_a_load(self):
        records = [record(float(i), 0.1, [0.03] + [0.01] * 9) for i in range(10)]
        records.append(record(21.0, 0.3, [0.01] * 10))
        for index, each in enumerate(records):
            each.finished.prefill_worker, each.finished.decode_worker = ("p", "d") if index else ("d", "d")
        records.append(record(12.0, 0.1, [0.01], failure=UNFINISHED))
        figures = figures_of(records)
        assert (figures.num_failed, figures.report.num_completed) == (1, 11)
        assert figures.report.goodput_per_s == pytest.approx(1.0)
        assert figures.second_token_s.p50 == pytest.approx(0.03)
        assert figures.report.ttft_s.max == pytest.approx(0.3)
        assert figures.report.send_lag_s.p99 == pytest.approx(0.001)
        cells = dict(zip(LOAD_COLUMNS, load_row(figures), strict=True))
        assert cells["answered / failed"] == "11 / 1 UNFINISHED"
        assert cells["TTFT p50 / p99"] == "100.0 / 280.0"
        assert cells["of the first 20 s"] == "100.0 / 100.0"
        assert cells["client lag p99 / max"] == "1.0 / 1.0"
        phases = dict(zip(PHASE_COLUMNS, phase_row(figures), strict=True))
        assert (phases["prefill"], phases["transfer hidden"]) == ("50.0", "90.0%")
        assert phases["prefilled locally"] == "9.1%"
        assert json.loads(json.dumps(figures.as_json()))["report"]["num_completed"] == 11

    def test_of_a_load_that_nobody_answered(self):
        figures = figures_of([RequestRecord(0.0, failure="UNAVAILABLE")])
        assert len(load_row(figures)) == len(LOAD_COLUMNS)
        assert len(phase_row(figures)) == len(PHASE_COLUMNS)
        assert reference_rows([figures], COPY_BYTES_S, MATRIX_FLOP_S) == []

    def test_of_an_idle_cluster_over_the_engine_alone(self):
        alone = engine_figures(2048, [[0.04, 0.05, 0.06, 0.07], [0.05, 0.06, 0.07, 0.08], [0.06, 0.07, 0.08, 0.09]])
        assert alone.ttft_s.median == pytest.approx(0.05)
        assert alone.second_over_itl_s == pytest.approx(0.0)
        ours = idle_figures("1p1d", 2048, result_of([record(0.0, 0.053, [0.013, 0.01, 0.01])] * 4))
        cells = dict(zip(IDLE_COLUMNS, idle_row(ours, {2048: alone}), strict=True))
        assert cells["over the engine alone"] == "3.0"
        assert cells["1st→2nd over ITL"] == "3.0"
        assert cells["n / failed"] == "4 / 0"
        assert dict(zip(IDLE_COLUMNS, idle_row(alone, {2048: alone}), strict=True))["over the engine alone"] == "–"
        refused = RequestRecord(0.0, failure="UNAVAILABLE", failure_message="gone")
        failed = idle_figures("1p1d", 2048, result_of([refused]))
        assert idle_row(failed, {2048: alone})[-1] == "0 / 1 (UNAVAILABLE: gone)"

    def test_middle(self):
        assert Middle.of([]) is None
        assert Middle.of([3.0, 1.0, 2.0]) == Middle(2.0, pytest.approx(2.8), 3)


class TestReference:
    def test_scaling(self):
        half = Reference(100, 200, 5, 6, 8, 10).scaled(COPY_BYTES_S / 2, MATRIX_FLOP_S)
        assert half == Reference(100, 200, 10, 12, 16, 20)
        slow = Reference(100, 200, 5, 6, 8, 10).scaled(COPY_BYTES_S, MATRIX_FLOP_S * 2)
        assert slow == Reference(50, 100, 5, 6, 8, 10)

    def test_rows_for_what_both_have(self):
        runs = [figures_of([record(0.0, 0.1, [0.01] * 4)], repeat=repeat) for repeat in (1, 2)]
        runs += [
            figures_of([record(0.0, 0.1, [0.01] * 4)], rate=7.0),
            figures_of([record(0.0, 0.1, [0.01])], shape="1p3d"),
        ]
        rows = reference_rows(runs, COPY_BYTES_S, MATRIX_FLOP_S)
        assert all(len(row) == len(REFERENCE_COLUMNS) for row in rows)
        assert rows[0][:3] == ["1p1d", "6", "vLLM there"]
        assert rows[2][3] == "100.0 / 100.0"
        assert rows[3][3] == "1.05 / 0.40"
        long = figures_of([record(0.0, 0.208, [0.01] * 4)], prompt_len=8192, rate=1.0)
        (row,) = reference_rows([long], COPY_BYTES_S, MATRIX_FLOP_S)
        assert row[3] == "416, 416.0; 208.0; 0.50 (p50)"


class TestDocument:
    def test_tables_grow_and_json_is_whole_after_each_row(self, tmp_path):
        stream, path = io.StringIO(), tmp_path / "r.json"
        document = Document(path, stream)
        document.text("Above.")
        document.row(("a", "b"), ["1", "2"])
        document.data["n"] = 1
        document.save()
        assert json.loads(path.read_text()) == {"n": 1}
        document.row(("a", "b"), ["3", "4"])
        document.row(("c",), ["5"])
        document.text("Below.")
        assert (
            stream.getvalue()
            == "\nAbove.\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n| 3 | 4 |\n\n| c |\n|---|\n| 5 |\n\nBelow.\n"
        )


class TestBudget:
    def test_what_does_not_fit_is_skipped_and_said(self, header, tmp_path, capsys):
        arguments = ["--device", "cpu", "--model", str(header), "--budget-s", "3", "--json", str(tmp_path / "r.json")]
        assert serve.main([*arguments, "--phases", "ceilings,load", "--rates", "1"]) == 0
        out = capsys.readouterr().out
        assert "skipped: ceilings: 20 s needed" in out
        assert "skipped: 1p1d" in out
        assert "skipped: 2colocated" in out
        assert len(json.loads((tmp_path / "r.json").read_text())["notes"]) == 3


def test_a_shape_that_does_not_start_is_said_and_the_others_are_tried(header, tmp_path, capsys):
    path = tmp_path / "r.json"
    arguments = ["--device", "cpu", "--model", str(header), "--phases", "load", "--rates", "1", "--json", str(path)]
    assert serve.main([*arguments, "--set", "decode.thread=1"]) == 1
    notes = json.loads(path.read_text())["notes"]
    assert [note.partition(" failed: ")[0] for note in notes] == ["1p1d", "2colocated"]
    assert all("did you mean `threads`" in note for note in notes)
    assert "s in all" in capsys.readouterr().out


def test_logs_are_told_when_they_cannot_be_looked_at_later(tmp_path):
    lines = [
        {"level": "info", "msg": "fine"},
        {"level": "error", "msg": "it broke", "error": "Traceback\n  x\nOSError: no"},
    ]
    (tmp_path / "engine0.log").write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    (tmp_path / "empty.log").touch()
    assert errors_in(tmp_path) == ["engine0: it broke OSError: no"]
    assert log_tails(tmp_path)[0] == "--- engine0.log"


class TestClients:
    def test_how_many(self):
        assert [num_clients(rate, 32) for rate in (1, 6, 12, 18, 24)] == [1, 1, 2, 3, 4]
        assert num_clients(24, 2) == 1

    def test_processes_share_a_load_and_one_clock(self):
        profile = LoadProfile(rate=60.0, duration_s=1.0, input_len=Length(mean=20), output_len=Length(mean=5), seed=3)
        with serve_double(Double(step_s=0.01)) as double, Clients(2) as clients:
            job = LoadJob(address=double.address, profile=profile, limit_s=10.0)
            result = clients.load(job)
            prompts = {tuple(request.token_ids.ids) for request in double.requests}
            alone = clients.load(job, num=1)
            idle = clients.sequence(
                SequenceJob(address=double.address, prompt_len=7, output_len=4, repeats=3, rest_s=0.01, limit_s=5.0)
            )
        for each in (result, alone):
            assert 35 <= len(each.load.records) <= 90
            assert all(record.failure is None and record.num_tokens == 5 for record in each.load.records)
            assert [r.due_s for r in each.load.records] == sorted(r.due_s for r in each.load.records)
            assert all(record.sent_s >= record.due_s for record in each.load.records)
            assert each.lags_s
            assert 0.9 < each.load.wall_s < 5.0
        assert len(prompts) == len(result.load.records)
        assert all(0 <= token < VOCAB_SIZE for prompt in prompts for token in prompt)
        assert [record.num_tokens for record in idle.load.records] == [4, 4, 4]

    def test_a_server_that_is_not_there(self):
        profile = LoadProfile(rate=1.0, duration_s=1.0)
        with Clients(1) as clients, pytest.raises(RuntimeError, match="no pdserve answers"):
            clients.load(LoadJob(address="127.0.0.1:1", profile=profile, limit_s=1.0))


class TestProbe:
    def test_ceilings_and_engine(self, header, tmp_path):
        file, result = tmp_path / "engine.yaml", tmp_path / "probe.jsonl"
        model = Model(
            directory=header,
            device="cpu",
            dtype="float32",
            overrides=["cache.num_blocks=64", "decode.max_running=4", "cache.block_size=16"],
        )
        file.write_text(yaml.safe_dump(cluster_yaml(Shape.parse("1colocated"), model)))
        options = ["--device", "cpu", "--prompt-lens", "16,40", "--repeats", "2", "--output-len", "4", "--rest-s", "0"]
        serve_probe.main([str(result), "ceilings", f"engine:{file}", *options])
        lines = [json.loads(line) for line in result.read_text().splitlines()]
        assert [line["kind"] for line in lines] == ["ceilings", "engine_start", "engine", "engine"]
        copy, product = ceilings_of(lines)
        assert copy > 0
        assert product > 0
        assert [(line["prompt_len"], [len(each) for each in line["moments"]]) for line in lines[2:]] == [
            (16, [4, 4]),
            (40, [4, 4]),
        ]

    def test_the_slowest_device_counts(self):
        lines = [{"kind": "ceilings", "copy_bytes_s": 4.0, "matrix_flop_s": 7.0}, {"kind": "failed", "message": ""}]
        lines.append({"kind": "ceilings", "copy_bytes_s": 3.0, "matrix_flop_s": 8.0})
        assert ceilings_of(lines) == (3.0, 7.0)
        assert ceilings_of([]) is None


@pytest.mark.slow
@pytest.mark.cluster
def test_a_real_cluster_under_load(header, tmp_path, monkeypatch, capsys):
    """From another directory, by a model that is nothing but a header."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.json"
    options = "--device cpu --phases handover,load --shapes 1p1d --prompt-lens 64 --handover-lens 64"
    options += " --handover-repeats 2 --handover-output-len 8 --rest-s 0 --rates 3 --seconds 2 --repeats 1"
    options += " --output-len 8 --warmup-s 0 --tail-s 20 --set cache.num_blocks=256 --set cache.block_size=16"
    options += " --set decode.max_running=8 --set prefill.max_running=8"
    began = time.monotonic()
    assert serve.main([*options.split(), "--model", str(header), "--json", str(path), "--logs", str(tmp_path)]) == 0
    found = json.loads(path.read_text())
    (shape,), (load,), (idle,) = found["shapes"], found["load"], found["handover"]
    assert load["report"]["num_requests"] == load["report"]["num_completed"] > 0
    assert load["report"]["output_tokens_per_s"] > 0
    assert load["second_token_s"]["count"] == load["report"]["num_completed"]
    assert (idle["what"], idle["prompt_len"], idle["num_failed"], idle["ttft_s"]["count"]) == ("1p1d", 64, 0, 2)
    assert idle["transfer_bytes"] > 0
    assert {"Ray", "prefill-0", "decode-0", "router-0"} <= set(shape["steps"])
    assert shape["errors"] == []
    assert shape["start_s"] < found["seconds"] < time.monotonic() - began + 1
    assert (tmp_path / "1p1d.tar.gz").is_file()
    out = capsys.readouterr().out
    assert "| 1p1d | 64 | 3 | 1 |" in out
    assert "python -m benchmarks.serve --device cpu" in out
