import asyncio
import json

import pytest
from click.testing import CliRunner

from cluster.client import Client, Endpoint
from cluster.commands.bench import bench
from cluster.load_trace import Replay, Sample, TraceError, TraceProfile, read_trace, run_trace, select
from engine.config import ModelOptions
from router.config import RouterConfig
from router.local_prefill import LocalPrefillConfig
from tests.cluster.inference_double import Double, serve
from tests.mini_cluster import MiniCluster, Shape

TRACE = (
    (0, 1536, 64, [0, 1, 2]),
    (0, 1000, 640, [0, 10]),
    (400, 2000, 64, [0, 1, 2, 3]),
    (800, 600, 64, [0, 20]),
    (1200, 2700, 100, [0, 1, 2, 3, 4, 5]),
    (1200, 300, 64, [0]),
)
"""Three turns of one conversation, two others, and one that says no more than all begin with."""


def line(at_ms, input_length, output_length, hash_ids):
    return json.dumps(
        {"timestamp": at_ms, "input_length": input_length, "output_length": output_length, "hash_ids": hash_ids}
    )


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line(*each) for each in TRACE) + "\n")
    return path


@pytest.fixture(scope="module")
def double():
    with serve(Double()) as double:
        yield double


def replay_of(trace, *, max_model_len=4096, **profile):
    made = TraceProfile(**profile)
    return Replay(select(read_trace(trace), made), made, vocab_size=1000, max_model_len=max_model_len)


def shared(one, other):
    """Tokens that two prompts begin with."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


class TestScaling:
    @pytest.mark.parametrize("scale", [1, 64, 512])
    def test_prompts_share_what_their_ids_share(self, trace, scale):
        replay = replay_of(trace, length_scale=scale)
        prompts = [replay.prompt(due) for due in replay.due]
        assert [len(prompt) for prompt in prompts] == [-(-each[1] // scale) for each in TRACE]
        block = 512 // scale
        assert shared(prompts[0], prompts[2]) == 3 * block
        assert shared(prompts[2], prompts[4]) == len(prompts[2]), "of its last block the longer prompt has more"
        assert shared(prompts[1], prompts[5]) == len(prompts[5])
        if scale < 512:  # a token for each id may be the same by chance
            assert shared(prompts[0], prompts[1]) == shared(prompts[2], prompts[3]) == block

    def test_the_seed_and_the_id_decide_the_tokens(self, trace):
        first, again, other = (replay_of(trace, length_scale=64, seed=seed) for seed in (0, 0, 1))
        assert list(first.plan()) == list(again.plan())
        assert first.prompt(first.due[0]) != other.prompt(other.due[0])

    def test_times_are_the_traces_own(self, trace):
        assert [due.due_s for due in replay_of(trace, time_scale=2.0).due] == [0.0, 0.0, 0.2, 0.4, 0.6, 0.6]

    def test_answers_have_the_length_of_the_trace(self, trace):
        plan = list(replay_of(trace, length_scale=64, deadline_s=9.0).plan())
        assert [each.request.sampling.max_tokens for each in plan] == [1, 10, 1, 1, 2, 1]
        assert all(each.request.sampling.ignore_eos and each.request.deadline_s == 9.0 for each in plan)

    def test_what_an_endless_cache_would_hold(self, trace):
        figures = replay_of(trace).figures
        assert figures.prompt_tokens == sum(each[1] for each in TRACE)
        cached = 0 + 512 + 1536 + 512 + 2000 + 299  # of a prompt that is there whole, all but its last token
        assert figures.best_cached_share == pytest.approx(cached / figures.prompt_tokens)


class TestLimit:
    def test_clipped(self, trace):
        replay = replay_of(trace, max_model_len=1600, length_scale=1)
        assert (replay.figures.num_clipped, replay.figures.num_dropped) == (3, 0)
        assert all(due.prompt_len + due.output_len <= 1600 for due in replay.due)
        assert shared(*(replay.prompt(replay.due[index]) for index in (0, 2))) == 1536, "the beginning is kept"

    def test_dropped(self, trace):
        replay = replay_of(trace, max_model_len=1600, too_long="drop")
        assert (replay.figures.num_clipped, replay.figures.num_dropped) == (0, 3)
        assert [due.prompt_len for due in replay.due] == [1536, 600, 300]

    def test_nothing_left(self, trace):
        with pytest.raises(TraceError, match="all 6 are over the model's limit of 100"):
            replay_of(trace, max_model_len=100, too_long="drop")


class TestSelection:
    def families(self, trace, **profile):
        chosen = select(read_trace(trace), TraceProfile(**profile))
        return chosen, [each.hash_ids[1] if len(each.hash_ids) > 1 else None for each in chosen.lines]

    def test_conversations_are_drawn_whole(self, trace):
        seen = set()
        for seed in range(20):
            chosen, roots = self.families(trace, sample=Sample(count=2), seed=seed)
            assert len(roots) >= 2
            assert len(set(roots)) == chosen.num_families
            assert roots.count(1) in (0, 3), "all turns of the conversation, or none"
            assert [each.at_ms for each in chosen.lines] == sorted(each.at_ms for each in chosen.lines)
            seen.add(tuple(roots))
        assert len(seen) > 2

    def test_a_share(self, trace):
        assert len(self.families(trace, sample=Sample(share=1.0))[1]) == 6
        assert len(self.families(trace, sample=Sample.parse("1%"))[1]) in (1, 3)

    def test_a_time(self, trace):
        assert self.families(trace, duration_s=0.4)[1] == [1, 10]
        assert self.families(trace, duration_s=0.4, time_scale=2.0)[1] == [1, 10, 1]

    @pytest.mark.parametrize("text", ["", "x", "0", "-3", "0.0", "1.5", "150%", "nan", "5,5", "%"])
    def test_malformed_samples_are_refused(self, text):
        with pytest.raises(ValueError, match="sample"):
            Sample.parse(text)

    def test_samples(self):
        assert Sample.parse("300") == Sample(count=300)
        assert Sample.parse("0.25") == Sample.parse("25%") == Sample(share=0.25)

    @pytest.mark.parametrize(
        "wrong", [{"length_scale": 3}, {"length_scale": 1024}, {"time_scale": 0.0}, {"duration_s": -1.0}]
    )
    def test_scales_that_cannot_be_are_refused(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TraceProfile(**wrong)


class TestReading:
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ("{", "expected a JSON object with timestamp"),
            ("[1]", "expected a JSON object with timestamp"),
            ('{"timestamp": "0"}', "timestamp must be milliseconds from 0 on, got '0'"),
            (line(0, 0, 1, []), "input_length must be a whole number of tokens from 1 on, got 0"),
            (line(0, 1, 1.5, [1]), "output_length must be a whole number of tokens from 1 on, got 1.5"),
            (line(0, 1, 1, 7), "hash_ids must be a list of whole numbers, got 7"),
            (line(0, 513, 1, [1]), "1 hash_ids for an input_length of 513, expected 2"),
        ],
    )
    def test_a_bad_line_is_refused_with_its_number(self, trace, bad, message):
        trace.write_text(trace.read_text() + "\n" + bad + "\n")
        with pytest.raises(TraceError) as caught:
            read_trace(trace)
        assert str(caught.value).startswith(f"{trace}, line 8: ")
        assert message in str(caught.value)

    def test_an_empty_file_is_refused(self, tmp_path):
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(TraceError, match=r"empty\.jsonl is empty"):
            read_trace(tmp_path / "empty.jsonl")

    def test_no_text_is_refused(self, tmp_path):
        (tmp_path / "bytes").write_bytes(b"\xff\xfe")
        with pytest.raises(TraceError, match="cannot be read as a trace"):
            read_trace(tmp_path / "bytes")

    def test_lines_are_put_in_the_order_of_time(self, tmp_path):
        (tmp_path / "t").write_text(line(5, 1, 1, [1]) + "\n" + line(0, 1, 1, [2]))
        assert [each.at_ms for each in read_trace(tmp_path / "t")] == [0, 5]


class TestCommand:
    def run(self, double, *arguments):
        return CliRunner().invoke(bench, ["--address", double.address, *map(str, arguments)])

    def test_plain_figures(self, double, trace):
        result = self.run(double, "--trace", trace, "--length-scale", 64, "--time-scale", 8)
        assert result.exit_code == 0, result.stderr
        figures = dict(each.split("\t") for each in result.stdout.splitlines())
        assert figures["requests answered"].startswith("6 of 6 in ")
        assert figures["trace"] == "6 of 6 requests, in 4 families"
        assert figures["scaling"] == "lengths / 64, 8 times as fast"
        assert figures["over the limit of 4096 tokens"] == "0 clipped, 0 dropped"
        assert figures["prompt tokens cached, at best"] == "58%"

    def test_json(self, double, trace):
        arguments = ("--trace", trace, "--duration", 0.4, "--trace-sample", "100%", "--length-scale", 512)
        document = json.loads(self.run(double, *arguments, "--json").stdout)
        assert document["profile"]["length_scale"] == 512
        assert document["trace"]["num_requests"] == document["num_completed"] == 2
        assert document["trace"]["file"] == str(trace)
        assert document["prompt_tokens"] == document["trace"]["prompt_tokens"] == 5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rate", "1"], "--rate does not go with --trace"),
            (["--requests", "1"], "--requests does not go with --trace"),
            (["--length-scale", "5"], "length_scale must leave whole tokens"),
            (["--trace-sample", "some"], "a sample is a number of requests or a share"),
        ],
    )
    def test_wrong_usage_exits_with_2(self, double, trace, arguments, message):
        result = self.run(double, "--trace", trace, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_scaling_without_a_trace_is_refused(self, double):
        result = self.run(double, "--time-scale", "2")
        assert result.exit_code == 2
        assert "--time-scale needs --trace FILE" in result.stderr

    def test_a_bad_trace_exits_with_1(self, double, trace):
        trace.write_text("no\n")
        result = self.run(double, "--trace", trace)
        assert result.exit_code == 1
        assert "line 1: expected a JSON object" in result.stderr

    def test_a_trace_of_which_nothing_is_left_exits_with_1(self, double, tmp_path):
        (tmp_path / "long").write_text(line(0, 5000, 1, list(range(10))))
        result = self.run(double, "--trace", tmp_path / "long", "--trace-too-long", "drop")
        assert result.exit_code == 1
        assert "no request is left of the trace" in result.stderr


def test_a_cluster_finds_what_the_trace_shares(tiny_llama, trace, tmp_path):
    """Its blocks are as large as the scaled trace's: all but what two prompts at once and last blocks share."""
    profile = TraceProfile(length_scale=32, num_warmup=0)
    router = RouterConfig(port=0, local_prefill=LocalPrefillConfig(max_share=0.0))

    async def main():
        async with MiniCluster(Shape(model=ModelOptions(path=str(tiny_llama)), router=router), tmp_path) as cluster:
            async with Client(Endpoint(address=cluster.address)) as client:
                result, figures = await run_trace(client, select(read_trace(trace), profile), profile)
            await cluster.until_idle()
            return result, figures

    result, figures = asyncio.run(main())
    assert [record.failure for record in result.records] == [None] * len(TRACE)
    usages = [record.finished.usage for record in result.records]
    assert sum(usage.prompt_tokens for usage in usages) == figures.prompt_tokens
    assert [usage.completion_tokens for usage in usages] == [-(-each[2] // 32) for each in TRACE]
    cached = sum(usage.cached_prompt_tokens for usage in usages)
    assert 0.6 * figures.best_cached_share <= cached / figures.prompt_tokens <= figures.best_cached_share
    assert [record.due_s for record in result.records] == [each[0] / 1e3 for each in TRACE]
