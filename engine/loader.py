"""Reads a model's weights from disk, one tensor at a time, under their Hugging Face names.

Shapes: H hidden_size, I intermediate_size, V vocab_size, Q num_heads * head_dim, K num_kv_heads * head_dim,
D head_dim. Linear weights are [outputs, inputs].

Nothing is yielded before the whole table of contents has been compared with what the configuration asks for,
so a model that lacks a tensor fails at once and not after minutes.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from engine.gguf_file import GgufFile, GgufTensor
from engine.model_source import ModelKind, ModelSource
from engine.models.config import Family, ModelConfig
from engine.safetensors_reader import Shapes, Weights, ahead_for, check_contents, read_safetensors

Progress = Callable[[int, int], None]

_GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight the model must have, by Hugging Face name, embedding first and output last."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (key, hidden, config.attention_bias),
        "self_attn.v_proj": (key, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        for name, (outputs, inputs, bias) in linear.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def iter_weights(
    source: ModelSource,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Weights:
    """Yield (name, weight) for each of `weight_shapes(config)`, as `dtype` on `device`.

    The caller owns what it was given; on a CPU at most one weight is held here at a time, for a GPU a few are read
    ahead (see `safetensors_reader`). A GGUF file is dequantised, and the query and key rows that a Llama GGUF keeps
    interleaved are put back into Hugging Face order. `on_progress(done, total)` counts bytes, see `tell_bytes`.
    Close the iterator where you stop early. Raises BrokenModelError (missing, misshapen or truncated),
    ModelNotFoundError or UnsupportedModelError.
    """
    shapes = weight_shapes(config)
    device = _with_index(torch.device(device))
    if source.kind is ModelKind.GGUF:
        weights = _read_gguf(source.path, config, shapes, dtype=dtype, device=device)
    else:
        weights = read_safetensors(source.path, shapes, dtype=dtype, device=device, ahead=ahead_for(device))
    return tell_bytes(weights, shapes, dtype, on_progress)


def tell_bytes(weights: Weights, shapes: Shapes, dtype: torch.dtype, on_progress: Progress | None) -> Weights:
    """Pass `weights` on; `on_progress(done, total)` hears how many of their bytes, as `dtype`, the caller has taken.

    It hears of 0 bytes first, and of each weight when the next one is asked for.
    """
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    done = 0
    with contextlib.closing(weights):
        if on_progress is not None:
            on_progress(done, total)
        for name, weight in weights:
            done += weight.nbytes
            yield name, weight
            del weight
            if on_progress is not None:
                on_progress(done, total)


def _with_index(device: torch.device) -> torch.device:
    """Threads that read have a current GPU of their own, so the caller's is named."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


# ---- GGUF ----


def _gguf_name(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        stem, _, suffix = name.rpartition(".")
        return f"{_GGUF_TOP[stem]}.{suffix}"
    layer, part, suffix = match.groups()
    return f"blk.{layer}.{_GGUF_LAYER[part]}.{suffix}"


def _read_gguf(path: Path, config: ModelConfig, shapes: Shapes, *, dtype: torch.dtype, device: torch.device) -> Weights:
    with GgufFile(path) as file:
        stored = {name: file.tensors.get(_gguf_name(name)) for name in shapes}
        check_contents(path, {name: tensor.shape for name, tensor in stored.items() if tensor is not None}, shapes)
        for name, tensor in stored.items():
            assert tensor is not None
            weight = _dequantise(file, tensor)
            if config.family is Family.LLAMA and ".self_attn.q_proj." in name:
                weight = _deinterleave(weight, config.num_heads)
            elif config.family is Family.LLAMA and ".self_attn.k_proj." in name:
                weight = _deinterleave(weight, config.num_kv_heads)
            yield name, weight.to(device=device, dtype=dtype)
            del weight


def _dequantise(file: GgufFile, tensor: GgufTensor) -> torch.Tensor:
    """The tensor as float32 in memory of its own."""
    weight = torch.empty(tensor.shape, dtype=torch.float32)
    rows = weight.view(-1, tensor.shape[-1]).numpy()
    first = 0
    for chunk in file.rows(tensor):
        rows[first : first + len(chunk)] = chunk
        first += len(chunk)
    return weight


def _deinterleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order: per head it keeps rows 0, D/2, 1, D/2 + 1, ... of the Hugging Face order."""
    pairs = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
