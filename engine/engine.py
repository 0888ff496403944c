"""One engine: model, KV cache, scheduler and loop put together.

Alone it answers whole requests (`generate`), prefill and decode in one process: the baseline and
the oracle of split serving. In a worker the pools submit sequences through `loop` and `scheduler`.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from engine.api import GenerateRequest, TokenOutput
from engine.block_hash import root_hash
from engine.block_pool import BlockPool
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.errors import EngineError, InvalidRequestError
from engine.kv_cache import bytes_per_block
from engine.loop import EngineLoop, Runner
from engine.model_source import fingerprint
from engine.pace import PaceOptions
from engine.paced_runner import PacedRunner
from engine.ranks import STEP_TIMEOUT_S, LeadingRunner, RankGroup
from engine.runner import ModelRunner, choose_device
from engine.scheduler import Emitted, Scheduler
from engine.sequence import Sequence

OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class _Collected:
    """What `generate` gathers for one request."""

    outputs: list[TokenOutput]
    done: threading.Event


class Engine:
    """A model ready to compute; use as a context manager or call start and stop."""

    def __init__(
        self,
        model: ModelOptions,
        cache: CacheOptions | None = None,
        options: EngineOptions | None = None,
        *,
        on_progress: OnProgress | None = None,
        ranks: RankGroup | None = None,
    ) -> None:
        """Load the model (on_progress hears bytes of weights done, bytes in all) and set up the cache.

        With `ranks` this is rank 0 of a worker of several: it meets them first, and ends them when it stops.
        Raises ModelError for a model that cannot be used, CapacityError where memory does not suffice, RankLostError
        where another rank does not come, or fails.
        """
        cache = cache or CacheOptions()
        options = options or EngineOptions()
        self.ranks = ranks
        """The worker's other ranks; None: there are none."""
        self.runner = self._make_runner(model, cache, options, on_progress)
        num_blocks = self.runner.kv_cache.num_blocks
        self.max_model_len = min(self.runner.max_model_len, num_blocks * self.runner.block_size)
        self.model_hash = fingerprint(self.runner.source, model.load_format)
        dtype = str(self.runner.dtype).removeprefix("torch.")
        self.pool = BlockPool(num_blocks, prefix_caching=cache.prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            block_size=self.runner.block_size,
            root_hash=root_hash(self.model_hash, dtype, self.runner.block_size),
            limits=self.runner.limits,
            max_running=options.max_running,
            max_model_len=self.max_model_len,
            eos_token_ids=self.runner.config.eos_token_ids,
        )
        self.is_paced = options.pace is not None
        """Whether steps take the time of other hardware: what is measured here is a rehearsal."""
        self.loop = EngineLoop(self.scheduler, self._paced(self._lead(), options.pace))

    def start(self) -> None:
        """Start the loop's thread.

        While it runs, Python's garbage collector leaves out what was made before: to look through a model and the
        libraries behind it takes it 100 ms and more, and every stream would wait for that.
        """
        gc.freeze()
        if self.ranks is not None:
            self.ranks.settle()
        self.loop.start()

    def stop(self) -> None:
        """Stop the loop's thread, and end the other ranks."""
        gc.unfreeze()
        try:
            self.loop.stop()
        finally:
            if self.ranks is not None:
                self.ranks.close()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def validate(self, request: GenerateRequest) -> None:
        """Raise InvalidRequestError if this engine can never serve the request."""
        length = len(request.prompt_token_ids)
        if length == 0:
            raise InvalidRequestError("the prompt is empty", field="prompt_token_ids")
        total = length + len(request.resume_from)
        if total >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {total} tokens, the limit is {self.max_model_len - 1} "
                f"(a context of {self.max_model_len} and room for one new token)",
                field="prompt_token_ids",
            )
        vocab_size = self.runner.config.vocab_size
        tokens = request.prompt_token_ids
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            index, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab_size)
            raise InvalidRequestError(
                f"token id {token} at index {index} is outside the vocabulary of {vocab_size}",
                field=f"prompt_token_ids[{index}]",
            )
        for token in request.resume_from:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"token id {token} is outside the vocabulary of {vocab_size}", field="resume_from"
                )

    def generate(self, requests: Iterable[GenerateRequest], timeout_s: float = 600.0) -> list[list[TokenOutput]]:
        """Answer requests together; returns each one's outputs, in the order given.

        Takes over the loop's `on_step`, so it is for an engine that serves nobody else.
        """
        requests = list(requests)
        for request in requests:
            self.validate(request)
        collected = {request.request_id: _Collected([], threading.Event()) for request in requests}
        if len(collected) != len(requests):
            raise InvalidRequestError("two requests have the same request_id", field="request_id")
        self.loop.on_step = lambda emitted: _collect(collected, emitted)
        now = time.monotonic()
        sequences = [Sequence.from_request(request, now + index * 1e-9) for index, request in enumerate(requests)]
        self.loop.post(lambda: self._add_all(sequences))
        deadline = now + timeout_s
        for request in requests:
            if not collected[request.request_id].done.wait(max(0.0, deadline - time.monotonic())):
                raise EngineError(f"request {request.request_id} was not answered within {timeout_s} s")
        return [collected[request.request_id].outputs for request in requests]

    def _make_runner(
        self, model: ModelOptions, cache: CacheOptions, options: EngineOptions, on_progress: OnProgress | None
    ) -> ModelRunner:
        if self.ranks is None:
            return ModelRunner(model, cache, options, on_progress=on_progress)
        try:
            parallel = self.ranks.connect(choose_device(options.device))
            return ModelRunner(model, cache, options, parallel=parallel, on_progress=on_progress)
        except BaseException:
            self.ranks.close()
            raise

    def _lead(self) -> Runner:
        """What the loop launches steps with."""
        if self.ranks is None:
            return self.runner
        on_gpu = self.runner.device.type == "cuda"
        return LeadingRunner(self.runner, self.ranks, step_timeout_s=STEP_TIMEOUT_S if on_gpu else None)

    def _paced(self, runner: Runner, pace: PaceOptions | None) -> Runner:
        """The same, as slow as the options say."""
        if pace is None:
            return runner
        config = self.runner.config
        token_bytes = bytes_per_block(config, config.num_kv_heads, 1, self.runner.dtype)
        return PacedRunner(runner, pace, token_bytes)

    def _add_all(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def check_integrity(self, reserved: Iterable[Sequence] = ()) -> None:
        """Raise IntegrityError unless all blocks are held by exactly those who should (loop thread only)."""
        holders = [*self.scheduler.sequences(), *reserved]
        self.pool.check_integrity([sequence.block_ids for sequence in holders])


def _collect(collected: dict[str, _Collected], emitted: list[Emitted]) -> None:
    for sequence, output in emitted:
        entry = collected[sequence.request.request_id]
        entry.outputs.append(output)
        if output.finish_reason is not None:
            entry.done.set()


def tokens_of(outputs: Iterable[TokenOutput]) -> Iterator[int]:
    """All token ids of a stream of outputs."""
    for output in outputs:
        yield from output.token_ids
