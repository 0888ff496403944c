"""Loads a model and computes steps with it: the engine's compute side.

On a GPU `launch` only enqueues. Everything one step needs of the one before it (the tokens chosen) stays on the device,
so a step may be launched before the one before it is done.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from engine.api import GenerateRequest, SamplingParams
from engine.attention import make_attention
from engine.batch import LayerHook, ScheduledSequence, StepPlan, StepResult
from engine.batch_builder import BatchBuilder
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.dummy_weights import dummy_weights
from engine.errors import EngineError
from engine.kv_cache import KVCache, bytes_per_block
from engine.layers.matrix import row_multiple
from engine.loader import iter_weights
from engine.memory import PeakMeter, blocks_left, configured_blocks, explain_out_of_memory
from engine.model_source import resolve
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Place
from engine.parallel import TensorParallel
from engine.sampler import Sampled, Sampler, choose_greedy
from engine.sequence import Sequence
from engine.step_budget import StepLimits
from engine.upload import mark

if TYPE_CHECKING:
    from engine.graphs import StepGraphs

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 512, 2048
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 16, 128


class LaunchedStep:
    """A step that is being computed."""

    def __init__(
        self, plan: StepPlan, sampled: Sampled | None, done: torch.cuda.Event | None, kv_cache: KVCache
    ) -> None:
        self._plan = plan
        self._sampled = sampled
        self._done = done
        self._cache = kv_cache

    def result(self) -> StepResult:
        """Wait for the step; EngineError if the model gave logits that are not numbers."""
        if self._done is not None:
            self._done.synchronize()
        try:
            sampled = iter(self._sampled.wait() if self._sampled is not None else ())
        except EngineError:
            self._cache.scrub()
            raise
        return StepResult([next(sampled) if share.samples else None for share in self._plan.shares])


class ModelRunner:
    """One rank's model, KV cache and sampler. One thread at a time may call `launch`."""

    def __init__(
        self,
        model: ModelOptions,
        cache: CacheOptions,
        options: EngineOptions,
        *,
        parallel: TensorParallel | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Load the model (on_progress hears bytes of weights done, bytes in all) and allocate the cache.

        Sets the process's number of torch threads. Raises ModelError for a model that cannot be used,
        EngineError for a device that is not there, CapacityError where memory does not suffice.
        """
        parallel = parallel or TensorParallel()
        self.parallel = parallel
        if parallel.size != options.tensor_parallel:
            raise EngineError(
                f"tensor_parallel is {options.tensor_parallel}, but this runner is one of {parallel.size} ranks"
            )
        torch.set_num_threads(options.threads)
        self.device = choose_device(options.device)
        self.source = resolve(model.path, model.load_format)
        self.config = ModelConfig.load(self.source)
        self.dtype = choose_dtype(model.dtype, self.config, self.device)
        self.max_model_len = choose_max_model_len(model.max_model_len, self.config)
        self.limits = choose_limits(options, self.device)
        self.block_size = cache.block_size or (CPU_BLOCK_SIZE if self.device.type == "cpu" else GPU_BLOCK_SIZE)
        runs_alone = self.device.type == "cuda" or options.pace is not None
        self.run_ahead = int(options.overlap == "on" or (options.overlap == "auto" and runs_alone))
        self._options = options
        self._row_multiple = row_multiple(self.device, self.dtype)
        self._num_kv_heads = len(parallel.share_kv_heads(self.config.num_kv_heads))
        self._num_heads = len(parallel.share(self.config.num_heads, "num_heads"))
        self._builder = BatchBuilder(block_size=self.block_size, row_multiple=self._row_multiple, device=self.device)
        self._sampler = Sampler(self.config.eos_token_ids)
        self._choices = torch.zeros(max(options.max_running, 16), 2, dtype=torch.int64, device=self.device)
        self._rows_of: dict[Sequence, int] = {}
        """Where in _choices the step launched last puts each sequence's token."""
        self._graphs: StepGraphs | None = None
        with _out_of_memory_explained(self.device, "while the weights were loaded"):
            self._decoder = self._load(model, parallel, on_progress)
        parallel.meet("model loaded")
        with _out_of_memory_explained(self.device, "while the KV cache was made"):
            self.kv_cache = self._make_cache(parallel.least(self._count_blocks(cache), "num_blocks"))
        self._attention = make_attention(options.attention, self.kv_cache, self._num_heads)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step and wait for it."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> LaunchedStep:
        """Begin to compute a step; the hook's `on_layer` hears of its layers' KV, in order, once it is enqueued."""
        arrays = self._builder.arrays(plan, self._rows_of)
        sampling = [share for share in plan.shares if share.samples]
        choices = self._choices[: len(sampling)]
        forward = self._graphs.replay(arrays, hook) if self._graphs is not None else None
        if forward is None:
            batch = self._builder.build(arrays, self._choices, hook)
            self._attention.plan(batch)
            forward = self._decoder.forward(batch, self.kv_cache, self._attention)
            if forward.logits is not None:
                choose_greedy(forward.logits[: len(sampling)], choices)
        self._rows_of = {share.sequence: row for row, share in enumerate(sampling)}
        sampled = None
        if forward.logits is not None and sampling:
            logits, rows = forward.logits[: len(sampling)], arrays.sample_indices.tolist()
            sampled = self._sampler.sample(logits, sampling, forward.token_ids, rows, choices)
        return LaunchedStep(plan, sampled, mark(self.device) if sampled is None else None, self.kv_cache)

    def mark(self) -> torch.cuda.Event | None:
        """On a GPU: an event behind everything launched so far; None on a CPU, where it is done."""
        return mark(self.device)

    def warm_up(self, on_progress: OnProgress | None = None) -> None:
        """Compute steps of typical shapes, so that no request pays for first-time work, and record the common ones.

        on_progress hears (recorded, to be recorded). Writes over the cache's contents: call it before any request.
        """
        began = time.monotonic()
        capacity = min(self.max_model_len - 1, self.kv_cache.num_slots)
        self._run_typical(min(self.limits.most_tokens, capacity))
        self.kv_cache.warm_up()
        if self.device.type == "cuda" and self._options.cuda_graphs and self._options.tensor_parallel == 1:
            self._record_graphs(on_progress or (lambda done, total: None))
        log.info("warmed up", extra={"seconds": round(time.monotonic() - began, 2)})

    def _run_typical(self, longest: int) -> None:
        """The longest chunk, and as many rows as may run, in each way of sampling."""
        num_prompts = max(1, min(self.limits.most_tokens // longest, self._options.max_running))
        self.run(StepPlan((self._share(longest),) * num_prompts))
        if self.device.type == "cpu":
            for num_seqs in range(1, self._options.max_running + 1, self._row_multiple):
                self.run(StepPlan((self._share(1),) * num_seqs))
            return
        drawn = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, logprobs=5)
        for params in (SamplingParams(), drawn):
            self.run(StepPlan((self._share(1, params),) * self._options.max_running))
        self.run(StepPlan((self._share(1), self._share(max(2, longest // 2)))))

    def _record_graphs(self, on_progress: OnProgress) -> None:
        from engine.attention.paged import PagedAttention
        from engine.graphs import StepGraphs

        if not isinstance(self._attention, PagedAttention):
            return
        graphs = StepGraphs(self._decoder, self.kv_cache, self._attention, self._choices, self.max_model_len)
        with _out_of_memory_explained(self.device, "while steps were recorded"):
            graphs.record(self._options.max_running, self.limits.most_tokens, on_progress)
        self._graphs = graphs

    def _share(self, num_tokens: int, params: SamplingParams | None = None) -> ScheduledSequence:
        """A made-up prompt of num_tokens, in the cache's first blocks."""
        request = GenerateRequest(
            request_id="warm-up", prompt_token_ids=(0,) * num_tokens, params=params or SamplingParams()
        )
        sequence = Sequence.from_request(request, arrival=0.0)
        sequence.block_ids = list(range(-(-num_tokens // self.kv_cache.block_size)))
        return ScheduledSequence.next_of(sequence, num_tokens)

    def _load(self, model: ModelOptions, parallel: TensorParallel, on_progress: OnProgress | None) -> Decoder:
        decoder = Decoder(self.config, Place(self.dtype, self.device, parallel))
        if model.load_format == "dummy":
            weights = dummy_weights(self.config, dtype=self.dtype, device=self.device, on_progress=on_progress)
        else:
            weights = iter_weights(
                self.source, self.config, dtype=self.dtype, device=self.device, on_progress=on_progress
            )
        with contextlib.closing(weights):
            for name, weight in weights:
                decoder.load(name, weight)
        return decoder

    def _make_cache(self, num_blocks: int) -> KVCache:
        return KVCache(
            num_layers=self.config.num_layers,
            num_blocks=num_blocks,
            block_size=self.block_size,
            num_kv_heads=self._num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def _count_blocks(self, cache: CacheOptions) -> int:
        """As configured, or what a GPU has left after weights and the measured peak of its largest steps."""
        block_bytes = bytes_per_block(self.config, self._num_kv_heads, self.block_size, self.dtype)
        configured = configured_blocks(cache, block_bytes, self.device)
        if configured is not None:
            return configured
        meter = PeakMeter(self.device, cache.gpu_memory_share)
        longest = min(self.limits.most_tokens, self.max_model_len - 1)
        self.kv_cache = self._make_cache(-(-longest // self.block_size))
        self._attention = make_attention(self._options.attention, self.kv_cache, self._num_heads)
        self._run_typical(longest)
        use = meter.read(extra=self.kv_cache.data.nbytes)
        del self.kv_cache, self._attention
        torch.cuda.empty_cache()
        num_blocks = blocks_left(use, block_bytes)
        log.info("room for KV: %s", use, extra={"num_blocks": num_blocks})
        return num_blocks


@contextlib.contextmanager
def _out_of_memory_explained(device: torch.device, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error, device, what) from error


def choose_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU if there is one. EngineError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError("device is cuda, but torch sees no GPU; set device to cpu or auto")
    return torch.device(name)


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of weights and KV; auto: float32 on a CPU, the checkpoint's own on a GPU."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else config.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_limits(options: EngineOptions, device: torch.device) -> StepLimits:
    """How long steps may be; a default is never less than the sequences that may run.

    On a GPU a step of few tokens reads all the weights for them, so the end of a prompt is not left to one.
    """
    on_gpu = device.type != "cpu"
    most = options.max_step_tokens or max(options.max_running, GPU_STEP_TOKENS if on_gpu else CPU_STEP_TOKENS)
    limits = StepLimits(max_tokens=most, mixed_tokens=most, slack_tokens=most // 4 if on_gpu else 0)
    return limits.with_prompt_share(options.prompt_share or 1.0)


def choose_max_model_len(wanted: int | None, config: ModelConfig) -> int:
    """The most tokens of prompt and answer together; EngineError if more are wanted than the model can do."""
    if wanted is not None and wanted > config.max_model_len:
        raise EngineError(f"max_model_len is {wanted}, but this model was trained for {config.max_model_len} tokens")
    return wanted or config.max_model_len
