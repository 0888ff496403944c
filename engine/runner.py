"""Loads a model and computes steps with it: the engine's compute side."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.api import GenerateRequest, SamplingParams
from engine.attention import make_attention
from engine.batch import OnLayer, ScheduledSequence, StepPlan, StepResult
from engine.batch_builder import BatchBuilder
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.errors import EngineError
from engine.kv_cache import KVCache, blocks_for
from engine.layers.matrix import row_multiple
from engine.loader import iter_weights
from engine.model_source import resolve
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Place
from engine.parallel import TensorParallel
from engine.sampler import Sampler
from engine.sequence import Sequence

OnProgress = Callable[[int, int], None]


class ModelRunner:
    """One rank's model, KV cache and sampler. One thread at a time may call `run`."""

    def __init__(
        self,
        model: ModelOptions,
        cache: CacheOptions,
        options: EngineOptions,
        *,
        parallel: TensorParallel | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Load the model (on_progress hears weights done, weights in all) and allocate the cache.

        Sets the process's number of torch threads. Raises ModelError for a model that cannot be used,
        EngineError for a device that is not there, CapacityError for a cache that has no room for two blocks.
        """
        parallel = parallel or TensorParallel()
        if parallel.size != options.tensor_parallel:
            raise EngineError(
                f"tensor_parallel is {options.tensor_parallel}, but this runner is one of {parallel.size} ranks"
            )
        torch.set_num_threads(options.threads)
        self.device = choose_device(options.device)
        self.source = resolve(model.path)
        self.config = ModelConfig.load(self.source)
        self.dtype = choose_dtype(model.dtype, self.config, self.device)
        self.max_model_len = choose_max_model_len(model.max_model_len, self.config)
        self._max_step_tokens = options.max_step_tokens
        self._max_running = options.max_running
        num_kv_heads = len(parallel.share_kv_heads(self.config.num_kv_heads))
        self.kv_cache = KVCache(
            num_layers=self.config.num_layers,
            num_blocks=blocks_for(cache, self.config, self.dtype, num_kv_heads),
            block_size=cache.block_size,
            num_kv_heads=num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        num_heads = len(parallel.share(self.config.num_heads, "num_heads"))
        self._attention = make_attention(options.attention, self.kv_cache, num_heads)
        self._row_multiple = row_multiple(self.device, self.dtype)
        self._builder = BatchBuilder(block_size=cache.block_size, row_multiple=self._row_multiple, device=self.device)
        self._sampler = Sampler(self.config.eos_token_ids)
        self._decoder = self._load(parallel, on_progress)

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        """Compute a step; `on_layer` hears of each layer's KV before that layer's attention.

        Raises EngineError if the model gives logits that are not numbers.
        """
        batch = self._builder.build(plan, on_layer)
        logits = self._decoder.forward(batch, self.kv_cache, self._attention)
        sampling = [share.sequence for share in plan.shares if share.samples]
        if logits is None:
            return StepResult([None] * len(plan.shares))
        sampled = iter(self._sampler.sample(logits[: len(sampling)].float(), sampling))
        return StepResult([next(sampled) if share.samples else None for share in plan.shares])

    def warm_up(self) -> None:
        """Compute a few steps of typical shapes, so that no request pays for first-time work.

        Writes over the cache's contents: call it before the first request.
        """
        capacity = min(self.max_model_len - 1, self.kv_cache.num_slots)
        longest = min(self._max_step_tokens, capacity)
        self.run(StepPlan((self._share(longest),)))
        for num_seqs in range(1, self._max_running + 1, self._row_multiple):
            self.run(StepPlan((self._share(1),) * num_seqs))

    def _share(self, num_tokens: int) -> ScheduledSequence:
        """A made-up prompt of num_tokens, in the cache's first blocks."""
        request = GenerateRequest(request_id="warm-up", prompt_token_ids=(0,) * num_tokens, params=SamplingParams())
        sequence = Sequence.from_request(request, arrival=0.0)
        sequence.block_ids = list(range(-(-num_tokens // self.kv_cache.block_size)))
        return ScheduledSequence(sequence, 0, num_tokens)

    def _load(self, parallel: TensorParallel, on_progress: OnProgress | None) -> Decoder:
        decoder = Decoder(self.config, Place(self.dtype, self.device, parallel))
        for name, weight in iter_weights(
            self.source, self.config, dtype=self.dtype, device=self.device, on_progress=on_progress
        ):
            decoder.load(name, weight)
        return decoder


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


def choose_max_model_len(wanted: int | None, config: ModelConfig) -> int:
    """The most tokens of prompt and answer together; EngineError if more are wanted than the model can do."""
    if wanted is not None and wanted > config.max_model_len:
        raise EngineError(f"max_model_len is {wanted}, but this model was trained for {config.max_model_len} tokens")
    return wanted or config.max_model_len
