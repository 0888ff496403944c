"""A model without weights over real paged memory: it checks that every token's KV is where it should be."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.api import GenerateRequest, SamplingParams
from engine.batch import OnLayer, SampledToken, StepPlan, StepResult
from engine.block_pool import BlockPool
from engine.scheduler import Scheduler
from engine.sequence import Sequence

VOCAB = 50
EOS = 49


class ToyRunner:
    """Writes each token into its slot, reads the whole context back, and samples from its sum."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.memory: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
        self.fail_next = False

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("toy failure")
        result = StepResult()
        for share in plan.shares:
            sequence, end = share.sequence, share.start + share.num_tokens
            for position in range(share.start, end):
                self.memory[self._slot(sequence, position)] = (position, sequence.token_ids[position])
            if on_layer is not None:
                on_layer(0, None)
            for position in range(end):
                found = self.memory[self._slot(sequence, position)]
                assert found == (position, sequence.token_ids[position]), f"wrong KV at {position}: {found}"
            result.sampled.append(SampledToken(next_token(sequence.token_ids)) if share.samples else None)
        return result

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_ids[position // self.block_size] * self.block_size + position % self.block_size


def next_token(tokens: Seq[int]) -> int:
    """What the toy model says after these tokens."""
    return (sum(tokens) * 31 + len(tokens) * 7) % (VOCAB - 1)


def expected_answer(prompt: Seq[int], count: int) -> list[int]:
    """What the toy model generates, computed without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def make_scheduler(num_blocks: int, block_size: int = 4, **options: int) -> Scheduler:
    settings = {"max_step_tokens": 16, "max_running": 4, "max_model_len": num_blocks * block_size} | options
    pool = BlockPool(num_blocks)
    return Scheduler(pool, block_size=block_size, root_hash=b"toy", eos_token_ids=[EOS], **settings)


def make_request(name: str, prompt: Seq[int], **params: object) -> GenerateRequest:
    settings: dict[str, object] = {"max_tokens": 8} | params
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**settings),  # type: ignore[arg-type]
    )
