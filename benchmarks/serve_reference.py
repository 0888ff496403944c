"""What vLLM did under the same load, to set figures beside; never a result of a run of ours.

Measured by us on 2026-11-22 on two NVIDIA H200s of one host (torch 2.11.0, NCCL 2.28.9): vLLM 0.22.0, open-loop
Poisson, prompts of 2,048 tokens +- 25 %, 256 output tokens, 20 s a rate, prefix cache off, Llama-3.1-8B shapes with
random weights. What drove vLLM is not in this repository, so these figures cannot be made again from it; they stand
here alone, and benchmarks/RESULTS.md quotes them. The ceilings are those of that day and those cards.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "vLLM 0.22.0, two H200s, 2026-11-22 (benchmarks/serve_reference.py)"
COPY_BYTES_S = 4.27e12
MATRIX_FLOP_S = 792e12
PROMPT_LEN, OUTPUT_LEN = 2048, 256
SPREAD = 0.25


@dataclass(frozen=True, slots=True)
class Reference:
    """One rate of vLLM's; milliseconds."""

    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    itl_p99: float
    itl_max: float

    def scaled(self, copy_bytes_s: float, matrix_flop_s: float) -> Reference:
        """What it would be on a machine of these ceilings, if TTFT were all products and the rest all memory.

        A rough measure: queues do not grow in proportion, and neither is any phase all one or the other.
        """
        compute, memory = MATRIX_FLOP_S / matrix_flop_s, COPY_BYTES_S / copy_bytes_s
        return Reference(
            self.ttft_p50 * compute,
            self.ttft_p99 * compute,
            self.tpot_p50 * memory,
            self.tpot_p99 * memory,
            self.itl_p99 * memory,
            self.itl_max * memory,
        )


LOADED: dict[str, dict[float, Reference]] = {
    "1p1d": {
        1: Reference(87, 195, 5.0, 5.1, 5.8, 8),
        6: Reference(95, 247, 5.7, 6.9, 8.0, 117),
        12: Reference(111, 449, 6.6, 6.8, 9.3, 14),
        18: Reference(231, 769, 13.2, 15.8, 82.7, 146),
    },
    "2colocated": {
        1: Reference(59, 74, 5.1, 5.3, 5.7, 49),
        6: Reference(59, 105, 6.0, 7.4, 31.7, 71),
        12: Reference(62, 118, 7.8, 9.0, 46.0, 98),
        18: Reference(68, 147, 10.0, 11.6, 53.2, 95),
        24: Reference(81, 233, 14.5, 17.5, 61.7, 132),
    },
}
"""By shape (vLLM's own: 1P1D over NIXL; two replicas, round robin) and requests/s."""
LONG_PROMPT_LEN, LONG_RATE = 8192, 1.0
LONG_TTFT_P50 = {"1p1d": 416.0, "2colocated": 215.0}
"""For prompts of 8,192 tokens at 1/s, by shape; milliseconds."""
