"""What one step adds to a prompt's push: which layers go together, and in which order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prefill_pool.kv_push import StepPush

SLOTS = np.arange(100, 110)


class Outlet:
    """Takes pushes, so many layers at once."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.asked: list[int] = []
        self.pushed: list[tuple[Any, ...]] = []

    def layers_at_once(self, num_tokens: int) -> int:
        self.asked.append(num_tokens)
        return self.at_once

    def push(self, first_layer: int, num_layers: int, first_token: int, slot_ids: Any, after: Any = None) -> None:
        assert slot_ids is SLOTS
        self.pushed.append((first_layer, num_layers, first_token, after))


@pytest.mark.parametrize(
    ("at_once", "pushed"),
    [
        (1, [(layer, 1) for layer in range(8)]),
        (3, [(0, 3), (3, 3), (6, 2)]),
        (4, [(0, 4), (4, 4)]),
        (8, [(0, 8)]),
        (100, [(0, 8)]),
    ],
)
@pytest.mark.parametrize("hears_all", [True, False])
def test_layers_are_pushed_as_many_at_once_as_the_outlet_likes(at_once, pushed, hears_all):
    """Each behind the event of its last layer, whether the step tells of every layer or only of those it names."""
    outlet = Outlet(at_once)
    step = StepPush(outlet, 8, 7, SLOTS)
    assert outlet.asked == [10]
    for layer in range(8):
        if hears_all or layer in step.layers:
            step.layer_written(layer, f"event {layer}")
    ends = [first + count for first, count in pushed]
    assert outlet.pushed == [(*where, 7, f"event {end - 1}") for where, end in zip(pushed, ends, strict=True)]
    assert sorted(step.layers) == [end - 1 for end in ends]
