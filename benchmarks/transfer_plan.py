"""What `benchmarks.transfer` measures, in numbers: one plan for a pair of GPUs, one to try it out on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kv_transfer.config import TransferConfig

Digest = Literal["auto", "all", "sampled", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One configuration of a pair."""

    ctas: int
    piece_mib: int
    digest: Digest = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """A KV cache without an engine."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that both processes need to know; tokens are of one ticket unless it says otherwise."""

    device: Literal["cuda", "cpu"]
    directory: str = ""
    """Holds the config.json of the engines' model."""
    switch_s: float | None = None
    """Python's switch interval in both processes: how long a thread may have to wait for one that computes."""
    cell_s: float = 0.3
    """Least time that a figure is measured for; a ceiling's is a third of it."""
    ceiling_ctas: tuple[int, ...]
    ceiling_mib: tuple[int, ...]
    cache: CacheShape
    pair_cells: tuple[Cell, ...]
    pair_tokens: int
    pair_tickets: int = 4
    """Tickets granted at a time."""
    in_flight: int = 3
    """Tickets being sent at a time."""
    batch: int
    batch_prompt: int
    """Tokens of each prompt of the batch."""
    load_ctas: tuple[int, ...]
    load_steps: int
    """Decode steps of one phase."""
    load_skip: int
    """Steps behind a change of load that are not counted."""
    load_tokens: int
    load_rate: float
    """Bytes a second at which KV arrives when it is paced."""
    load_layers: int
    """Layers pushed at once when it is paced: those that a prefill worker joins into one piece."""
    lengths: tuple[int, ...]
    """Tokens of the prompts that are handed over."""
    repeats: int
    rest_s: float = 0.3
    """Rest of the prefill GPU before each prompt: one that has just computed at full power is slower, and one that has
    rested for 0.6 s takes 2 ms to wake up."""
    answer: int = 10
    """Tokens of the answer to each."""
    reserve_first: bool = False
    """Whether blocks are reserved before the prompt is sent, instead of both at once as the router does."""
    ctas: int = TransferConfig().max_ctas
    """Of the pair that hands over."""
    together: tuple[int, int]
    """Prompts that are asked for at once, and the tokens of each."""
    checks: int
    """Prompts whose answers are compared with one engine's."""
    check_tokens: int
    check_prompt: tuple[int, int]
    """Tokens of the first of these prompts, and how many more the next one has."""

    @property
    def load_tickets(self) -> int:
        """Tickets granted at a time beside the decoding batch: enough to wait for a step to end before a new grant."""
        return 2 * self.in_flight + 2

    @property
    def load_most_steps(self) -> int:
        """Steps that the batch must last for: nine phases, and as much again for what lies between them."""
        return 2 * 9 * (self.load_steps + self.load_skip) + 64

    def num_blocks(self, block_size: int) -> int:
        """Blocks of an engine's pool."""
        sequence = -(-(self.batch_prompt + self.load_most_steps) // block_size) + 1
        loaded = self.batch * sequence + self.load_tickets * -(-self.load_tokens // block_size)
        handed_over = (4 + self.together[0]) * (-(-(max(self.lengths) + self.answer) // block_size) + 1)
        return max(loaded, handed_over) + 16


def grid(ctas: tuple[int, ...], pieces: tuple[int, ...], digests: tuple[Digest, ...]) -> tuple[Cell, ...]:
    """All combinations."""
    return tuple(
        Cell(ctas=each, piece_mib=piece, digest=digest) for digest in digests for each in ctas for piece in pieces
    )


GPU = Plan(
    device="cuda",
    ceiling_ctas=(2, 4, 8, 16, 32),
    ceiling_mib=(1, 8, 32, 64, 128),
    cache=CacheShape(num_layers=32, num_kv_heads=8, head_dim=128, block_size=128, dtype="bfloat16"),
    pair_cells=(
        *grid((16,), (128,), ("auto", "none", "all")),
        *grid((16,), (8, 32, 64), ("auto",)),
        *grid((2, 4, 8, 32), (128,), ("auto",)),
    ),
    pair_tokens=8192,
    batch=64,
    batch_prompt=840,
    load_ctas=(16, 8, 32),
    load_steps=48,
    load_skip=8,
    load_tokens=2048,
    load_rate=5.6e9,
    load_layers=16,
    lengths=(512, 2048, 8192),
    repeats=10,
    together=(4, 2048),
    checks=16,
    check_tokens=32,
    check_prompt=(301, 97),
)
CPU = Plan(
    device="cpu",
    cell_s=0.15,
    ceiling_ctas=(4,),
    ceiling_mib=(1, 4),
    cache=CacheShape(num_layers=4, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32"),
    pair_cells=(Cell(ctas=4, piece_mib=1), Cell(ctas=4, piece_mib=4, digest="none")),
    pair_tokens=4096,
    batch=4,
    batch_prompt=32,
    load_ctas=(4,),
    load_steps=16,
    load_skip=2,
    load_tokens=64,
    load_rate=20e6,
    load_layers=1,
    rest_s=0.0,
    lengths=(24, 200),
    repeats=3,
    together=(2, 100),
    checks=4,
    check_tokens=8,
    check_prompt=(17, 13),
)


def model_header(plan: Plan, llama_8b: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the engines: an 8B model on a GPU, a tiny one of the same kind on a CPU."""
    if plan.device == "cuda":
        return llama_8b
    tiny = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 400,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {**llama_8b, **tiny}
