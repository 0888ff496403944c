from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.batch import Batch, StepShape
from engine.errors import IntegrityError
from engine.layers.embedding import ParallelHead, VocabParallelEmbedding
from engine.layers.linear import ColumnParallelLinear, LinearSpec, RowParallelLinear
from engine.layers.matrix import DenseMatrix, Matrix, PackedMatrix, can_pack, make_matrix, row_multiple
from engine.layers.norm import RMSNorm
from engine.parallel import TensorParallel

CPU = torch.device("cpu")
UNIT_NORM = RMSNorm(torch.ones(6), 0.0)
"""Leaves alone what it has normalised before."""


def make_spec(inputs: int, *, bias: bool = False) -> LinearSpec:
    return LinearSpec(inputs=inputs, bias=bias, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("kind", [PackedMatrix, DenseMatrix])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 65])
def test_every_form_of_a_weight_multiplies_alike(kind: type[Matrix], biased: bool, num_rows: int) -> None:
    weight, x, other = torch.randn(96, 70), torch.randn(num_rows, 70), torch.randn(num_rows, 96)
    bias = torch.randn(96) if biased else None
    norm = RMSNorm(torch.rand(70), 1e-5)
    with torch.inference_mode():
        matrix = kind(weight, bias)  # type: ignore[call-arg]
        before = x.clone()
        expected = functional.linear(x, weight, bias)
        normed = functional.linear(norm(x), weight, bias)
        gated = functional.silu(normed[:, :48]) * normed[:, 48:]
        close(matrix.multiply(x), expected)
        close(matrix.multiply_add(x, other.clone()), expected + other)
        close(matrix.multiply_normed(x, norm), normed)
        close(matrix.multiply_gated(x, norm), gated)
    assert torch.equal(x, before)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_only_float32_on_a_cpu_is_packed() -> None:
    assert can_pack(CPU, torch.float32) == torch.backends.mkldnn.is_available()
    assert not can_pack(CPU, torch.bfloat16)
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert row_multiple(CPU, torch.bfloat16) == 1
    assert isinstance(make_matrix(torch.randn(8, 8).bfloat16()), DenseMatrix)


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (576, 1536), (3072, 576)])
def test_a_row_hardly_depends_on_the_others(outputs: int, inputs: int) -> None:
    matrix, x = make_matrix(torch.randn(outputs, inputs)), torch.randn(512, inputs)
    assert isinstance(matrix, PackedMatrix)
    with torch.inference_mode():
        whole = matrix.multiply(x)
        for num_rows in range(row_multiple(CPU, torch.float32), 512, 52):
            torch.testing.assert_close(matrix.multiply(x[:num_rows]), whole[:num_rows], rtol=1e-5, atol=1e-4)


def test_projections_of_one_input_lie_one_after_the_other() -> None:
    weights = {"q": torch.randn(8, 6), "k": torch.randn(4, 6)}
    biases = {"q": torch.randn(8), "k": torch.randn(4)}
    layer = ColumnParallelLinear(make_spec(6, bias=True), {"q": range(2, 6), "k": range(1, 3)})
    for name in ("k", "q"):
        layer.load(name, "bias", biases[name])
        layer.load(name, "weight", weights[name])
    x = UNIT_NORM(torch.randn(4, 6))
    expected = torch.cat(
        [
            functional.linear(x, weights["q"], biases["q"])[:, 2:6],
            functional.linear(x, weights["k"], biases["k"])[:, 1:3],
        ],
        dim=1,
    )
    torch.testing.assert_close(layer(x * 3, UNIT_NORM), expected)


def test_the_first_of_two_projections_is_the_gate_of_the_second() -> None:
    weights, layer = torch.randn(2, 5, 6), ColumnParallelLinear(make_spec(6), {"gate": range(5), "up": range(5)})
    layer.load("up", "weight", weights[1])
    layer.load("gate", "weight", weights[0])
    x = UNIT_NORM(torch.randn(4, 6))
    close(layer.gated(x, UNIT_NORM), functional.silu(x @ weights[0].T) * (x @ weights[1].T))


def test_a_row_parallel_layer_adds_what_came_in() -> None:
    layer = RowParallelLinear(make_spec(6, bias=True), "o", 5, range(6), TensorParallel())
    weight, bias, x, residual = torch.randn(5, 6), torch.randn(5), torch.randn(4, 6), torch.randn(4, 5)
    layer.load("o", "weight", weight)
    layer.load("o", "bias", bias)
    torch.testing.assert_close(layer(x, residual.clone()), functional.linear(x, weight, bias) + residual)


def test_a_weight_that_is_not_awaited_is_a_defect() -> None:
    layer = ColumnParallelLinear(make_spec(6), {"q": range(4), "k": range(2)})
    layer.load("q", "weight", torch.randn(4, 6))
    with pytest.raises(IntegrityError, match=r"q\.weight is not awaited here; missing are \[\('k', 'weight'\)\]"):
        layer.load("q", "weight", torch.randn(4, 6))
    layer.load("k", "weight", torch.randn(2, 6))
    with pytest.raises(IntegrityError, match=r"k\.weight came twice"):
        layer.load("k", "weight", torch.randn(2, 6))


def test_the_ends_of_a_model_look_up_and_project() -> None:
    weight = torch.randn(11, 6)
    embedding = VocabParallelEmbedding(weight, TensorParallel())
    vectors, token_ids = embedding(make_batch([0, 10, 3, 3], [-1, -1, -1, -1]))
    assert token_ids.tolist() == [0, 10, 3, 3]
    assert torch.equal(vectors, weight[token_ids])
    x = UNIT_NORM(torch.randn(4, 6))
    torch.testing.assert_close(ParallelHead(weight, TensorParallel())(x, UNIT_NORM), x @ weight.T)


def test_a_token_that_only_the_device_knows_is_looked_up_there() -> None:
    weight = torch.randn(11, 6)
    vectors, token_ids = VocabParallelEmbedding(weight, TensorParallel())(make_batch([4, 0, 5, 0], [-1, 1, -1, 0]))
    assert token_ids.tolist() == [4, 9, 5, 8]
    assert torch.equal(vectors, weight[token_ids])


def make_batch(token_ids: list[int], sources: list[int]) -> Batch:
    """A step after one that chose 8 and 9."""
    unused, shape = torch.zeros(4, dtype=torch.int64), StepShape(*[np.zeros(1, np.int64)] * 4)
    previous = torch.tensor([[8, 1], [9, 1]])
    return Batch(torch.tensor(token_ids), torch.tensor(sources), previous, unused, unused, unused, shape)
