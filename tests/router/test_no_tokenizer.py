"""A model that is nothing but a header: token ids in, token ids out."""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc
import pytest

from engine.config import ModelOptions
from engine.errors import ModelNotFoundError
from protos import inference_pb2, worker_pb2
from router.job import Chunk, Ending
from router.model import ServedModel
from router.output import OutputStream
from tests.router.fake_worker import expected_answer
from tests.router.harness import PROMPT, Refusal, ask, cluster, run


@pytest.fixture(scope="module")
def header(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds nothing but a config.json."""
    directory = tmp_path_factory.mktemp("header")
    shutil.copy(model / "config.json", directory)
    return directory


def test_token_ids_are_answered_with_token_ids_and_no_text(header: Path) -> None:
    async def scenario() -> None:
        async with cluster(header, load_format="dummy") as made:
            answer = await made.ask(ask("r1", num=12))
            assert answer.token_ids == expected_answer(PROMPT, 12)
            assert (answer.text, answer.reason) == ("", "LENGTH")
            models = await made.stub.ListModels(inference_pb2.ListModelsRequest())
            assert [each.name for each in models.models] == [header.name]
            await made.idle()

    run(scenario())


def test_what_needs_a_tokenizer_is_refused_by_its_field(header: Path) -> None:
    message = inference_pb2.ChatMessage(role="user", content="Hi")
    chat = inference_pb2.Chat(messages=[message])
    bad = {
        "text": inference_pb2.GenerateRequest(text="Once upon a time"),
        "chat": inference_pb2.GenerateRequest(chat=chat),
        "sampling.stop": ask(stop=["end"]),
    }

    async def scenario() -> None:
        async with cluster(header, load_format="dummy") as made:
            for field, request in bad.items():
                refusal = await made.refused(request)
                assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
                assert "has no tokenizer: send the prompt as token_ids" in refusal.message
            for request in (inference_pb2.TokenizeRequest(text="a"), inference_pb2.TokenizeRequest(chat=chat)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await made.stub.Tokenize(request)
                assert Refusal.of(caught.value).code is grpc.StatusCode.INVALID_ARGUMENT
            await made.idle()

    run(scenario())


def test_real_weights_still_want_a_tokenizer(header: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        ServedModel.load(ModelOptions(path=str(header)))


def test_dummy_weights_take_the_tokenizer_that_is_there(model: Path) -> None:
    served = ServedModel.load(ModelOptions(path=str(model), load_format="dummy"))
    assert served.encode_text("the quick") == served.needed_tokenizer("text").encode("the quick")


def test_an_output_without_tokenizer_ends_as_the_engine_says() -> None:
    output = OutputStream(None, [5], [])
    message, ending = output.push(Chunk(0, [7, 8], [], worker_pb2.ENGINE_FINISH_LENGTH))
    assert (list(message.token_ids), message.text, output.num_tokens) == ([7, 8], "", 2)
    assert ending == Ending(inference_pb2.FINISH_REASON_LENGTH)
