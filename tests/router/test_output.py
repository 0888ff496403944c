"""From tokens to text."""

from __future__ import annotations

from pathlib import Path

from engine.config import ModelOptions
from protos import inference_pb2, worker_pb2
from router.job import Chunk, Ending
from router.model import ServedModel
from router.output import OutputStream


def chunk(offset: int, token_ids: list[int], finish: worker_pb2.EngineFinish = worker_pb2.ENGINE_FINISH_NONE) -> Chunk:
    logprobs = [inference_pb2.PositionLogprobs() for _ in token_ids]
    return Chunk(offset, token_ids, logprobs, finish)


def test_text_never_breaks_a_character_and_held_text_comes_at_the_end(model: Path) -> None:
    served = ServedModel.load(ModelOptions(path=str(model)))
    ids = served.tokenizer.encode("a€b")
    output = OutputStream(served.tokenizer, [5], [])
    texts = [output.push(chunk(index, [token_id]))[0].text for index, token_id in enumerate(ids)]
    assert "".join(texts) == "a€b"
    assert all("\ufffd" not in text for text in texts)
    output = OutputStream(served.tokenizer, [5], ["bcd"])
    held, ending = output.push(chunk(0, served.tokenizer.encode("abc")))
    assert (held.text, ending) == ("a", None)
    message, ending = output.push(chunk(3, served.tokenizer.encode("x"), worker_pb2.ENGINE_FINISH_LENGTH))
    assert message.text == "bcx"
    assert ending == Ending(inference_pb2.FINISH_REASON_LENGTH)


def test_tokens_behind_a_stop_string_are_cut_off(model: Path) -> None:
    served = ServedModel.load(ModelOptions(path=str(model)))
    output = OutputStream(served.tokenizer, [5], ["cd"])
    ids = [served.tokenizer.encode(letter)[0] for letter in "abcdefg"]
    message, ending = output.push(chunk(0, ids, worker_pb2.ENGINE_FINISH_EOS))
    assert (message.text, list(message.token_ids), len(message.logprobs)) == ("ab", ids[:4], 4)
    assert ending == Ending(inference_pb2.FINISH_REASON_STOP, "cd")
    assert output.num_tokens == 4
