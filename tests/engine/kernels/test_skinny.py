from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from engine.kernels.skinny import MAX_ROWS, Tile, choose_tile, skinny_linear
from engine.layers.norm import RMSNorm
from tests.engine.kernels.bounds import Maker, check, rms_normed

EPS = 1e-5
SMALL = Tile(outputs=16, inputs=64, warps=4, stages=3, prefetch=128)
"""Takes several turns and programs even for little."""


@pytest.fixture
def kind(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The engine has 16-bit weights computed here only; float32, on a GPU, would be rounded to TF32."""
    return torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype


class Case:
    """A layer and its input; `expected` is what comes out, in float64."""

    def __init__(self, make: Maker, num_rows: int, outputs: int, inputs: int, parts: str) -> None:
        self.gated = "gated" in parts
        rows = 2 * outputs if self.gated else outputs
        self.x = make.normal(num_rows, inputs)
        self.weight = make.normal(rows, inputs, scale=inputs**-0.5)
        self.bias = make.normal(rows) if "bias" in parts else None
        self.residual = make.normal(num_rows, outputs) if "residual" in parts else None
        self.norm = RMSNorm(make.positive(inputs), EPS) if "norm" in parts else None

    def compute(self, tile: Tile) -> torch.Tensor:
        return skinny_linear(
            self.x, self.weight, tile, bias=self.bias, residual=self.residual, norm=self.norm, gated=self.gated
        )

    def expected(self) -> torch.Tensor:
        x = self.x.double() if self.norm is None else rms_normed(self.x, self.norm.weight, EPS)
        y = x @ self.weight.double().T
        if self.bias is not None:
            y = y + self.bias.double()
        if self.gated:
            gate, up = y.chunk(2, dim=1)
            y = functional.silu(gate) * up
        return y if self.residual is None else y + self.residual.double()


ALL = "bias norm gated residual"


@pytest.mark.parametrize(
    ("outputs", "inputs", "parts"),
    [(48, 128, ""), (48, 128, ALL), *((50, 144, parts) for parts in ("", "bias", "residual", "norm", "gated", ALL))],
)
@pytest.mark.parametrize("num_rows", [1, 3, 20, 64])
def test_a_layer_of_few_rows_is_its_definition(
    device: torch.device, kind: torch.dtype, num_rows: int, outputs: int, inputs: int, parts: str
) -> None:
    case = Case(Maker(device, kind), num_rows, outputs, inputs, parts)
    check(case.compute(SMALL), case.expected())


def tiles_in_use() -> list[tuple[int, Tile, bool]]:
    """(num_rows, tile, gated): what is chosen for the layers of small and large models, each once a range of rows."""
    found: dict[tuple[bool, Tile, int], int] = {}
    for outputs, inputs in ((960, 576), (576, 1536), (6144, 4096), (4096, 14336), (14336, 4096), (128256, 4096)):
        for num_rows in (1, 2, 16, 17, 33, MAX_ROWS):
            for gated in (False, True):
                tile = choose_tile(num_rows, outputs, inputs, gated=gated)
                if tile is not None:
                    found[gated, tile, max(16, num_rows)] = num_rows
    return [(num_rows, tile, gated) for (gated, tile, _), num_rows in found.items()]


@pytest.mark.parametrize(("num_rows", "tile", "gated"), tiles_in_use(), ids=str)
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_the_tiles_that_are_chosen_compute_it_too(
    device: torch.device, kind: torch.dtype, even: bool, num_rows: int, tile: Tile, gated: bool
) -> None:
    """With inputs enough for what is fetched early."""
    outputs, inputs = (2 * tile.outputs, 1024) if even else (tile.outputs + 8, 1040)
    case = Case(Maker(device, kind), num_rows, outputs, inputs, "norm bias gated" if gated else "norm bias residual")
    check(case.compute(tile), case.expected())


def test_inputs_that_do_not_come_in_sixteens_and_many_rows_are_left_to_others() -> None:
    assert choose_tile(1, 72, 100, gated=False) is None
    assert choose_tile(MAX_ROWS + 1, 72, 128, gated=False) is None
    assert choose_tile(1, 72, 128, gated=False) is not None


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("parts", ["", "norm residual"])
def test_rows_of_the_input_may_lie_apart(device: torch.device, kind: torch.dtype, num_rows: int, parts: str) -> None:
    case = Case(Maker(device, kind), num_rows, 32, 256, parts)
    wide = torch.full((num_rows, 400), 9.0, dtype=kind, device=device)
    wide[:, :256] = case.x
    case.x = wide[:, :256]
    check(case.compute(SMALL), case.expected())


def test_the_residual_and_the_input_are_left_as_they_are(device: torch.device, kind: torch.dtype) -> None:
    case = Case(Maker(device, kind), 3, 48, 128, "norm residual")
    assert case.residual is not None
    before = case.x.clone(), case.residual.clone()
    case.compute(SMALL)
    assert torch.equal(case.x, before[0])
    assert torch.equal(case.residual, before[1])
