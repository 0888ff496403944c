"""What a user may set about a model, its cache and the engine that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.pace import PaceOptions

DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which model is served."""

    path: str
    """`demo`, a .gguf file, or a Hugging Face directory (config.json, tokenizer.json, *.safetensors)."""
    name: str | None = None
    """The name clients use; default: the file's or directory's name."""
    dtype: DType = "auto"
    """Type of weights and KV; auto: float32 on a CPU, the checkpoint's own on a GPU."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; default: what the model was trained for."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: the checkpoint's own weights; dummy: random ones made on the device (only the header is read)."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a model: demo, a .gguf file or a Hugging Face directory")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len must be at least 2, got {self.max_model_len}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """The paged KV cache of each worker."""

    block_size: int | None = None
    """Tokens a block: 8, 16, 32, 64 or 128; default: 16 on a CPU, 128 on a GPU, where a prompt of 8,192 tokens is
    computed 1.4 % faster than with 16, and decode alike (benchmarks/RESULTS.md). Prefixes are shared by whole
    blocks; workers that exchange KV need the same size."""
    num_blocks: int | None = None
    """Blocks of a worker; default: as many as fit into memory_mib."""
    memory_mib: int | None = None
    """Memory for KV, in MiB, when num_blocks is not given; default: 512 on a CPU, on a GPU what gpu_memory_share leaves
    after weights and the measured peak of a step."""
    gpu_memory_share: float = 0.9
    """Most of a GPU's memory that one worker uses for weights, work space and KV together, from 0 to 1, and less where
    others leave less. Workers that share a GPU (num_gpus below 1) need shares that add up to less than 1."""
    prefix_caching: bool = True
    """Keep finished blocks findable by content, so that equal prefixes are computed once."""

    def __post_init__(self) -> None:
        if self.block_size not in (None, 8, 16, 32, 64, 128):
            raise ValueError(f"block_size must be 8, 16, 32, 64 or 128, got {self.block_size}")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2, got {self.num_blocks}")
        if not 0.0 < self.gpu_memory_share <= 1.0:
            raise ValueError(f"gpu_memory_share must be more than 0 and at most 1, got {self.gpu_memory_share}")
        if self.memory_mib is not None and self.memory_mib < 1:
            raise ValueError(f"memory_mib must be at least 1, got {self.memory_mib}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How one engine computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto: a GPU where there is one."""
    threads: int = 1
    """CPU threads an engine process may use for tensor work."""
    max_step_tokens: int | None = None
    """Most tokens computed in one step: longer prompts are cut into chunks of this size; default: 512 on a CPU,
    2,048 on a GPU. On a GPU the last chunk may be a quarter longer."""
    prompt_share: float | None = None
    """Most of a step that prompts take where streams run beside them, as a share of max_step_tokens: with a smaller one
    streams are smoother, and prompts take longer. Default: 1, and 0.25 in the decode pool of a split cluster."""
    max_running: int = 64
    """Most sequences in one step."""
    attention: Literal["auto", "sdpa", "triton", "flash"] = "auto"
    """Attention backend. sdpa: torch's own, anywhere; triton: a split-KV kernel for decoding and torch's flash
    attention for prompts; flash: the same kernel and flash-attn-4 for prompts; auto: the fastest that runs here."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Schedule a step while the one before it is still computed; auto: on a GPU, and where steps are paced."""
    cuda_graphs: bool = True
    """Record the steps of common sizes once and replay them; a CPU has none."""
    tensor_parallel: int = 1
    """Ranks of one worker, which share every layer: each is a process, with a GPU of its own where there are GPUs."""
    rank_timeout_s: float = 10.0
    """Longest that one rank of a worker may be silent, in seconds; one that says that it lives may keep the others
    waiting within a step for twice as long (on a CPU). Then all ranks of the worker start again."""
    pace: PaceOptions | None = None
    """Rehearsal: each step takes at least as long as on other hardware, by costs given here. Default: steps take their
    own time."""

    def __post_init__(self) -> None:
        for name in ("threads", "max_step_tokens", "max_running", "tensor_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.prompt_share is not None and not 0 < self.prompt_share <= 1:
            raise ValueError(f"prompt_share must be more than 0 and at most 1, got {self.prompt_share}")
        if not 0 < self.rank_timeout_s <= 3600:
            raise ValueError(f"rank_timeout_s must be more than 0 and at most 3600 seconds, got {self.rank_timeout_s}")
        if self.max_step_tokens is not None and self.max_running > self.max_step_tokens:
            raise ValueError(
                f"max_running ({self.max_running}) must not exceed max_step_tokens ({self.max_step_tokens}): "
                "every running sequence needs one token of a step"
            )
