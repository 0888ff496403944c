"""The engine benchmark on a CPU with a tiny model: that it runs, and the shape of what it writes."""

import json

import pytest

from benchmarks.engine import main
from benchmarks.engine_cases import CASES, TARGETS, Case, decode_figure, demand, prefill_figure, random_prompts
from benchmarks.engine_driver import Run, Step
from benchmarks.engine_peer import measure_peer
from engine.api import GenerateRequest, SamplingParams, TokenOutput
from engine.sequence import Sequence

TINY = ["--device", "cpu", "--max-step-tokens", "64", "--max-running", "4", "--steps", "6"]


def test_names_are_understood_and_given_back():
    assert [Case.parse(name).name for name in CASES] == list(CASES)
    assert set(TARGETS) <= set(CASES)
    assert Case.parse("decode-8") == Case("decode", 8, 1088)
    assert Case.parse("decode-1-32768") == Case("decode", 1, 32768)
    assert Case.parse("prefill-32x2048") == Case("prefill", 32, 2048)


@pytest.mark.parametrize("name", ["", "decode", "decode-", "prefill-8x", "decode-0", "prefill-0", "prefill--1", "x-1"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=r"case|at least"):
        Case.parse(name)


def test_one_sequence_gets_the_prompt_and_output_that_the_context_asks_for():
    wanted = demand(Case.parse("decode-1"), 128, 2048)
    assert (wanted.prompt_lens, wanted.max_tokens) == ((1024,), (129,))


def test_many_sequences_last_until_the_last_one_decodes_and_share_one_context_halfway():
    case, steps, step_tokens = Case.parse("decode-256"), 128, 2048
    wanted = demand(case, steps, step_tokens)
    for index in range(case.num_seqs):
        later = sum(wanted.prompt_lens[index + 1 :])
        lead = wanted.max_tokens[index] - 1 - steps
        assert lead * (step_tokens - case.num_seqs) >= later
        assert wanted.prompt_lens[index] + lead + steps // 2 == case.length
        blocks = -(-(wanted.prompt_lens[index] + wanted.max_tokens[index]) // 16)
        assert case.num_blocks(steps, 16) >= case.num_seqs * blocks


def test_a_context_shorter_than_the_steps_is_refused():
    with pytest.raises(ValueError, match="too short"):
        demand(Case("decode", 1, 10), 128, 2048)


def test_prompts_share_nothing():
    first, second = random_prompts((40, 30), 400, seed=1), random_prompts((40, 30), 400, seed=2)
    assert [len(prompt) for prompt in first] == [40, 30]
    assert first[0][:30] != first[1]
    assert first != second
    assert all(0 <= token < 400 for prompt in first for token in prompt)


def emitted(*offsets):
    request = GenerateRequest(request_id="0", prompt_token_ids=(1,), params=SamplingParams())
    sequence = Sequence.from_request(request, 0.0)
    return [(sequence, TokenOutput("0", 0, offset, (1,))) for offset in offsets]


def test_a_decode_figure_is_the_mean_over_steps_in_which_all_decode():
    steps = [Step(1.0, emitted(0)), Step(2.0, emitted(1, 0)), Step(2.1, emitted(2, 1)), Step(2.3, emitted(3, 2))]
    steps += [Step(2.4, emitted(4, 3)), Step(3.0, emitted(4))]
    figure = decode_figure(Run(0.0, steps), (100, 102), steps=3)
    assert figure.time_s == pytest.approx(0.4 / 3)
    assert figure.median_s == pytest.approx(0.1)
    assert figure.context == pytest.approx(101 + (2 + 1 + 3 + 2 + 4 + 3) / 6)
    assert figure.count == 3
    with pytest.raises(ValueError, match="together"):
        decode_figure(Run(0.0, steps), (100, 102), steps=64)


def test_a_prefill_figure_is_the_median_time_to_the_last_first_token():
    runs = [Run(10.0, [Step(10.5, []), Step(10.0 + time, [])]) for time in (1.0, 3.0, 2.0)]
    figure = prefill_figure(runs, 64)
    assert (figure.time_s, figure.best_s, figure.count) == (2.0, 1.0, 3)


def test_it_runs_and_writes_what_it_measured(tiny_llama, tmp_path, capsys):
    file = tmp_path / "result.json"
    cases = ["decode-1-40", "decode-3-40", "prefill-24", "prefill-2x100"]
    main([*TINY, "--model", str(tiny_llama), "--cases", ",".join(cases), "--quick", "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == {"about", "ceilings", "cases", "peer"}
    assert result["about"]["settings"]["max_step_tokens"] == 64
    assert len(result["about"]["engine_start_s"]) == 1
    assert len(result["ceilings"]) == 2
    assert all(value > 0 for each in result["ceilings"] for value in each.values())
    assert [row["name"] for row in result["cases"]] == cases
    for row in result["cases"]:
        assert row["floor_ms"] > 0
        assert len(row["measured_ms"]) == len(row["median_ms"]) == len(row["ratio"]) == 2
        assert row["ratio"] == pytest.approx([row["floor_ms"] / time for time in row["measured_ms"]])
        assert (row["target"], row["met"], row["trace"], row["traced_slowdown"]) == (None, None, None, None)
    assert result["cases"][0]["context"] == pytest.approx([40.5, 40.5])
    assert result["cases"][0]["count"] == [6, 6]
    assert result["cases"][1]["context"] == pytest.approx([40, 40], abs=4)
    assert result["peer"] == []
    printed = capsys.readouterr()
    assert all(name in printed.out for name in cases)
    assert "decode-1-40, run 2" in printed.err


def test_each_block_size_gets_an_engine(tiny_llama, tmp_path, capsys):
    file = tmp_path / "result.json"
    main([*TINY, "--model", str(tiny_llama), "--cases", "prefill-24", "--block-sizes", "8,32", "--json", str(file)])
    rows = json.loads(file.read_text())["cases"]
    assert [(row["name"], row["block_size"]) for row in rows] == [
        ("prefill-24, block 8", 8),
        ("prefill-24, block 32", 32),
    ]


def test_the_peer_is_measured_on_the_same_cases(tiny_llama):
    cases = [Case("decode", 1, 40), Case("prefill", 1, 24)]
    decode, prefill = measure_peer(tiny_llama, "cpu", "float32", cases=cases, steps=6)
    assert (decode.count, decode.context) == (6, 40.5)
    assert prefill.time_s > 0
