"""Classes, gaps and step boundaries of kernels written down by hand."""

import pytest

from benchmarks.engine_trace import (
    Kernel,
    break_down,
    classify,
    exclusive_us,
    gaps_between,
    kernels_of,
    step_marks,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decode_attention_kernel", "attention"),
        ("merge_splits_kernel", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "attention"),
        ("skinny_linear_kernel", "products"),
        ("row_linear_kernel", "products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "products"),
        ("void cutlass::device_kernel<cute::tuple<int, int>>", "products"),
        ("rms_norm_kernel", "rest"),
        ("rope_store_kernel", "rest"),
        ("silu_mul_kernel", "rest"),
        ("greedy_kernel", "rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "rest"),
    ],
)
def test_names(name, kind):
    assert classify(name) == kind


def test_gaps_lie_where_nothing_covers_the_window():
    intervals = [(10.0, 20.0), (30.0, 40.0), (15.0, 25.0), (31.0, 32.0)]
    assert gaps_between(intervals, (0.0, 50.0)) == [(0.0, 10.0), (25.0, 30.0), (40.0, 50.0)]


def test_gaps_of_a_window_that_cuts_intervals():
    assert gaps_between([(0.0, 10.0), (20.0, 30.0)], (5.0, 25.0)) == [(10.0, 20.0)]
    assert gaps_between([(0.0, 10.0), (40.0, 50.0)], (12.0, 30.0)) == [(12.0, 30.0)]
    assert gaps_between([], (1.0, 2.0)) == [(1.0, 2.0)]
    assert gaps_between([(0.0, 9.0)], (1.0, 2.0)) == []


def test_an_instant_belongs_to_the_kernel_that_started_first():
    first, inside, over = Kernel("first", 0, 10), Kernel("inside", 2, 8), Kernel("over", 9, 15)
    assert exclusive_us([over, inside, first], (0, 12)) == [(first, 10), (over, 2)]


def steps(count: int, *, extra: list[Kernel] | None = None) -> list[Kernel]:
    """Steps of 100 us: attention 20, product 50 (the next starts 5 early), sampling 5, an idle end of 30."""
    kernels = [Kernel("embed_kernel", -1.0, 0.0)] if extra is None else list(extra)
    for index in range(count):
        start = 100.0 * index
        kernels += [
            Kernel("decode_attention_kernel", start, start + 15),
            Kernel("skinny_linear_kernel", start + 10, start + 40),
            Kernel("skinny_linear_kernel", start + 45, start + 65),
            Kernel("greedy_kernel", start + 65, start + 70),
        ]
    return kernels


def test_step_marks_are_the_ends_of_what_runs_once_a_step():
    assert step_marks(steps(4), 4) in ([15.0, 115.0, 215.0, 315.0], [70.0, 170.0, 270.0, 370.0])
    assert step_marks(steps(4), 20) == []
    assert step_marks([], 4) == []


def test_shares_and_gaps_make_up_the_window():
    kernels = steps(4)
    found = break_down(kernels, [70.0, 170.0, 270.0, 370.0])
    assert found is not None
    assert (found.window_us, found.num_steps) == (300.0, 3)
    assert found.shares == pytest.approx({"attention": 0.15, "products": 0.45, "rest": 0.05})
    assert found.gaps == pytest.approx(0.35)
    assert sum(found.shares.values()) + found.gaps == pytest.approx(1)
    assert found.long_gaps == pytest.approx(0.30)
    assert found.largest_gap_us == pytest.approx(30)
    assert [name for name, _ in found.top] == ["skinny_linear_kernel", "decode_attention_kernel", "greedy_kernel"]


def test_without_marks_all_that_was_recorded_is_the_window():
    found = break_down([Kernel("gemm", 5, 15), Kernel("other", 20, 25)], [])
    assert found is not None
    assert (found.window_us, found.num_steps) == (20, 1)
    assert found.shares == pytest.approx({"attention": 0, "products": 0.5, "rest": 0.25})
    assert break_down([], []) is None


def test_kernels_are_read_from_a_trace():
    events = [
        {"ph": "X", "cat": "kernel", "name": "late", "ts": 7.5, "dur": 1.25, "tid": 7},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 0, "dur": 1},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "early", "ts": 2.0, "dur": 3.0, "tid": 13},
        {"ph": "M", "name": "process_name", "ts": 0},
    ]
    assert kernels_of({"traceEvents": events}) == [Kernel("early", 2.0, 5.0), Kernel("late", 7.5, 8.75)]
