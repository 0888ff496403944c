"""Reads a model's weights from disk, one tensor at a time, under their Hugging Face names.

Shapes: H hidden_size, I intermediate_size, V vocab_size, Q num_heads * head_dim, K num_kv_heads * head_dim,
D head_dim. Linear weights are [outputs, inputs].

Nothing is yielded before the whole table of contents has been compared with what the configuration asks for,
so a model that lacks a tensor fails at once and not after minutes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import BrokenModelError, ModelNotFoundError, UnsupportedModelError
from engine.gguf_file import GgufFile, GgufTensor
from engine.model_source import ModelKind, ModelSource
from engine.models.config import Family, ModelConfig, read_json

Progress = Callable[[int, int], None]
Weights = Iterator[tuple[str, torch.Tensor]]

MAX_NAMES_IN_ERROR = 8
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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

    At most one weight is held here at a time; the caller owns what it was given. A GGUF file is dequantised, and
    the query and key rows that a Llama GGUF keeps interleaved are put back into Hugging Face order.
    `on_progress(done, total)` counts weights. Raises BrokenModelError (missing, misshapen or truncated),
    ModelNotFoundError or UnsupportedModelError.
    """
    shapes = weight_shapes(config)
    reader = _read_gguf if source.kind is ModelKind.GGUF else _read_safetensors
    for done, (name, tensor) in enumerate(reader(source.path, config, shapes), start=1):
        yield name, tensor.to(device=device, dtype=dtype)
        del tensor
        if on_progress is not None:
            on_progress(done, len(shapes))


def _check_contents(path: Path, found: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in found]
    if missing:
        listed = ", ".join(missing[:MAX_NAMES_IN_ERROR])
        more = f" and {len(missing) - MAX_NAMES_IN_ERROR} more" if len(missing) > MAX_NAMES_IN_ERROR else ""
        raise BrokenModelError(f"{path} lacks {len(missing)} weights: {listed}{more}; fetch the model again")
    for name, shape in shapes.items():
        if found[name] != shape:
            raise BrokenModelError(f"{path}: {name} has shape {found[name]}, but the header asks for {shape}")


# ---- GGUF ----


def _gguf_name(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        stem, _, suffix = name.rpartition(".")
        return f"{_GGUF_TOP[stem]}.{suffix}"
    layer, part, suffix = match.groups()
    return f"blk.{layer}.{_GGUF_LAYER[part]}.{suffix}"


def _read_gguf(path: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> Weights:
    with GgufFile(path) as file:
        stored = {name: file.tensors.get(_gguf_name(name)) for name in shapes}
        _check_contents(path, {name: tensor.shape for name, tensor in stored.items() if tensor is not None}, shapes)
        for name, tensor in stored.items():
            assert tensor is not None
            weight = _dequantise(file, tensor)
            if config.family is Family.LLAMA and ".self_attn.q_proj." in name:
                weight = _deinterleave(weight, config.num_heads)
            elif config.family is Family.LLAMA and ".self_attn.k_proj." in name:
                weight = _deinterleave(weight, config.num_kv_heads)
            yield name, weight
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


# ---- safetensors ----


def _read_safetensors(path: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> Weights:
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        found: dict[str, tuple[int, ...]] = {}
        for file_path in _safetensors_files(path):
            file = stack.enter_context(_open_safetensors(file_path))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                files[name] = file
                found[name] = tuple(file.get_slice(name).get_shape())
        _check_contents(path, found, shapes)
        for name in shapes:
            try:
                weight = files[name].get_tensor(name)
            except SafetensorError as error:
                raise BrokenModelError(f"{path}: {name} cannot be read: {error}; fetch the model again") from error
            if not weight.is_floating_point():
                raise UnsupportedModelError(f"{path}: {name} has type {weight.dtype}, expected floating point")
            yield name, weight
            del weight


def _safetensors_files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if not (path / INDEX_FILE).is_file():
        raise ModelNotFoundError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BrokenModelError(f"{path / INDEX_FILE} has no weight_map from names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise BrokenModelError(f"{path / INDEX_FILE} names {name!r}, which is not a file of that directory")
        if not (path / name).is_file():
            raise ModelNotFoundError(f"{path} lacks {name}, which {INDEX_FILE} names; fetch the model again")
    return [path / name for name in names]


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BrokenModelError(f"{path} is broken or truncated: {error}; fetch the model again") from error
