import asyncio
import itertools
import json
import time

import pytest
from click.testing import CliRunner

from cluster.client import Client, Endpoint, StatusError
from cluster.commands.bench import bench
from cluster.load import UNFINISHED, Length, LoadProfile, PromptMaker, RequestRecord, make_plan, run_load, run_plan
from protos.inference_pb2 import GenerateRequest
from tests.cluster.inference_double import VOCAB_SIZE, Double, serve


@pytest.fixture(scope="module")
def double():
    with serve(Double()) as double:
        yield double


def load(double, on_progress=None, **profile):
    async def run():
        async with Client(Endpoint(address=double.address)) as client:
            return await run_load(client, LoadProfile(**profile), on_progress)

    return asyncio.run(run())


class TestProfile:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"rate": 1.0, "concurrency": 1},
            {"num_requests": None},
            {"duration_s": 1.0},
            {"concurrency": 0},
            {"concurrency": None, "rate": float("nan")},
            {"concurrency": None, "rate": float("inf")},
            {"shared_prefix": 1.1},
            {"num_groups": 0},
            {"num_warmup": -1},
            {"deadline_s": 0.0},
        ],
    )
    def test_contradictions_are_refused(self, wrong):
        with pytest.raises(ValueError, match=r"must be|give one of"):
            LoadProfile(**{"concurrency": 1, "num_requests": 1, **wrong})

    @pytest.mark.parametrize("text", ["", "x", "0", "-1", "4,4", "4,-1", "1,2,3"])
    def test_malformed_lengths_are_refused(self, text):
        with pytest.raises(ValueError, match="length"):
            Length.parse(text)

    def test_lengths(self):
        assert Length.parse("12") == Length(mean=12, spread=0)
        assert Length.parse("12,3") == Length(mean=12, spread=3)


class TestPrompts:
    def draw(self, count=40, seed=0, **profile):
        maker = PromptMaker(LoadProfile(concurrency=1, num_requests=1, **profile), VOCAB_SIZE, seed)
        return [maker.next() for _ in range(count)]

    def test_the_seed_decides(self):
        profile = {"input_len": Length(mean=20, spread=10), "output_len": Length(mean=5, spread=2)}
        assert self.draw(**profile) == self.draw(**profile)
        assert self.draw(**profile) != self.draw(seed=1, **profile)

    def test_lengths_cover_their_range(self):
        requests = self.draw(400, input_len=Length(mean=6, spread=2), output_len=Length(mean=3, spread=1))
        assert {len(request.token_ids.ids) for request in requests} == {4, 5, 6, 7, 8}
        assert {request.sampling.max_tokens for request in requests} == {2, 3, 4}

    def test_ids_keep_clear_of_both_ends_of_the_vocabulary(self):
        ids = {token_id for request in self.draw() for token_id in request.token_ids.ids}
        assert min(ids) >= VOCAB_SIZE // 4
        assert max(ids) < VOCAB_SIZE * 3 // 4

    def test_answers_have_the_length_asked_for(self):
        request: GenerateRequest = self.draw(1, deadline_s=3.0)[0]
        assert request.sampling.ignore_eos
        assert request.sampling.temperature == 0.0
        assert request.deadline_s == 3.0

    def test_a_group_shares_a_prefix_and_nothing_else(self):
        requests = self.draw(60, input_len=Length(mean=40), shared_prefix=0.5, num_groups=3)
        prefixes = {tuple(request.token_ids.ids[:20]) for request in requests}
        assert len(prefixes) == 3
        assert len({tuple(request.token_ids.ids[20:]) for request in requests}) == 60
        assert len({request.token_ids.ids[20] for request in requests}) > 3


def test_closed_loop_keeps_its_concurrency():
    with serve(Double(step_s=0.01)) as double:
        result = load(double, concurrency=4, num_requests=12, num_warmup=0, output_len=Length(mean=5))
    assert len(result.records) == 12
    assert [record.num_tokens for record in result.records] == [5] * 12
    in_flight = [
        sum(other.sent_s <= record.sent_s < other.ended_s for other in result.records) for record in result.records
    ]
    assert max(in_flight) == 4


@pytest.mark.parametrize("paced", [False, True])
def test_a_server_of_paced_workers_is_told(paced):
    with serve(Double(paced=paced)) as double:
        assert load(double, concurrency=1, num_requests=1).paced is paced


def test_closed_loop_for_a_duration():
    with serve(Double(step_s=0.01)) as double:
        began = time.monotonic()
        result = load(double, concurrency=2, duration_s=0.3, num_warmup=0, output_len=Length(mean=3))
        assert 0.3 <= time.monotonic() - began < 3
    assert all(record.due_s < 0.3 for record in result.records)
    assert len(result.records) > 4


def test_open_loop_arrivals_are_poisson_and_depend_on_the_seed_alone(double):
    gaps = []
    for _ in range(2):
        result = load(double, rate=400.0, num_requests=200, num_warmup=0, output_len=Length(mean=1), seed=3)
        due = [record.due_s for record in result.records]
        gaps.append([after - before for before, after in itertools.pairwise(due)])
    assert gaps[0] == gaps[1]
    mean = sum(gaps[0]) / len(gaps[0])
    deviation = (sum((gap - mean) ** 2 for gap in gaps[0]) / len(gaps[0])) ** 0.5
    assert mean == pytest.approx(1 / 400, rel=0.2)
    assert deviation == pytest.approx(mean, rel=0.25)


def test_open_loop_latency_counts_from_when_a_request_was_due():
    class Stalling(Double):
        """Holds its event loop for 0.3 s once, at the third request: nobody is served meanwhile."""

        async def Generate(self, request, context):
            if len(self.requests) == 2:
                time.sleep(0.3)  # noqa: ASYNC251
            async for event in super().Generate(request, context):
                yield event

    with serve(Stalling()) as double:
        result = load(double, rate=100.0, num_requests=30, num_warmup=0, output_len=Length(mean=1))
    assert sum(record.ttft_s > 0.1 for record in result.records) > 10
    assert max(record.sent_s - record.due_s for record in result.records) < 0.2


def follow(double, *, limit_s=None, begin_at=None, **profile):
    async def run():
        async with Client(Endpoint(address=double.address)) as client:
            plan = make_plan(LoadProfile(**profile), VOCAB_SIZE)
            return plan, await run_plan(client, plan, begin_at=begin_at, limit_s=limit_s)

    return asyncio.run(run())


def test_a_plan_is_what_run_load_would_send():
    profile = {"rate": 200.0, "num_requests": 20, "seed": 5}
    with serve(Double()) as double:
        result = load(double, num_warmup=0, **profile)
        sent = [request.token_ids for request in double.requests]
    with serve(Double()) as double:
        begin_at = time.monotonic() + 0.1
        plan, followed = follow(double, begin_at=begin_at, **profile)
        assert [request.token_ids for request in double.requests] == sent == [each.request.token_ids for each in plan]
    assert [record.due_s for record in followed.records] == [record.due_s for record in result.records]
    assert all(record.failure is None and record.sent_s >= record.due_s for record in followed.records)


def test_what_has_not_ended_at_the_limit_has_failed():
    with serve(Double(step_s=0.05)) as double:
        _, result = follow(double, rate=20.0, num_requests=8, output_len=Length(mean=10), limit_s=0.7)
    ended = [record for record in result.records if record.failure is None]
    cut = [record for record in result.records if record.failure == UNFINISHED]
    assert len(ended) + len(cut) == len(result.records)
    assert cut
    assert all(record.finished is None and record.ended_s >= 0.7 for record in cut)
    assert result.wall_s < 2.0


def test_warmup_is_not_recorded():
    with serve(Double()) as double:
        result = load(double, concurrency=1, num_requests=3, num_warmup=2)
    assert len(result.records) == 3
    assert len(double.requests) == 5
    prompts = {tuple(request.token_ids.ids) for request in double.requests}
    assert len(prompts) == 5


def test_failures_are_recorded_by_status():
    class Refusing(Double):
        async def Generate(self, request, context):
            if len(self.requests) % 2:
                request.text = "fail:busy"
            async for event in super().Generate(request, context):
                yield event

    ended = []
    with serve(Refusing()) as double:
        result = load(double, ended.append, concurrency=1, num_requests=4, num_warmup=0)
    assert [record.failure for record in result.records] == [None, "RESOURCE_EXHAUSTED"] * 2
    assert ended == result.records


def test_a_refused_warmup_ends_the_measurement():
    class Refusing(Double):
        async def Generate(self, request, context):
            request.text = "fail:busy"
            async for event in super().Generate(request, context):
                yield event

    with serve(Refusing()) as double, pytest.raises(StatusError, match="the queue is full"):
        load(double, concurrency=1, num_requests=1)


def test_tokens_that_came_together_have_gaps_of_nothing():
    record = RequestRecord(due_s=1.0, arrivals=[(1.5, 2), (2.0, 1), (3.0, 3)])
    assert record.ttft_s == 0.5
    assert record.itls_s() == [0.0, 0.5, 1.0, 0.0, 0.0]
    assert record.num_tokens == 6
    assert RequestRecord(due_s=1.0).ttft_s is None


class TestCommand:
    def run(self, double, *arguments):
        small = ["--output-len", "3", "--input-len", "8", "--requests", "6"]
        return CliRunner().invoke(bench, ["--address", double.address, *small, *arguments])

    def test_plain_figures(self, double):
        result = self.run(double, "--slo-ttft-ms", "5000", "--slo-itl-ms", "5000")
        assert result.exit_code == 0
        figures = dict(line.split("\t") for line in result.stdout.splitlines())
        assert figures["requests answered"].startswith("6 of 6 in ")
        assert figures["goodput/s (TTFT ≤ 5000 ms, ITL ≤ 5000 ms)"] == figures["requests/s"]
        assert figures["transfer hidden behind prefill"] == "75%"
        assert result.stderr == ""

    def test_json(self, double):
        document = json.loads(self.run(double, "--rate", "100", "--json").stdout)
        assert document["profile"]["rate"] == 100.0
        assert document["num_completed"] == 6
        assert document["ttft_s"]["count"] == 6
        assert document["itl_s"]["count"] == 12

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rate", "1", "--concurrency", "1"], "give one of rate"),
            (["--duration", "1"], "give one of num_requests"),
            (["--input-len", "1,1"], "Invalid value for '--input-len': a length needs"),
            (["--slo-ttft-ms", "0"], "ttft_s must be more than 0"),
        ],
    )
    def test_wrong_usage_exits_with_2(self, double, arguments, message):
        result = self.run(double, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_no_answer_at_all_exits_with_1(self):
        class Refusing(Double):
            async def Generate(self, request, context):
                request.text = "fail:UNAVAILABLE"
                async for event in super().Generate(request, context):
                    yield event

        with serve(Refusing()) as double:
            result = self.run(double, "--warmup", "0")
        assert result.exit_code == 1
        assert "first failure of its kind: UNAVAILABLE: as asked" in result.stderr
        assert "no request was answered" in result.stderr
