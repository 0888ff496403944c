"""Requests that go well, in both modes, and what the client is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model_source import resolve
from engine.tokenizer import Tokenizer
from protos import inference_pb2
from tests.router.fake_worker import expected_answer
from tests.router.harness import PROMPT, Behaviour, ask, cluster, run


@pytest.mark.parametrize("split", [True, False])
def test_stream_is_the_workers_tokens_with_their_text(model: Path, split: bool) -> None:
    async def scenario() -> None:
        async with cluster(model, split=split, behaviour=Behaviour(prefill_s=0.02)) as made:
            answer = await made.ask(ask("r1", num=12, seed=5))
            assert answer.token_ids == expected_answer(PROMPT, 12)
            assert answer.text == Tokenizer.load(resolve(str(model))).decode(answer.token_ids)
            assert answer.accepted == inference_pb2.Accepted(
                request_id="r1", model=model.name, num_prompt_tokens=4, seed=5
            )
            finished = answer.finished
            assert finished is not None
            assert answer.reason == "LENGTH"
            assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (4, 12)
            assert finished.usage.cached_prompt_tokens == (3 if split else 0)
            assert finished.prefill_worker == ("p0/1" if split else "d0/1")
            assert finished.decode_worker == "d0/1"
            timing = finished.timing
            assert timing.prefill_s == 0.02
            assert 0.02 <= timing.ttft_s <= timing.total_s
            parts = timing.queue_s + timing.prefill_s + timing.transfer_s + timing.first_decode_step_s + timing.decode_s
            assert parts <= timing.total_s + 1e-6
            assert parts >= timing.total_s - 0.1
            await made.idle()
            assert not made.workers["d0"].aborts

    run(scenario())
