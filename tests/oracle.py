"""Hugging Face transformers as the judge of greedy answers, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.model_source import ModelKind, ModelSource, resolve

MIN_MARGIN = 1e-4
"""Where the two likeliest tokens are closer than this, either is right."""
MAX_LEFT_OUT = 0.001


def load_oracle(source: ModelSource) -> Any:
    """The model as transformers loads it."""
    if source.kind is ModelKind.GGUF:
        directory, options = source.path.parent, {"gguf_file": source.path.name}
    else:
        directory, options = source.path, {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


@dataclass
class Judge:
    """Checks answers token by token, and counts what it had to leave out."""

    model: Any
    num_checked: int = 0
    num_left_out: int = 0

    @classmethod
    def of(cls, path: str | Path) -> Judge:
        return cls(load_oracle(resolve(str(path))))

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Every token must be the likeliest one after all before it, unless that is too close to call."""
        assert answer, "an empty answer"
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        best = logits.topk(2, dim=-1)
        for index, token in enumerate(answer):
            self.num_checked += 1
            margin = float(best.values[index, 0] - best.values[index, 1])
            if margin <= MIN_MARGIN:
                self.num_left_out += 1
                continue
            wanted = int(best.indices[index, 0])
            assert token == wanted, f"token {index} is {token}, transformers says {wanted} (margin {margin:.2e})"

    def verdict(self) -> None:
        """At most one in a thousand positions (and one in all is always allowed) was too close to call."""
        assert self.num_left_out <= max(1, MAX_LEFT_OUT * self.num_checked)
