"""A model without weights over real paged memory: it checks that every token's KV is where it should be."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.api import GenerateRequest, SamplingParams
from engine.batch import LayerHook, SampledToken, StepPlan, StepResult
from engine.block_pool import BlockPool
from engine.scheduler import Scheduler
from engine.sequence import PENDING, Sequence
from engine.step_budget import StepLimits

VOCAB = 50
EOS = 49


class ToyRunner:
    """Writes each token into its slot, reads the whole context back, and samples from its sum."""

    def __init__(self, num_blocks: int, block_size: int, run_ahead: int = 0) -> None:
        self.block_size = block_size
        self.run_ahead = run_ahead
        self._last: dict[Sequence, tuple[int, int]] = {}
        """What the step before sampled: place and token."""
        self.memory: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
        self.fail_next = False

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> Done:
        on_layer = hook.on_layer if hook is not None else None
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("toy failure")
        result, sampled = StepResult(), {}
        for share in plan.shares:
            sequence = share.sequence
            tokens = self._tokens(sequence, share.stop)
            for position in range(share.start, share.stop):
                self.memory[self._slot(sequence, position)] = (position, tokens[position])
            if on_layer is not None:
                on_layer(0, None)
            for position, token in enumerate(tokens):
                found = self.memory[self._slot(sequence, position)]
                assert found == (position, token), f"wrong KV at {position}: {found}"
            if share.samples:
                sampled[sequence] = (share.stop, next_token(tokens))
            result.sampled.append(SampledToken(sampled[sequence][1]) if share.samples else None)
        self._last = sampled
        return Done(result)

    def _tokens(self, sequence: Sequence, stop: int) -> list[int]:
        """The first tokens of a sequence; one that is pending must be what the step before sampled."""
        tokens = sequence.token_ids[:stop]
        if tokens[-1] == PENDING:
            place, tokens[-1] = self._last[sequence]
            assert place == stop - 1
        assert PENDING not in tokens
        return tokens

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_ids[position // self.block_size] * self.block_size + position % self.block_size


class Done:
    """A step that was computed when it was launched."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


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
    most = settings.pop("max_step_tokens")
    limits = StepLimits(most, settings.pop("mixed_tokens", most), settings.pop("slack_tokens", 0))
    pool = BlockPool(num_blocks)
    return Scheduler(pool, block_size=block_size, root_hash=b"toy", limits=limits, eos_token_ids=[EOS], **settings)


def make_request(name: str, prompt: Seq[int], *, priority: int = 0, **params: object) -> GenerateRequest:
    settings: dict[str, object] = {"max_tokens": 8} | params
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        priority=priority,
        params=SamplingParams(**settings),  # type: ignore[arg-type]
    )
