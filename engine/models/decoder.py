"""The forward pass of all families: a pre-norm decoder with rotary positions, grouped-query attention and a
SiLU-gated feed-forward. Where Llama, Mistral, Qwen2 and Qwen3 differ (biases, norms of queries and keys, tied
embeddings, RoPE scaling), ModelConfig says so.

Shapes: num_tokens = the step's tokens; num_rows = num_tokens padded at the end to what the matrices like
(`layers.matrix`); num_heads and num_kv_heads are this rank's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch

from engine.attention.base import AttentionBackend
from engine.batch import Batch
from engine.errors import IntegrityError
from engine.kv_cache import KVCache
from engine.layers.embedding import ParallelHead, VocabParallelEmbedding
from engine.layers.linear import ColumnParallelLinear, Kind, LinearSpec, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Positions, RotaryEmbedding
from engine.models.config import ModelConfig
from engine.parallel import TensorParallel
from engine.upload import mark

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(?:.+\.)?(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model's weights lie, and which share of them."""

    dtype: torch.dtype
    device: torch.device
    parallel: TensorParallel


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward pass needs."""

    batch: Batch
    positions: Positions
    kv_cache: KVCache
    attention: AttentionBackend


class Layer:
    """One decoder layer: attention and feed-forward, each added to what came in."""

    def __init__(self, index: int, config: ModelConfig, place: Place) -> None:
        self._index = index
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        heads = place.parallel.share(config.num_heads, "num_heads")
        kv_heads = place.parallel.share_kv_heads(config.num_kv_heads)
        inner = place.parallel.share(config.intermediate_size, "intermediate_size")
        self._num_heads, self._num_kv_heads = len(heads), len(kv_heads)
        query, key = (range(r.start * config.head_dim, r.stop * config.head_dim) for r in (heads, kv_heads))

        def spec(inputs: int, bias: bool) -> LinearSpec:
            return LinearSpec(inputs=inputs, bias=bias, dtype=place.dtype, device=place.device)

        hidden = config.hidden_size
        self._qkv = ColumnParallelLinear(
            spec(hidden, config.attention_bias), {"q_proj": query, "k_proj": key, "v_proj": key}
        )
        self._output = RowParallelLinear(spec(len(query), config.output_bias), "o_proj", hidden, query, place.parallel)
        self._gate_up = ColumnParallelLinear(spec(hidden, config.mlp_bias), {"gate_proj": inner, "up_proj": inner})
        self._down = RowParallelLinear(spec(len(inner), config.mlp_bias), "down_proj", hidden, inner, place.parallel)
        self._norms: dict[str, RMSNorm] = {}

    def load(self, name: str, kind: Kind, weight: torch.Tensor) -> None:
        """Take in one whole weight of this layer by the last part of its Hugging Face name."""
        match name:
            case "q_proj" | "k_proj" | "v_proj":
                self._qkv.load(name, kind, weight)
            case "gate_proj" | "up_proj":
                self._gate_up.load(name, kind, weight)
            case "o_proj":
                self._output.load(name, kind, weight)
            case "down_proj":
                self._down.load(name, kind, weight)
            case _:
                self._norms[name] = RMSNorm(weight, self._eps)

    def forward(self, hidden: torch.Tensor, step: Step, rows: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [num_rows, hidden_size] -> the same; with `rows`, only those rows of it come out."""
        mixed = self._attend(hidden, step)
        if rows is not None:
            mixed, hidden = mixed.index_select(0, rows), hidden.index_select(0, rows)
        hidden = self._output(mixed, hidden)
        inner = self._gate_up.gated(hidden, self._norms["post_attention_layernorm"])
        return self._down(inner, hidden)

    def _attend(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x [num_rows, hidden_size] -> [num_rows, num_heads * head_dim]."""
        num_heads, num_kv_heads, batch = self._num_heads, self._num_kv_heads, step.batch
        heads = self._qkv(x, self._norms["input_layernorm"])
        heads = heads.view(x.shape[0], num_heads + 2 * num_kv_heads, self._head_dim)
        q_norm, k_norm = self._norms.get("q_norm"), self._norms.get("k_norm")
        q = step.positions.place(heads, step.kv_cache.layer(self._index), q_norm, k_norm)
        listener = batch.hook.listener(self._index) if batch.hook is not None else None
        if listener is not None:
            listener(self._index, mark(x.device))
        return step.attention.forward(q, self._index, batch)


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward pass gives."""

    logits: torch.Tensor | None  # [num_samples, vocab_size], of the sampling rows; None if no row samples
    token_ids: torch.Tensor  # [num_rows] int64, the tokens that went in


class Decoder:
    """A whole model, or one rank's share of it.

    Made empty, filled with `load` by Hugging Face names; once every weight has come, `forward` may be called.
    """

    def __init__(self, config: ModelConfig, place: Place) -> None:
        self._config = config
        self._place = place
        self._rotary = RotaryEmbedding(config, place.dtype, place.device)
        self._layers = [Layer(index, config, place) for index in range(config.num_layers)]
        self._embedding: VocabParallelEmbedding
        self._norm: RMSNorm
        self._head: ParallelHead

    def load(self, name: str, weight: torch.Tensor) -> None:
        """Take in one whole weight, of the model's type and on its device."""
        if name == "model.embed_tokens.weight":
            self._embedding = VocabParallelEmbedding(weight, self._place.parallel)
            if self._config.tied_embeddings:
                self._head = ParallelHead(weight, self._place.parallel)
        elif name == "lm_head.weight":
            self._head = ParallelHead(weight, self._place.parallel)
        elif name == "model.norm.weight":
            self._norm = RMSNorm(weight, self._config.rms_norm_eps)
        elif match := _LAYER_NAME.fullmatch(name):
            self._layers[int(match[1])].load(match[2], cast(Kind, match[3]), weight)
        else:
            raise IntegrityError(f"the model has no place for a weight named {name}")

    def forward(self, batch: Batch, kv_cache: KVCache, attention: AttentionBackend) -> Forward:
        """Compute a step for which `attention.plan` has been called: its KV is written, its sampling rows give logits.

        If no row samples, the last layer ends with its KV.
        """
        step = Step(batch, self._rotary.at(batch.positions, batch.slot_ids), kv_cache, attention)
        hidden, token_ids = self._embedding(batch)
        for layer in self._layers[:-1]:
            hidden = layer.forward(hidden, step)
        rows = None if batch.every_row_samples else batch.sample_indices
        hidden = self._layers[-1].forward(hidden, step, rows)
        if batch.sample_indices.shape[0] == 0:
            return Forward(None, token_ids)
        return Forward(self._head(hidden, self._norm), token_ids)
