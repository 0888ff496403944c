"""Workers of several ranks exchange KV, whatever their numbers of ranks: the same tokens as one engine alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from protos import worker_pb2 as pb
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.ranked_peer import RankedPeer
from tests.session_pair import make_request, reserve, split_generate, start_prefill

VOCAB = 400
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (4, 2)]
LENGTHS = [1, 15, 17, 100]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 10_007 + length).choices(range(3, VOCAB), k=length)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module", params=[1, 2, 4])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with so many KV heads."""
    directory = tmp_path_factory.mktemp(f"kv{request.param}")
    return make_checkpoint(directory, CheckpointFamily.QWEN3, tied=False, num_kv_heads=request.param)


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), SHAPES)
def test_split_over_ranks_equals_alone(model: Path, tmp_path: Path, prefill_ranks: int, decode_ranks: int) -> None:
    """Chunks, prefix hits on both sides, sampling with a seed; nothing is left open anywhere."""
    requests = [make_request(f"len{length}", prompt_of(length)) for length in LENGTHS]
    requests.append(make_request("again", [*prompt_of(100), *prompt_of(20, seed=6)]))
    requests.append(make_request("seed", prompt_of(40), temperature=1.0, top_p=0.9, seed=3))
    cache = CacheOptions(block_size=16, num_blocks=64)
    with Engine(ModelOptions(path=str(model)), cache, EngineOptions(max_step_tokens=64)) as engine:
        alone = [list(tokens_of(engine.generate([request])[0])) for request in requests]
    with (
        RankedPeer("p", model, tmp_path, prefill_ranks) as prefill,
        RankedPeer("d", model, tmp_path, decode_ranks) as decode,
    ):
        assert [split_generate(prefill, decode, request) for request in requests] == alone
        for peer in (prefill, decode):
            wait_until(lambda peer=peer: peer.session.num_open() == 0)  # type: ignore[misc]
            stats = peer.check()
            assert stats.free_blocks == stats.num_blocks
            assert stats.open_tickets == stats.open_sends == 0


def test_an_abort_frees_every_rank(model: Path, tmp_path: Path) -> None:
    with RankedPeer("p", model, tmp_path, 2) as prefill, RankedPeer("d", model, tmp_path, 1) as decode:
        for phase in ("reserved", "prefilling"):
            request = make_request(phase, prompt_of(600, seed=4), max_tokens=300)
            ticket = reserve(decode, request).reserve.ticket
            if phase == "prefilling":
                replies = start_prefill(prefill, request, ticket)
            abort = pb.AbortRequest(request_id=request.request_id, attempt=0, reason="test")
            assert decode.call(pb.EngineCommand(abort_decode=abort)).abort.found
            prefill.call(pb.EngineCommand(abort_prefill=abort))
            if phase == "prefilling":
                assert replies.get(timeout=60).WhichOneof("result") in ("error", "prefill")
            for peer in (prefill, decode):
                wait_until(lambda peer=peer: peer.session.num_open() == 0)  # type: ignore[misc]
                stats = peer.check()
                assert stats.free_blocks == stats.num_blocks
        request = make_request("after", prompt_of(33))
        assert len(split_generate(prefill, decode, request)) == 12
