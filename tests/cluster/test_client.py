import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from cluster import client as module
from cluster.answer import Answer
from cluster.client import BrokenStreamError, Client, Endpoint, NoClusterError, StatusError, find_endpoint
from cluster.run_dir import Phase, ProcessRef, RunDir, RunState
from protos.inference_pb2 import Chat, ChatMessage, GenerateRequest, Sampling, TokenIds
from tests.cluster.inference_double import Double, answer_ids, answer_text, chat_text, serve


@pytest.fixture(scope="module")
def double():
    with serve(Double()) as double:
        yield double


def ask(double, request, **endpoint):
    async def run():
        answer = Answer()
        async with Client(Endpoint(address=double.address, **endpoint)) as client:
            async for event in client.generate(request):
                answer.add(event)
        return answer

    return asyncio.run(run())


def test_a_stream_becomes_an_answer(double):
    request = GenerateRequest(token_ids=TokenIds(ids=[5, 6]), sampling=Sampling(max_tokens=3, seed=9), request_id="r")
    answer = ask(double, request)
    assert answer.token_ids == answer_ids([5, 6], 3)
    assert answer.text == answer_text(answer.token_ids)
    document = answer.as_json()
    assert document["request_id"] == "r"
    assert document["seed"] == 9
    assert document["finish_reason"] == "length"
    assert document["usage"] == {"prompt_tokens": 2, "cached_prompt_tokens": 2, "completion_tokens": 3}
    assert document["timing"]["transfer_bytes"] == 3 << 20
    assert "logprobs" not in document


def test_the_key_travels_with_every_call(double):
    ask(double, GenerateRequest(text="x"), api_key="secret")
    assert double.metadata[-1]["authorization"] == "Bearer secret"
    ask(double, GenerateRequest(text="x"))
    assert "authorization" not in double.metadata[-1]


class TestSeveralRouters:
    """One that refuses, or goes, is left for the next one as far as nobody could notice."""

    @pytest.fixture
    def routers(self):
        running: dict[str, GenerateRequest] = {}
        with serve(Double(running=running)) as first, serve(Double(running=running)) as second:
            yield first, second

    @staticmethod
    def ask(*addresses, times=1, **fields):
        async def run():
            answers = []
            async with Client(*(Endpoint(address=address) for address in addresses)) as client:
                for _ in range(times):
                    answer = Answer()
                    request = GenerateRequest(text="ab", sampling=Sampling(max_tokens=6), **fields)
                    async for event in client.generate(request):
                        answer.add(event)
                    answers.append(answer.token_ids)
                await client.list_models()
            return answers

        return asyncio.run(run())

    @pytest.mark.parametrize("unavailable_at", [-1, 0])
    @pytest.mark.parametrize("resumable", [False, True])
    def test_the_next_one_serves_what_was_refused_before_its_first_token(self, routers, unavailable_at, resumable):
        first, second = routers
        first.unavailable_at = unavailable_at
        expected = answer_ids([97, 98], 6)
        answers = self.ask(first.address, second.address, times=3, deadline_s=30, resumable=resumable)
        assert answers == [expected] * 3
        assert (len(first.requests), len(second.requests)) == (1, 3), "who refused is not asked first again"
        asked, again = first.requests[0], second.requests[0]
        if resumable:
            assert asked == again, "by its id and its body it is the same"
            assert asked.request_id
        else:
            assert 20 < again.deadline_s < asked.deadline_s

    def test_one_that_is_gone_is_as_one_that_refuses(self, routers):
        answers = self.ask("127.0.0.1:1", routers[1].address, times=2)
        assert answers == [answer_ids([97, 98], 6)] * 2

    def test_a_resumable_request_goes_on_where_it_was(self, routers):
        first, second = routers
        first.unavailable_at, second.unavailable_at = 2, 4
        first.resumed_from.clear()
        assert self.ask(first.address, second.address, resumable=True) == [answer_ids([97, 98], 6)]
        assert (second.resumed_from, first.resumed_from) == ([2], [4])

    def test_cancel_finds_the_router_that_has_it(self, routers):
        first, second = routers
        second.requests.append(GenerateRequest(request_id="there"))

        async def run():
            addresses = (first.address, "127.0.0.1:1", second.address)
            async with Client(*(Endpoint(address=address) for address in addresses)) as client:
                assert await client.cancel("there")
                assert not await client.cancel("nowhere")
            async with Client(Endpoint(address="127.0.0.1:1")) as client:
                with pytest.raises(NoClusterError):
                    await client.cancel("there")

        asyncio.run(run())

    def test_a_plain_one_that_has_tokens_ends_and_so_does_one_that_all_refuse(self, routers):
        first, second = routers
        first.unavailable_at = 2
        with pytest.raises(StatusError, match="UNAVAILABLE"):
            self.ask(first.address, second.address)
        assert not second.requests
        first.unavailable_at = second.unavailable_at = -1
        with pytest.raises(StatusError, match="UNAVAILABLE"):
            self.ask(first.address, second.address, resumable=True)
        assert (len(first.requests), len(second.requests)) == (2, 1)


def test_unary_calls(double):
    chat = Chat(messages=[ChatMessage(role="user", content="hi")])

    async def run():
        async with Client(Endpoint(address=double.address)) as client:
            request = GenerateRequest(text="x", request_id="known")
            async for _ in client.generate(request):
                pass
            return (
                await client.list_models(),
                await client.tokenize("ab"),
                await client.tokenize(chat),
                await client.cancel("known"),
                await client.cancel("unknown"),
            )

    models, text, rendered, known, unknown = asyncio.run(run())
    assert [model.name for model in models] == ["double"]
    assert list(text.token_ids) == [97, 98]
    assert rendered.text == chat_text(chat)
    assert (known, unknown) == (True, False)


def test_a_busy_server_says_when_to_try_again(double):
    with pytest.raises(StatusError, match=r"RESOURCE_EXHAUSTED: the queue is full \(try again in 1.5 s\)") as caught:
        ask(double, GenerateRequest(text="fail:busy"))
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s == 1.5


def test_a_bad_request_names_its_field(double):
    with pytest.raises(StatusError, match=r"INVALID_ARGUMENT: sampling.top_p: must be at most 1, got 2") as caught:
        ask(double, GenerateRequest(text="fail:field"))
    assert caught.value.field == "sampling.top_p"


@pytest.mark.parametrize(
    ("status", "advice"),
    [("DEADLINE_EXCEEDED", "--deadline"), ("UNAUTHENTICATED", "--api-key-file"), ("INTERNAL", "as asked")],
)
def test_statuses_come_with_advice(double, status, advice):
    with pytest.raises(StatusError, match=advice):
        ask(double, GenerateRequest(text=f"fail:{status}"))


@pytest.mark.parametrize(("how", "what"), [("gap", "offset 1, expected 0"), ("end", "expected finished")])
def test_a_broken_stream_is_noticed(double, how, what):
    with pytest.raises(BrokenStreamError, match=what):
        ask(double, GenerateRequest(text=f"break:{how}"))


def test_leaving_a_stream_cancels_it_on_the_server(double):
    async def run():
        async with Client(Endpoint(address=double.address)) as client:
            events = client.generate(GenerateRequest(text="hang"))
            async for event in events:
                if event.WhichOneof("event") == "tokens":
                    break
            await events.aclose()
            return await asyncio.to_thread(double.cancelled.wait, 5)

    double.cancelled.clear()
    assert asyncio.run(run())


def test_a_stream_is_given_up_after_its_deadline_and_grace(double, monkeypatch):
    monkeypatch.setattr(module, "DEADLINE_GRACE_S", 0.1)
    with pytest.raises(StatusError, match="DEADLINE_EXCEEDED"):
        ask(double, GenerateRequest(text="hang", deadline_s=0.1))


def test_nobody_there_says_how_to_start():
    with pytest.raises(NoClusterError, match=r"no pdserve answers at 127.0.0.1:1 .*`pdserve up`"):
        ask(Double(address="127.0.0.1:1"), GenerateRequest(text="x"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls_trusts_the_named_authority_alone(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with serve(Double(), credentials) as double:
        assert ask(double, GenerateRequest(text="x"), tls_ca=certificate).finished is not None
        with pytest.raises(NoClusterError):
            ask(double, GenerateRequest(text="x"))


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:http"])
def test_malformed_addresses_are_refused(address):
    with pytest.raises(ValueError, match="host:port"):
        find_endpoint(address)


@pytest.mark.parametrize("key", ["", "line\nbreak", "schlüssel"])
def test_malformed_keys_are_refused(key):
    with pytest.raises(ValueError, match="api_key"):
        Endpoint(address="host:1", api_key=key)


class TestRunningCluster:
    @pytest.fixture
    def run_dir(self, tmp_path: Path, monkeypatch):
        monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path / "run"))
        run_dir = RunDir.default()
        run_dir.create()
        return run_dir

    def test_none_runs(self, run_dir):
        with pytest.raises(NoClusterError, match="`pdserve up`"):
            find_endpoint(None)

    def test_its_first_router_is_used(self, run_dir):
        run_dir.write_state(self.state(Phase.READY, ["127.0.0.1:4242", "127.0.0.1:4243"]))
        assert find_endpoint(None).address == "127.0.0.1:4242"

    def test_it_may_not_be_ready(self, run_dir):
        run_dir.write_state(self.state(Phase.STARTING, []))
        with pytest.raises(NoClusterError, match="is starting: see `pdserve status`"):
            find_endpoint(None)

    @staticmethod
    def state(phase, routers):
        return RunState(phase=phase, run_id="r", supervisor=ProcessRef.of(os.getpid()), sockets="", routers=routers)
