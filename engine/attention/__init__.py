"""Attention backends by name; `auto` picks the fastest that runs on the cache's device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.attention.base import AttentionBackend
    from engine.kv_cache import KVCache


def _sdpa(kv_cache: KVCache, num_heads: int) -> AttentionBackend:
    from engine.attention.sdpa import SdpaAttention

    return SdpaAttention(kv_cache, num_heads)


def _triton(kv_cache: KVCache, num_heads: int) -> AttentionBackend:
    _need_gpu("triton", kv_cache)
    from engine.attention.paged import PagedAttention
    from engine.attention.prompts import TorchPrompts

    return PagedAttention(kv_cache, TorchPrompts(kv_cache, num_heads))


def _flash(kv_cache: KVCache, num_heads: int) -> AttentionBackend:
    _need_gpu("flash", kv_cache)
    from engine.attention.paged import PagedAttention
    from engine.attention.prompts import FlashPrompts, can_flash

    if not can_flash(kv_cache):
        raise EngineError(
            "attention is flash, but flash-attn-4 is not installed (pip install 'pdserve[gpu]') or does not compute "
            f"{kv_cache.data.dtype} with heads of {kv_cache.head_dim} on this GPU; set attention to auto or triton"
        )
    return PagedAttention(kv_cache, FlashPrompts(kv_cache))


def _auto(kv_cache: KVCache, num_heads: int) -> AttentionBackend:
    if not kv_cache.data.is_cuda:
        return _sdpa(kv_cache, num_heads)
    from engine.attention.prompts import can_flash

    return _flash(kv_cache, num_heads) if can_flash(kv_cache) else _triton(kv_cache, num_heads)


_CREATORS = {"auto": _auto, "flash": _flash, "sdpa": _sdpa, "triton": _triton}


def make_attention(name: str, kv_cache: KVCache, num_heads: int) -> AttentionBackend:
    """The backend of that name over a cache, for this rank's num_heads query heads.

    Raises ValueError if there is none of that name, EngineError if it does not run here.
    """
    if name not in _CREATORS:
        raise ValueError(f"there is no attention backend {name!r}; there are {', '.join(sorted(_CREATORS))}")
    return _CREATORS[name](kv_cache, num_heads)


def _need_gpu(name: str, kv_cache: KVCache) -> None:
    if not kv_cache.data.is_cuda:
        raise EngineError(f"attention is {name}, which runs on a GPU only; set it to auto or sdpa")
