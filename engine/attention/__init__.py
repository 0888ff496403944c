"""Attention backends by name; `auto` picks one for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.attention.base import AttentionBackend
    from engine.kv_cache import KVCache


def _sdpa(kv_cache: KVCache, num_heads: int) -> AttentionBackend:
    from engine.attention.sdpa import SdpaAttention

    return SdpaAttention(kv_cache, num_heads)


_CREATORS = {"sdpa": _sdpa, "auto": _sdpa}


def make_attention(name: str, kv_cache: KVCache, num_heads: int) -> AttentionBackend:
    """The backend of that name over a cache, for this rank's num_heads query heads; ValueError if there is none."""
    if name not in _CREATORS:
        raise ValueError(f"there is no attention backend {name!r}; there are {', '.join(sorted(_CREATORS))}")
    return _CREATORS[name](kv_cache, num_heads)
