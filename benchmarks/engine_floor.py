"""Floors: the time that a step cannot beat on a device whose memory and matrix units run at measured ceilings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the device was measured to reach at best."""

    copy_bytes_s: float
    """Device-to-device copy, bytes read + written."""
    read_bytes_s: float
    matrix_flop_s: float
    """In a burst on a card that has rested: what short work reaches."""
    sustained_flop_s: float = 0.0
    """The same product for as long as a long prompt takes: the card's power then limits its clock."""

    @classmethod
    def best(cls, measured: list[Ceilings]) -> Ceilings:
        """The highest of several measurements, each figure for itself."""
        return cls(
            copy_bytes_s=max(each.copy_bytes_s for each in measured),
            read_bytes_s=max(each.read_bytes_s for each in measured),
            matrix_flop_s=max(each.matrix_flop_s for each in measured),
            sustained_flop_s=max(each.sustained_flop_s for each in measured),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a decoder that decide how much it reads and computes. Norms and biases are left out (< 0.01 %)."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    itemsize: int = 2
    """Bytes of one weight, and of one element of the KV cache."""

    @classmethod
    def load(cls, directory: Path, itemsize: int) -> Shape:
        """From the config.json of a Hugging Face directory."""
        return cls.from_header(json.loads((directory / "config.json").read_text()), itemsize)

    @classmethod
    def from_header(cls, header: Mapping[str, Any], itemsize: int = 2) -> Shape:
        """From the content of a config.json."""
        num_heads = header["num_attention_heads"]
        return cls(
            num_layers=header["num_hidden_layers"],
            hidden_size=header["hidden_size"],
            intermediate_size=header["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=header.get("num_key_value_heads") or num_heads,
            head_dim=header.get("head_dim") or header["hidden_size"] // num_heads,
            vocab_size=header["vocab_size"],
            itemsize=itemsize,
        )

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of all layers."""
        attention = self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Of the matrix that gives logits."""
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """What every decode step reads: all layers and the head (of the embedding a step reads single rows)."""
        return (self.layer_parameters + self.head_parameters) * self.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize


def decode_floor_s(shape: Shape, ceilings: Ceilings, *, batch: int, context: float) -> float:
    """Seconds of a step that gives each of `batch` sequences one token; context: mean tokens of KV a sequence reads."""
    read = shape.weight_bytes + batch * context * shape.kv_bytes_per_token
    products = 2 * (shape.layer_parameters + shape.head_parameters)
    attention = 4 * context * shape.num_heads * shape.head_dim * shape.num_layers
    return max(read / ceilings.read_bytes_s, batch * (products + attention) / ceilings.matrix_flop_s)


def prefill_floor_s(shape: Shape, ceilings: Ceilings, *, num_seqs: int, length: int) -> float:
    """Seconds to compute num_seqs prompts of `length` tokens up to their first tokens; attention is causal."""
    products = 2 * shape.layer_parameters * length + 2 * shape.head_parameters
    attention = 2 * length**2 * shape.num_heads * shape.head_dim * shape.num_layers
    return num_seqs * (products + attention) / ceilings.matrix_flop_s
