"""From the JSON of benchmarks.engine to a pace, and the example's pace against the table it comes from."""

import json

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.fit_pace import FitError, figures_of, fit, kv_bytes_of, main, prompt_steps
from benchmarks.split_vs_colocated import EXAMPLE
from cluster.config import load_config
from engine.pace import PaceOptions, StepWork

KV_BYTES = 131072
DECODE_MS = {
    (1, 1088): (4.19, 4.19),
    (8, 1088): (4.62, 4.62),
    (32, 1088): (5.66, 5.66),
    (64, 1088): (6.82, 6.82),
    (128, 1088): (9.74, 9.73),
    (256, 1088): (16.3, 16.28),
    (1, 32768): (5.51, 5.51),
}
PROMPT_MS = {
    (1, 512): (11.67, 11.81),
    (1, 2048): (41.5, 41.6),
    (1, 8192): (199.1, 199.0),
    (1, 16384): (458.2, 457.1),
    (32, 2048): (1496.8, 1496.3),
}
"""Of two runs: the table "One engine on a GPU" of benchmarks/RESULTS.md."""


def report(decode_ms, prompt_ms, device="cuda"):
    """As benchmarks.engine writes it; decode steps by (sequences, context)."""
    kinds = [("decode", *key, ms) for key, ms in decode_ms.items()]
    kinds += [("prefill", *key, ms) for key, ms in prompt_ms.items()]
    cases = [
        {
            "name": f"{kind}-{num}x{length}",
            "kind": kind,
            "num_seqs": num,
            "length": length,
            "measured_ms": ms,
            "context": [float(length)] * 2,
        }
        for kind, num, length, ms in kinds
    ]
    settings = {"device": device, "dtype": "bfloat16", "max_step_tokens": None}
    return {"about": {"settings": settings, "date": "2026-11-25", "device_name": "NVIDIA H200"}, "cases": cases}


H200 = report(DECODE_MS, PROMPT_MS)


def test_prompts_are_cut_as_the_engine_cuts_them():
    assert prompt_steps(1, 512, 2048, 512) == (StepWork(512, 0, 512),)
    assert [step.prompt_tokens for step in prompt_steps(1, 4500, 2048, 512)] == [2048, 2452]
    assert [step.prompt_tokens for step in prompt_steps(1, 4500, 2048, 0)] == [2048, 2048, 404]
    assert prompt_steps(3, 40, 60, 0) == (StepWork(60, 0, 60), StepWork(60, 0, 80))


def test_costs_that_made_the_figures_are_found_again():
    true = PaceOptions(fixed_ms=4, prompt_token_us=20, token_us=2, kv_gb_per_s=1000, kv_bytes_per_token=KV_BYTES)

    def steps_ms(steps):
        return [1e3 * sum(true.step_s(step, KV_BYTES) for step in steps)] * 2

    decode = {(num, context): steps_ms([StepWork(0, num, num * context)]) for num in (1, 64) for context in (100, 9000)}
    prompts = {(num, length): steps_ms(prompt_steps(num, length, 2048, 512)) for num, length in PROMPT_MS}
    found = fit(figures_of(report(decode, prompts)), KV_BYTES)
    for pace in (found.prefill, found.decode):
        assert pace.fixed_ms == pytest.approx(4, abs=0.01)
        assert pace.prompt_token_us == pytest.approx(20, rel=1e-3)
        assert pace.token_us == pytest.approx(2, rel=1e-3)
        assert pace.kv_gb_per_s == pytest.approx(1000, rel=1e-2)


def test_no_cost_is_negative():
    found = fit(
        figures_of(report({(1, 100): (5, 5), (64, 100): (4, 4)}, {(1, 512): (9, 9), (1, 2048): (9, 9)})), KV_BYTES
    )
    assert found.decode.token_us == 0
    assert found.decode.kv_gb_per_s is None
    assert found.decode.fixed_ms == pytest.approx(4.5, rel=0.1)


def test_the_example_is_what_the_table_gives():
    found = fit(figures_of(H200), kv_bytes_of(H200))
    assert max(abs(ratio - 1) for ratio in found.ratios.values()) < 0.065
    config = load_config(EXAMPLE.with_name("rehearsal.yaml"))
    assert (config.prefill.pace, config.decode.pace) == (found.prefill, found.decode)


def test_prints_yaml_ready_to_be_pasted(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(H200))
    printed = CliRunner().invoke(main, [str(tmp_path / "result.json")])
    assert printed.exit_code == 0
    (tmp_path / "c.yaml").write_text("model: {path: demo}\n" + printed.output)
    assert load_config(tmp_path / "c.yaml").decode.pace == PaceOptions(
        **yaml.safe_load(printed.output)["decode"]["pace"]
    )
    assert "NVIDIA H200, measured on 2026-11-25" in printed.output


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "this is not what `python -m benchmarks.engine --json` writes"),
        ("no json", "Expecting value"),
    ],
)
def test_other_files_are_refused(tmp_path, content, reason):
    (tmp_path / "result.json").write_text(content)
    printed = CliRunner().invoke(main, [str(tmp_path / "result.json")])
    assert printed.exit_code == 1
    assert reason in printed.output


def test_too_few_figures_are_refused():
    with pytest.raises(FitError, match="at least two figures of prompts and two of decode steps, got 10 and 0"):
        fit(figures_of(report({}, PROMPT_MS)), KV_BYTES)
