"""Recorded steps give what the same steps give when they are launched one by one."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.api import GenerateRequest, TokenOutput
from engine.attention.prompts import can_flash
from engine.batch import LayerHook
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from engine.graphs import RecordedStep
from engine.sequence import Sequence
from tests.engine.checkpoints import VOCAB_SIZE, CheckpointFamily, make_checkpoint
from tests.engine.driver import Driver, random_prompt
from tests.engine.test_overlap import answers, make_request, mixed_requests, stripped
from tests.gpu.common import DEVICE, DTYPES, GPU, count_alike, make_gpu_runner

pytestmark = GPU

BFLOAT16_BOUND = 0.3
"""Log-probabilities of the tiny models move so far, at most, where a product has another number of rows."""
DELAY_CYCLES = 100_000_000
"""Some 50 ms of a GPU's time: what is enqueued behind it has certainly not begun when its launch returns."""


def make_engine(path: Path, dtype: str, *, graphs: bool, prefix_caching: bool = True) -> Engine:
    cache = CacheOptions(block_size=16, num_blocks=400, prefix_caching=prefix_caching)
    options = EngineOptions(device=DEVICE.type, max_step_tokens=256, max_running=12, cuda_graphs=graphs)  # type: ignore[arg-type]
    engine = Engine(ModelOptions(path=str(path), dtype=dtype), cache, options)  # type: ignore[arg-type]
    engine.runner.warm_up()
    return engine


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a recording of each kind was replayed."""
    counts: Counter[str] = Counter()
    replay = RecordedStep.replay

    def counted(step: RecordedStep, *arguments: Any) -> Any:
        counts["prompts" if step._events else "decode"] += 1
        return replay(step, *arguments)

    monkeypatch.setattr(RecordedStep, "replay", counted)
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [CheckpointFamily.LLAMA, CheckpointFamily.QWEN2, CheckpointFamily.QWEN3])
def test_tokens_are_the_same_with_and_without(
    tmp_path: Path, replays: Counter[str], family: CheckpointFamily, dtype: str
) -> None:
    """Greedy, drawn, penalised, stopped and with log-probabilities, all at once; then in company of their prefixes."""
    make_checkpoint(tmp_path, family, tied=True)
    requests = mixed_requests(stop=7) + [make_request(f"more {n}", 10 * n + 1, max_tokens=30) for n in range(9)]
    found: list[list[list[TokenOutput]]] = []
    for graphs in (False, True):
        assert not replays
        with make_engine(tmp_path, dtype, graphs=graphs) as engine:
            replays.clear()  # those of the warm-up
            found.append(answers(engine, requests) + answers(engine, requests))
            flash = can_flash(engine.runner.kv_cache)
    assert replays["decode"] > 40
    assert (replays["prompts"] > 3) == flash
    check_alike(requests * 2, *found, exact=dtype == "float32")


def check_alike(
    requests: list[GenerateRequest], eager: list[list[TokenOutput]], recorded: list[list[TokenOutput]], *, exact: bool
) -> None:
    """In float32 every token is the same; in 16 bits most are, and none is wrong as far as can be told."""
    alike, total = 0, 0
    for request, first, second in zip(requests, eager, recorded, strict=True):
        tokens, others = list(tokens_of(first)), list(tokens_of(second))
        same = [one == other for one, other in zip(tokens, others, strict=False)]
        alike += (*same, False).index(False)
        total += len(tokens)
        if exact:
            assert stripped(second) == stripped(first), request.request_id
        if (request.params.logprobs or 0) > 1:
            shared = min(len(first), len(second))
            ours, theirs = ([item for output in part[:shared] for item in output.logprobs] for part in (second, first))
            count_alike(ours, theirs, bound=1e-3 if exact else BFLOAT16_BOUND, greedy=request.params.temperature == 0)
    assert alike >= total * (1.0 if exact else 0.8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graphs", [True, False], ids=["recorded", "launched"])
@pytest.mark.parametrize("layers", [None, range(1, 3)], ids=["all layers", "the last two"])
def test_layers_are_told_and_their_kv_is_there_after_their_events(
    tiny_llama: Path, replays: Counter[str], layers: range | None, graphs: bool, dtype: str
) -> None:
    """More than once, for a recording's events come again; for prompts and for single tokens."""
    runner = make_gpu_runner(tiny_llama, dtype, max_running=4, max_step_tokens=128, cuda_graphs=graphs)
    runner.warm_up()
    replays.clear()
    driver = Driver(runner)
    for length in (40, 33, 100):
        sequence = driver.add(random_prompt(length, VOCAB_SIZE), max_tokens=4)
        check_step(driver, sequence, range(length), layers)
        check_step(driver, sequence, range(length, length + 1), layers)
    flash = can_flash(runner.kv_cache)
    assert dict(replays) == ({"decode": 3} | ({"prompts": 3} if flash else {}) if graphs else {})


def check_step(driver: Driver, sequence: Sequence, places: range, layers: range | None) -> None:
    """One step, delayed, that writes the KV of these tokens; what lies there after each event is read beside it.

    After a layer's event that of all layers up to it is there, also of those nobody was told of.
    """
    cache, side = driver.runner.kv_cache, torch.cuda.Stream()
    slots = [sequence.block_ids[place // 16] * 16 + place % 16 for place in places]
    index = torch.tensor(slots, device=DEVICE)
    cache.data.index_fill_(3, index, 0.0)
    torch.cuda.synchronize()
    told: list[int] = []
    seen: list[torch.Tensor] = []

    def on_layer(layer: int, event: Any) -> None:
        told.append(layer)
        assert isinstance(event, torch.cuda.Event)
        side.wait_event(event)
        with torch.cuda.stream(side):
            seen.extend(cache.layer(each).index_select(2, index) for each in range(len(seen), layer + 1))

    torch.cuda._sleep(DELAY_CYCLES)
    driver.step([sequence], hook=LayerHook(on_layer, layers=layers))
    torch.cuda.synchronize()
    assert told == list(layers or range(cache.num_layers))
    assert len(seen) == told[-1] + 1
    for layer, found in enumerate(seen):
        assert torch.equal(found, cache.layer(layer).index_select(2, index))
        assert bool(found.abs().amax(dim=-1).gt(0).all())


def test_memory_does_not_grow(tiny_llama: Path, replays: Counter[str]) -> None:
    """After 10,000 steps of decoding as much is allocated and reserved as after the first few hundred."""
    requests = [
        make_request("greedy", 20, max_tokens=120, ignore_eos=True),
        make_request("drawn", 9, max_tokens=120, ignore_eos=True, temperature=0.9, top_p=0.9, seed=1),
        make_request("likeliest few", 30, max_tokens=110, ignore_eos=True, temperature=1.1, top_k=9, seed=2),
        make_request("penalised", 12, max_tokens=120, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.5),
        make_request("logprobs", 40, max_tokens=100, ignore_eos=True, logprobs=5),
        make_request("short", 5, max_tokens=10, ignore_eos=True),
    ]
    with make_engine(tiny_llama, "bfloat16", graphs=True, prefix_caching=False) as engine:
        for _ in range(2):
            answers(engine, requests)
        after_hundreds, steps = memory_of(engine)
        assert 100 < steps < 1000
        while steps < 10_000 + 100:
            answers(engine, requests)
            after_thousands, steps = memory_of(engine)
    assert after_thousands == after_hundreds
    assert replays["decode"] > 9_000


def memory_of(engine: Engine) -> tuple[tuple[int, int], int]:
    """Bytes allocated and reserved while nothing is computed, and steps so far."""

    def read() -> tuple[tuple[int, int], int]:
        gc.collect()
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return (allocated, reserved), engine.scheduler.stats().steps

    return engine.loop.call(read).result(30.0)
