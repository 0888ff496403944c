"""The floors of the 8B model at ceilings of 4.23 TB/s and 792 TFLOP/s, worked out by hand beforehand."""

import pytest

from benchmarks.engine_floor import Ceilings, Shape, decode_floor_s, prefill_floor_s
from benchmarks.llama_8b import LLAMA_8B

SHAPE = Shape.from_header(LLAMA_8B)
CEILINGS = Ceilings(copy_bytes_s=4.27e12, read_bytes_s=4.23e12, matrix_flop_s=792e12)


def test_a_decode_step_reads_all_layers_and_the_head():
    assert round(SHAPE.weight_bytes / 1e9, 2) == 15.01
    assert SHAPE.kv_bytes_per_token == 131_072


@pytest.mark.parametrize(
    ("batch", "floor_ms"), [(1, 3.58), (8, 3.82), (32, 4.63), (64, 5.71), (128, 7.86), (256, 12.18)]
)
def test_decode_floor(batch, floor_ms):
    assert round(decode_floor_s(SHAPE, CEILINGS, batch=batch, context=1088) * 1e3, 2) == floor_ms


@pytest.mark.parametrize(
    ("num_seqs", "length", "floor_ms"),
    [(1, 512, 9.1), (1, 2048, 37.5), (1, 8192, 166.6), (1, 16384, 377.6), (32, 2048, 1199.0)],
)
def test_prefill_floor(num_seqs, length, floor_ms):
    floor = prefill_floor_s(SHAPE, CEILINGS, num_seqs=num_seqs, length=length) * 1e3
    assert floor == pytest.approx(floor_ms, abs=0.06 if floor_ms < 1000 else 0.6)


def test_a_decode_step_of_very_many_sequences_is_bound_by_its_products():
    short = decode_floor_s(SHAPE, CEILINGS, batch=4096, context=0)
    assert short == pytest.approx(4096 * 2 * 7.5046e9 / 792e12, rel=1e-4)


def test_the_best_ceilings_are_taken_each_for_itself():
    other = Ceilings(copy_bytes_s=5e12, read_bytes_s=4e12, matrix_flop_s=800e12)
    assert Ceilings.best([CEILINGS, other]) == Ceilings(copy_bytes_s=5e12, read_bytes_s=4.23e12, matrix_flop_s=800e12)


def test_optional_keys_of_the_header():
    header = {key: value for key, value in LLAMA_8B.items() if key not in ("head_dim", "num_key_value_heads")}
    shape = Shape.from_header(header, itemsize=4)
    assert (shape.head_dim, shape.num_kv_heads, shape.kv_bytes_per_token) == (128, 32, 131_072 * 8)
