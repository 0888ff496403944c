"""A worker of two ranks on two GPUs, joined by NCCL, answers as one GPU does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.ranks import RankGroup
from tests.engine.rank_child import RankChild
from tests.engine.ranked import cache_options, engine_options, model_options
from tests.engine.test_overlap import answers, mixed_requests, stripped
from tests.gpu.common import DEVICE, GPU

pytestmark = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

STOP = 7
TIMEOUT_S = 60.0


def test_two_ranks_over_nccl_give_the_tokens_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    model, cache = model_options(tiny_llama), cache_options(block_size=16)
    with Engine(model, cache, engine_options(1, device=DEVICE.type)) as engine:
        alone = answers(engine, mixed_requests(STOP))
    path = str(tmp_path / "ranks.sock")
    child = RankChild(path, tiny_llama, 1, 2, TIMEOUT_S, device=DEVICE.type, gpu="1")
    try:
        group = RankGroup(path, 2, timeout_s=TIMEOUT_S)
        with Engine(model, cache, engine_options(2, device=DEVICE.type), ranks=group) as engine:
            child.event("ready")
            found = answers(engine, mixed_requests(STOP))
        child.event("ended")
    finally:
        child.close()
    for request, one, several in zip(mixed_requests(STOP), alone, found, strict=True):
        assert stripped(several) == stripped(one), request.request_id
