import json

import pytest
from click.testing import CliRunner

from cluster.commands.generate import generate
from tests.cluster.inference_double import Double, answer_ids, answer_text, chat_text, serve


@pytest.fixture(scope="module")
def double():
    with serve(Double()) as double:
        yield double


def run(double, *arguments, **options):
    return CliRunner().invoke(generate, [*arguments, "--address", double.address], **options)


def test_text_goes_to_stdout_alone(double):
    result = run(double, "ab", "--max-tokens", "2")
    assert result.exit_code == 0
    assert result.stdout == answer_text(answer_ids([97, 98], 2)) + "\n"
    assert result.stderr == ""


def test_every_option_reaches_the_request(double):
    options = "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.1 --seed 0"
    rest = ["--stop", "a", "--stop", "b", "--logprobs", "0", "--ignore-eos", "--deadline", "9", "--model", "double"]
    assert run(double, "x", *options.split(), *rest).exit_code == 0
    request = double.requests[-1]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty, list(sampling.stop)) == (0.1, 1.1, ["a", "b"])
    assert sampling.ignore_eos
    assert sampling.HasField("seed")
    assert sampling.HasField("logprobs")
    assert (request.deadline_s, request.model) == (9.0, "double")


def test_what_is_not_said_is_left_to_the_server(double):
    run(double, "x")
    request = double.requests[-1]
    assert [each.name for each, _ in request.ListFields()] in (["text"], ["text", "sampling"])
    assert not request.sampling.ListFields()


def test_prompts_of_every_kind(double):
    assert run(double, "--tokens", "1,2, 3").exit_code == 0
    assert list(double.requests[-1].token_ids.ids) == [1, 2, 3]
    assert run(double, "-", input="from a pipe\n").exit_code == 0
    assert double.requests[-1].text == "from a pipe\n"
    assert run(double, "--chat", "hi", "--system", "be short").exit_code == 0
    assert chat_text(double.requests[-1].chat) == "<system>be short\n<user>hi\n<assistant>"


def test_json_is_one_object(double):
    result = run(double, "--tokens", "1", "--json", "--logprobs", "2", "--max-tokens", "2")
    document = json.loads(result.stdout)
    assert document["token_ids"] == [1, 2]
    assert [len(position["top"]) for position in document["logprobs"]] == [2, 2]
    assert document["decode_worker"] == "decode-0/1"


def test_logprobs_follow_on_stderr(double):
    result = run(double, "--tokens", "1", "--logprobs", "1", "--max-tokens", "1")
    assert result.stderr == "1:-0.5000  1:-0.5000\n"


def test_timing_is_drawn_on_stderr(double):
    result = run(double, "x", "--timing", "--no-stream")
    assert result.stdout == answer_text(answer_ids([120], 4)) + "\n"
    for word in ("queue", "prefill", "transfer", "first decode step", "75% of its transfer hidden", "decode-0/1"):
        assert word in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of PROMPT"),
        (["x", "--tokens", "1"], "give one of PROMPT"),
        (["--tokens", "1,x"], "--tokens must be ids separated by commas"),
        (["--tokens", "1", "--chat"], "--chat needs a PROMPT"),
        (["x", "--system", "y"], "--system needs --chat"),
        (["x", "--seed", "-1"], "--seed is out of range"),
        (["x", "--top-k", str(2**31)], "--top-k is out of range"),
        (["x", "--logprobs", str(2**31)], "--logprobs is out of range"),
        (["x", "--address", "nowhere"], "address must be host:port"),
    ],
)
def test_wrong_usage_exits_with_2(double, arguments, message):
    result = CliRunner().invoke(generate, ["--address", double.address, *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_prompt_that_is_not_utf8_is_refused(double):
    result = run(double, "-", input=b"\xff")
    assert result.exit_code == 2
    assert "the prompt must be UTF-8" in result.stderr
    result = run(double, "\udcff")
    assert "the prompt must be UTF-8" in result.stderr


def test_a_refusal_is_one_line_and_exits_with_1(double):
    result = run(double, "fail:field")
    assert result.exit_code == 1
    assert result.stderr == "Error: INVALID_ARGUMENT: sampling.top_p: must be at most 1, got 2\n"
    assert result.stdout == ""


def test_an_error_in_mid_stream_starts_a_line_of_its_own(double, monkeypatch):
    monkeypatch.setattr("cluster.client.DEADLINE_GRACE_S", 0.1)
    result = run(double, "hang", "--deadline", "0.1")
    assert result.exit_code == 1
    assert result.stdout.endswith("\n")
    assert "DEADLINE_EXCEEDED" in result.stderr


def test_no_cluster_says_how_to_start_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path))
    result = CliRunner().invoke(generate, ["x"])
    assert result.exit_code == 1
    assert "`pdserve up`" in result.stderr


def test_the_key_file_is_read(double, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    assert run(double, "x", "--api-key-file", str(key)).exit_code == 0
    assert double.metadata[-1]["authorization"] == "Bearer secret"
