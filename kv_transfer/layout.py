"""How a worker lays its KV out, and which heads travel between two layouts.

A rank holds the KV heads [tp_rank * n, (tp_rank + 1) * n) with n = num_kv_heads / tp_size. With more
ranks than heads, neighbouring ranks hold copies of one head, tp_size / num_kv_heads of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from protos import worker_pb2

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """Heads [first, first + num_heads) of one rank are heads [other_first, ...) of another, in local numbering."""

    first: int
    other_first: int
    num_heads: int

    @property
    def heads(self) -> range:
        """The heads in the numbering of the rank that has them as `first`."""
        return range(self.first, self.first + self.num_heads)

    @property
    def other_heads(self) -> range:
        """The heads in the other's numbering."""
        return range(self.other_first, self.other_first + self.num_heads)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and type of one rank's KV."""

    model_hash: str
    """Names the weights: equal KV needs equal weights."""
    num_layers: int
    block_size: int
    """Tokens a block."""
    num_kv_heads: int
    """Of the whole model, over all ranks."""
    head_dim: int
    dtype: str
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_layers", "block_size", "num_kv_heads", "head_dim", "tp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp_rank must be in [0, {self.tp_size}), got {self.tp_rank}")
        if self.num_kv_heads % self.tp_size and self.tp_size % self.num_kv_heads:
            raise ValueError(
                f"{self.num_kv_heads} KV heads cannot be shared by {self.tp_size} ranks: one must divide the other"
            )

    @property
    def num_local_heads(self) -> int:
        """KV heads that this rank holds."""
        return max(1, self.num_kv_heads // self.tp_size)

    @property
    def first_head(self) -> int:
        """The first head this rank holds, in the numbering of the whole model."""
        return self.tp_rank * self.num_kv_heads // self.tp_size

    @property
    def num_copies(self) -> int:
        """Ranks that hold the same heads as this one, itself included."""
        return max(1, self.tp_size // self.num_kv_heads)

    @property
    def bytes_per_token_layer(self) -> int:
        """Bytes of K and V of one token in one layer of this rank."""
        return self.num_local_heads * self.bytes_per_head

    @property
    def bytes_per_head(self) -> int:
        """Bytes of K and V of one token in one layer for one head."""
        return 2 * self.head_dim * ITEM_BYTES[self.dtype]

    def of_rank(self, rank: int) -> KVLayout:
        """The layout of another rank of the same worker."""
        return replace(self, tp_rank=rank)

    def slices_to(self, other: KVLayout) -> list[HeadSlice]:
        """Heads that this rank sends to rank `other`; empty where another rank does.

        Over all ranks of this side, each head of `other` is sent exactly once: of several ranks
        that hold the same head, the copies take turns over the receiving ranks.
        """
        if other.tp_rank % self.num_copies != self.tp_rank % self.num_copies:
            return []
        first = max(self.first_head, other.first_head)
        end = min(self.first_head + self.num_local_heads, other.first_head + other.num_local_heads)
        if first >= end:
            return []
        return [HeadSlice(first - self.first_head, first - other.first_head, end - first)]

    def differences(self, other: KVLayout) -> list[str]:
        """What keeps KV of this layout from being used in the other, in words; empty if nothing does.

        Ranks may differ: `slices_to` bridges them.
        """
        names = ("model_hash", "num_layers", "block_size", "num_kv_heads", "head_dim", "dtype")
        return [
            f"{name} is {getattr(self, name)} here and {getattr(other, name)} there"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def to_proto(self) -> worker_pb2.Layout:
        """The message that describes this layout."""
        return worker_pb2.Layout(
            model_hash=self.model_hash,
            num_layers=self.num_layers,
            block_size=self.block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
        )

    @classmethod
    def from_proto(cls, message: worker_pb2.Layout) -> KVLayout:
        """The layout a message describes; ValueError if it describes none."""
        return cls(
            model_hash=message.model_hash,
            num_layers=message.num_layers,
            block_size=message.block_size,
            num_kv_heads=message.num_kv_heads,
            head_dim=message.head_dim,
            dtype=message.dtype,
            tp_rank=message.tp_rank,
            tp_size=message.tp_size,
        )
